"""Write RESULTS.md from what `kernels.hopper_check --out` measured.

`python -m kernels.hopper_results IN.jsonl ... OUT.md`
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

PEERS = {"flash_mla": "FlashMLA", "fa3": "FlashAttention-3"}
HEAD = """# The hopper target against FlashMLA and FlashAttention-3

Written by `python -m kernels.hopper_results` from one run of `python -m kernels.hopper_check --peers --warm`.

{machine}.
Microseconds, median (p20-p80) of {rounds} CUDA graph replays; the three kernels interleaved in one
process; bfloat16, pages of 64 tokens in random order (FlashAttention-3's wheel has no paged path
and reads a contiguous cache). Cold: 256 MiB are overwritten before every replay. Ours computes its
schedule in every run; the peers' schedules (FlashMLA's metadata, FlashAttention-3's scheduler
metadata) were made before the timed graph, which favours them. A graph with one trivial kernel
takes {nothing} in this harness. Floor: bytes at 2.75 TB/s or operations at 788 TFLOP/s, whichever
is longer; both rates were measured with large inputs, and reads alone go slightly faster. Ratio:
ours over the faster peer; **bold** where ours is slower.
"""


def best_peer(times: dict[str, list[float]]) -> float:
    """The faster peer's median."""
    return min(times[name][1] for name in PEERS if name in times)


def ratio(times: dict[str, list[float]]) -> float:
    """Ours over the faster peer, medians."""
    return times["ours"][1] / best_peer(times)


def quantiles(values: list[float]) -> str:
    return f"{values[1]:.1f} ({values[0]:.1f}-{values[2]:.1f})"


def table(rows: list[dict[str, Any]], label: str) -> list[str]:
    """Markdown lines of one table; `label` is cold or warm."""
    lines = [
        "| case | s_q | heads | floor | ours | " + " | ".join(PEERS.values()) + " | ratio |",
        "|---|--:|--:|--:|--:|" + "--:|" * (len(PEERS) + 1),
    ]
    for row in rows:
        times = row[label]
        value = ratio(times)
        shown = f"**{value:.2f}**" if value > 1.0 else f"{value:.2f}"
        measured = " | ".join(quantiles(times[name]) for name in ("ours", *PEERS))
        lines.append(
            f"| {row['case']} | {row['s_q']} | {row['h_q']} | {row['floor']} | {measured} | {shown} |"
        )
    return lines


def summary(rows: list[dict[str, Any]], label: str) -> str:
    """One sentence: how often ours is slower, and the geometric mean of the ratio."""
    ratios = [ratio(row[label]) for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return (
        f"{label.capitalize()} L2: {len(ratios)} cases, ours slower in {sum(r > 1.0 for r in ratios)} "
        f"(worst {max(ratios):.2f}), geometric mean of the ratio {mean:.3f}, best {min(ratios):.2f}."
    )


def group_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Ratio by query rows and length: where ours wins and where it loses."""
    groups = {
        "batch 1 to 8, one query": lambda r: r["s_q"] == 1 and uniform(r) and batch(r) <= 8,
        "batch 16 and more, one query, up to 64 heads": lambda r: (
            r["s_q"] == 1 and uniform(r) and batch(r) >= 16 and r["h_q"] <= 64
        ),
        "batch 16 and more, one query, 128 heads": lambda r: (
            r["s_q"] == 1 and uniform(r) and batch(r) >= 16 and r["h_q"] == 128
        ),
        "2 or 4 queries, up to 128 rows": lambda r: (
            r["s_q"] > 1 and uniform(r) and r["s_q"] * r["h_q"] <= 128
        ),
        "2 or 4 queries, 256 rows and more": lambda r: (
            r["s_q"] > 1 and uniform(r) and r["s_q"] * r["h_q"] > 128
        ),
        "varying lengths": lambda r: not uniform(r),
    }
    lines = ["| group | cases | slower | geometric mean | worst |", "|---|--:|--:|--:|--:|"]
    for name, member in groups.items():
        ratios = [ratio(row["cold"]) for row in rows if member(row)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            slower = sum(r > 1.0 for r in ratios)
            lines.append(f"| {name} | {len(ratios)} | {slower} | {mean:.2f} | {max(ratios):.2f} |")
    return lines


def uniform(row: dict[str, Any]) -> bool:
    return " s" in row["case"]


def batch(row: dict[str, Any]) -> int:
    return int(row["case"].split()[0][1:])


def render(rows: list[dict[str, Any]], machine: str, rounds: int) -> str:
    """The whole page."""
    rows = [row for row in rows if not row["fp8"]] + [row for row in rows if row["fp8"]]
    both = [row for row in rows if not row["fp8"]]
    fp8 = [row for row in rows if row["fp8"]]
    nothing = sorted(row["cold"]["nothing"][1] for row in both)[len(both) // 2]
    lines = [HEAD.format(machine=machine, rounds=rounds, nothing=nothing)]
    lines += [summary(both, "cold"), "", *group_lines(both), "", "## Cold L2", "", *table(both, "cold")]
    lines += ["", "## Warm L2", "", summary(both, "warm"), "", *table(both, "warm")]
    if fp8:
        lines += ["", "## fp8_ds_mla cache, cold L2 (no peer measured)", ""]
        lines += ["| case | s_q | heads | floor | ours |", "|---|--:|--:|--:|--:|"]
        for row in fp8:
            ours = quantiles(row["cold"]["ours"])
            lines.append(f"| {row['case']} | {row['s_q']} | {row['h_q']} | {row['floor']} | {ours} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    parser.add_argument("--machine", default="NVIDIA H100 80GB HBM3 (SXM), CUDA 13.0, torch 2.11.0")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    rows = [json.loads(line) for path in options.measured for line in path.read_text().splitlines()]
    options.page.write_text(render(rows, options.machine, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
