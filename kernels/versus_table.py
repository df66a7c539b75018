"""RESULTS.md from the rows that `kernels.versus` measured: every case, losses included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kernels.auto import AGREEMENT
from kernels.grid import GROUPS, MARKERS, GridCase
from kernels.peers import PEERS
from kernels.timing import Timing

PLANNED = " planned"  # suffix of a peer whose schedule was made before the timed call
NOTHING = "nothing"  # a graph of one trivial kernel: what the measurement itself costs
MISSING = "-"  # where nothing was measured
Times = Mapping[str, Timing]

HEAD = """# The hopper target against FlashMLA and FlashAttention-3

Written by `python -m kernels.bench --peers` from one run.

{machine}. Peers: {peers}.
Microseconds, median (p20-p80) of {rounds} replays of a CUDA graph with one call; all kernels take turns in
one process on the same inputs: bfloat16, causal where a row has several queries. One pool of {pool:.1f} GiB
holds the caches of all cases, as a server's does: pages of 64 tokens, drawn from all of it at random, and a
contiguous copy for FlashAttention-3, whose wheel has no paged path. Cold: 256 MiB are overwritten before
every replay. Warm: the same graph has just run. A graph with one trivial kernel takes {nothing:.1f} in this
harness. Floor: bytes at 2.75 TB/s or operations at 788 TFLOP/s, whichever is longer;
both rates were measured with large inputs, and reads alone go up to a tenth faster, so times may lie below
it. Outputs differ by at most {difference:.1e} of their norm.

Every kernel plans its work from the lengths. Two ratios of ours to the faster peer are given, **bold** where
ours is slower:

- **ratio**: the whole operation with its plan, for all three. It is what a single call costs.
  FlashAttention-3 without scheduler metadata plans in the call, FlashMLA in a kernel before it.
- **planned**: the peers' plans (FlashMLA's metadata, FlashAttention-3's scheduler metadata) were made before
  the timed call; ours still plans in the call. An engine plans once a step for all layers, so this is the
  share of one layer where a model has many.
"""


@dataclass(frozen=True)
class Row:
    """One case: times by name, with a cold and with a warm L2, and how far outputs are from our first one."""

    case: GridCase
    cold: Times
    warm: Times
    differences: Mapping[str, float]  # relative, in the 2-norm
    failures: Mapping[str, str] = field(default_factory=dict)  # who was not measured, and why

    @property
    def disagreeing(self) -> list[str]:
        """Names whose output is not ours: their times compare different work."""
        return [name for name, error in self.differences.items() if not error <= AGREEMENT[torch.bfloat16]]


def render(rows: Sequence[Row], ours: str, machine: str, versions: Sequence[str], pool_bytes: int) -> str:
    """The whole page; `ours` names our backend among the times of a row at least, `versions` the peers."""
    failures = [f"{row.case.name}: {name}, {reason}" for row in rows for name, reason in row.failures.items()]
    rows = [row for row in rows if ours in row.cold]
    grid = [row for row in rows if not row.case.fp8]
    fp8 = [row for row in rows if row.case.fp8]
    timings = [row.cold[NOTHING] for row in rows]
    page = HEAD.format(
        machine=machine,
        pool=pool_bytes / 2**30,
        peers=", ".join(versions) or "none",
        rounds=timings[0].samples,
        nothing=sorted(timing.p50_us for timing in timings)[len(timings) // 2],
        difference=max((error for row in rows for error in row.differences.values()), default=0.0),
    )
    lines = [page]
    if wrong := [f"{row.case.name}: {', '.join(row.disagreeing)}" for row in rows if row.disagreeing]:
        lines += ["**Outputs that are not ours, so that times compare different work:**", *wrong, ""]
    if failures:
        lines += ["**Not measured:**", *failures, ""]
    lines += markers(rows, ours)
    for title, label in (("Cold L2", "cold"), ("Warm L2", "warm")):
        times = [(row, getattr(row, label)) for row in grid]
        if any(has_peer(one) for _, one in times):
            lines += [
                f"## {title}",
                "",
                *summary(times, ours),
                "",
                *groups(times, ours),
                "",
                *table(times, ours),
                "",
            ]
    if fp8:
        lines += ["## fp8_ds_mla cache, no peer", ""]
        lines += ["| case | s_q | heads | floor | cold | warm |", "|---|--:|--:|--:|--:|--:|"]
        lines += [f"{_shape(row)} | {_times(row.cold[ours])} | {_times(row.warm[ours])} |" for row in fp8]
    return "\n".join(lines).rstrip() + "\n"


def has_peer(times: Times, planned: bool = False) -> bool:
    """Whether there is somebody to compare with."""
    return any(name + PLANNED * planned in times for name in PEERS)


def ratio(times: Times, ours: str, planned: bool) -> float:
    """Ours over the fastest peer that was measured, medians; `planned`: their plans were made before."""
    suffix = PLANNED * planned
    return times[ours].p50_us / min(times[name + suffix].p50_us for name in PEERS if name + suffix in times)


def markers(rows: Sequence[Row], ours: str) -> list[str]:
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
        lines.append(f"{_shape(row, label)} | {goal:.0f} | {shown} |")
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


def table(rows: Sequence[tuple[Row, Times]], ours: str) -> list[str]:
    """One line a case."""
    names = [name for name in PEERS if any(name in times for _, times in rows)]
    titles = [PEERS[name].title for name in names]
    head = [
        "case",
        "s_q",
        "heads",
        "floor",
        "ours",
        *titles,
        "ratio",
        *(f"{t}, planned" for t in titles),
        "planned",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row, times in rows:
        cells = [_shape(row), _times(times[ours])]
        for planned in (False, True):
            cells += [_times(times.get(name + PLANNED * planned)) for name in names]
            cells.append(_bold(ratio(times, ours, planned)) if has_peer(times, planned) else MISSING)
        lines.append(" | ".join(cells) + " |")
    return lines


def _shape(row: Row, label: str = "") -> str:
    case = row.case
    return f"| {case.label}{label} | {case.s_q} | {case.h_q} | {case.floor_us():.1f}"


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
