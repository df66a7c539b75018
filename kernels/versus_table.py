"""RESULTS.md from the rows that `kernels.versus` measured: every case, losses included."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.grid import GROUPS, MARKERS
from kernels.limits import Limits
from kernels.peers import PEERS
from kernels.timing import Timing
from kernels.versus_rows import NOTHING, PLANNED, Comparison, Row, Times

MISSING = "-"  # where nothing was measured
RATE_BYTES = 4 << 30  # at most, of the pool: what is read for the rate of bytes
GOAL = 1.25  # times as fast as the faster peer, in geometric mean

HEAD = """# The hopper target against FlashMLA and FlashAttention-3

Written by `python -m kernels.bench --peers`.

{machine}. Peers: {peers}.
Microseconds, median (p20-p80) of {rounds} replays of a CUDA graph with one call; all kernels take turns in
one process on the same inputs: bfloat16, causal where a row has several queries. One pool of {pool:.1f} GiB
holds the caches of all cases, as a server's does: pages of 64 tokens, drawn from all of it at random, and a
contiguous copy for FlashAttention-3, whose wheel has no paged path. Cold: 256 MiB are overwritten before
every replay. Warm: the same graph has just run. Outputs differ by at most {difference:.1e} of their norm.

Floor: what a perfect kernel would take in this harness with a cold L2. A graph with one trivial kernel takes
{nothing:.1f}; to that comes the longer of bytes (cache, query and output once) at {bandwidth:.2f} TB/s and
operations at {operations:.0f} TFLOP/s. Both rates were measured before the first case: the best of
summing {rate_bytes:.0f} GiB, and of a large matrix product.

Every kernel plans its work from the lengths. Two ratios of ours to the faster peer are given, **bold** where
ours is slower:

- **ratio**: the whole operation with its plan, for all three. It is what a single call costs.
  FlashAttention-3 without scheduler metadata plans in the call, FlashMLA in a kernel before it.
- **planned**: the peers' plans (FlashMLA's metadata, FlashAttention-3's scheduler metadata) were made before
  the timed call; ours still plans in the call. An engine plans once a step for all layers, so this is the
  share of one layer where a model has many.
"""


def render(run: Comparison, rows: Sequence[Row]) -> str:
    """The whole page; `run.ours` is among the times of a row at least."""
    failures = [f"{row.case.name}: {name}, {reason}" for row in rows for name, reason in row.failures.items()]
    rows, ours = [row for row in rows if run.ours in row.cold], run.ours
    grid, fp8 = ([row for row in rows if row.case.fp8 == packed] for packed in (False, True))
    lines = [head(run, rows)]
    if wrong := [f"{row.case.name}: {', '.join(row.disagreeing)}" for row in rows if row.disagreeing]:
        lines += ["**Outputs that are not ours, so that times compare different work:**", *wrong, ""]
    if failures:
        lines += ["**Not measured:**", *failures, ""]
    lines += markers(rows, ours, run.limits)
    if any(has_peer(row.cold) for row in grid):
        lines += ["## What a perfect kernel could reach", "", *perfect(grid, ours, run.limits), ""]
    for title, label in (("Cold L2", "cold"), ("Warm L2", "warm")):
        times = [(row, getattr(row, label)) for row in grid]
        if any(has_peer(one) for _, one in times):
            lines += [f"## {title}", "", *summary(times, ours), "", *groups(times, ours), ""]
            lines += [*table(times, ours, run.limits if label == "cold" else None), ""]
    if fp8:
        lines += ["## fp8_ds_mla cache", "", *packed_table(fp8, rows, ours, run.limits)]
    return "\n".join(lines).rstrip() + "\n"


def head(run: Comparison, rows: Sequence[Row]) -> str:
    """How all of it was measured."""
    return HEAD.format(
        machine=run.machine,
        pool=run.pool_bytes / 2**30,
        peers=", ".join(run.peers) or "none",
        rounds=rows[0].cold[NOTHING].samples,
        nothing=sorted(row.cold[NOTHING].p50_us for row in rows)[len(rows) // 2],
        difference=max((error for row in rows for error in row.differences.values()), default=0.0),
        bandwidth=run.limits.bytes_per_us / 1e6,
        operations=run.limits.operations_per_us / 1e6,
        rate_bytes=min(run.pool_bytes, RATE_BYTES) / 2**30,
    )


def floor(row: Row, limits: Limits) -> float:
    """Microseconds of a perfect kernel with a cold L2: a graph's own, and bytes or operations."""
    return row.cold[NOTHING].p50_us + row.case.floor_us(limits)


def perfect(rows: Sequence[Row], ours: str, limits: Limits) -> list[str]:
    """How far ours, the faster peer and the goal are from the floor."""
    lines = [
        "Geometric means with a cold L2, whole operation. A perfect kernel takes the floor. The goal is "
        f"{GOAL:.2f} times the speed of",
        "the faster peer; where a perfect kernel would not be that fast, nothing is.",
        "",
        f"| group | cases | perfect: times the faster peer's speed | below {GOAL:.2f} in "
        "| perfect, peers planned | ours: times the faster peer's speed | ours over the floor |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    compared = [row for row in rows if has_peer(row.cold) and has_peer(row.cold, planned=True)]
    for name, member in [*GROUPS.items(), ("all", lambda case: True)]:
        some = [row for row in compared if member(row.case)]
        if not some:
            continue
        whole, planned = (
            [row.cold[ours].p50_us / ratio(row.cold, ours, plan) / floor(row, limits) for row in some]
            for plan in (False, True)
        )
        speed = [1 / ratio(row.cold, ours, planned=False) for row in some]
        over = [row.cold[ours].p50_us / floor(row, limits) for row in some]
        lines.append(
            f"| {name} | {len(some)} | {_mean(whole):.2f} | {sum(value < GOAL for value in whole)} "
            f"| {_mean(planned):.2f} | {_mean(speed):.2f} | {_mean(over):.2f} |"
        )
    return lines


def has_peer(times: Times, planned: bool = False) -> bool:
    """Whether there is somebody to compare with."""
    return any(name + PLANNED * planned in times for name in PEERS)


def ratio(times: Times, ours: str, planned: bool) -> float:
    """Ours over the fastest peer that was measured, medians; `planned`: their plans were made before."""
    suffix = PLANNED * planned
    return times[ours].p50_us / min(times[name + suffix].p50_us for name in PEERS if name + suffix in times)


def markers(rows: Sequence[Row], ours: str, limits: Limits) -> list[str]:
    """The cases that have a goal of their own."""
    found = [row for row in rows if row.case.name in MARKERS]
    if not found:
        return []
    lines = ["## Goals of single cases, cold L2", "", "| case | s_q | heads | floor | goal | ours |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in found:
        goal, time = MARKERS[row.case.name], row.cold[ours]
        label = " (fp8)" if row.case.fp8 else ""
        shown = _times(time) if time.p50_us <= goal else f"**{_times(time)}**"
        lines.append(f"{_shape(row, label)} | {floor(row, limits):.1f} | {goal:.0f} | {shown} |")
    return [*lines, ""]


def summary(rows: Sequence[tuple[Row, Times]], ours: str) -> list[str]:
    """A line for each ratio: how often ours is slower, and the geometric mean."""
    lines = []
    for planned, name in ((False, "Planning included"), (True, "Peers planned before")):
        ratios = [ratio(times, ours, planned) for _, times in rows if has_peer(times, planned)]
        if not ratios:
            continue
        lines.append(
            f"- {name}: {len(ratios)} cases, ours slower in {_slower(ratios)} (worst {max(ratios):.2f}), "
            f"geometric mean of the ratio {_mean(ratios):.3f} ({1 / _mean(ratios):.2f}x as fast), "
            f"best {min(ratios):.2f}."
        )
    return lines


def groups(rows: Sequence[tuple[Row, Times]], ours: str) -> list[str]:
    """Where ours wins and where it loses."""
    lines = [
        "| group | cases | slower | mean ratio | worst | slower, planned | mean, planned | worst, planned |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, member in GROUPS.items():
        some = [
            times
            for row, times in rows
            if member(row.case) and has_peer(times) and has_peer(times, planned=True)
        ]
        if some:
            cells = [f"| {name} | {len(some)}"]
            for planned in (False, True):
                ratios = [ratio(times, ours, planned) for times in some]
                cells.append(f"{_slower(ratios)} | {_mean(ratios):.2f} | {max(ratios):.2f}")
            lines.append(" | ".join(cells) + " |")
    return lines


def table(rows: Sequence[tuple[Row, Times]], ours: str, limits: Limits | None) -> list[str]:
    """One line a case; without `limits` no floor, which is a cold L2's."""
    names = [name for name in PEERS if any(name in times for _, times in rows)]
    titles = [PEERS[name].title for name in names]
    planned_titles = [f"{title}, planned" for title in titles]
    cells = ["case", "s_q", "heads", *(["floor"] if limits else [])]
    cells += ["ours", *titles, "ratio", *planned_titles, "planned"]
    lines = [f"| {' | '.join(cells)} |", "|---" + "|--:" * (len(cells) - 1) + "|"]
    for row, times in rows:
        cells = [_shape(row), *([f"{floor(row, limits):.1f}"] if limits else []), _times(times[ours])]
        for planned in (False, True):
            cells += [_times(times.get(name + PLANNED * planned)) for name in names]
            cells.append(_bold(ratio(times, ours, planned)) if has_peer(times, planned) else MISSING)
        lines.append(" | ".join(cells) + " |")
    return lines


def packed_table(rows: Sequence[Row], others: Sequence[Row], ours: str, limits: Limits) -> list[str]:
    """Cases with an FP8 cache, which no peer takes: beside our own times with a 16-bit cache."""
    by_name = {row.case.name: row for row in others}
    lines = [
        "No peer takes this cache on Hopper. 16 bits: ours on the same case with a bfloat16 cache; the ratio "
        "is to that.",
        "",
        "| case | s_q | heads | floor | cold | 16 bits | ratio | warm | 16 bits | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [_shape(row), f"{floor(row, limits):.1f}"]
        wide = by_name.get(row.case.with_16_bits().name)
        for times, beside in ((row.cold, wide and wide.cold), (row.warm, wide and wide.warm)):
            time, other = times[ours], beside[ours] if beside else None
            cells += [_times(time), _times(other), _bold(time.p50_us / other.p50_us) if other else MISSING]
        lines.append(" | ".join(cells) + " |")
    return lines


def _shape(row: Row, label: str = "") -> str:
    return f"| {row.case.label}{label} | {row.case.s_q} | {row.case.h_q}"


def _times(timing: Timing | None) -> str:
    if timing is None:
        return MISSING
    return f"{timing.p50_us:.1f} ({timing.p20_us:.1f}-{timing.p80_us:.1f})"


def _bold(value: float) -> str:
    return f"**{value:.2f}**" if value > 1.0 else f"{value:.2f}"


def _slower(ratios: Sequence[float]) -> int:
    return sum(value > 1.0 for value in ratios)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
