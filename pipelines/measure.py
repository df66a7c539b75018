"""Measure the local run: `python -m pipelines.measure` renews README and docs/RESULTS_run.md.

It runs `mla-pipeline run --approve` as a person would, samples the memory of its whole process tree, and
takes the step times from the run's own summary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import readme
from pipelines.local import state_folder

RESULTS = readme.README.parent / "docs" / "RESULTS_run.md"
SAMPLE_SECONDS = 0.5
RENDER = """
import time
from pipelines.settings import Settings
from pipelines import production, release
settings = Settings.load("local")
started = time.perf_counter()
release.get_pipeline(settings).definition()
production.get_pipeline(settings).definition()
print(time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Measured:
    """One command: wall seconds, peak proportional set size of its process tree in bytes, status, output."""

    seconds: float
    peak_bytes: int
    status: int
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end; its output is shown and kept."""
    started = time.monotonic()
    peak = 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(list(command), stdout=out)
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, tree(process.pid))))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
        out.seek(0)
        output = out.read()
    print(output)
    return Measured(seconds, peak, process.returncode, output)


def tree(pid: int) -> list[int]:
    """A process and all its descendants, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents.setdefault(int(after_name[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


def _pss(pid: int) -> int:
    """Bytes of memory, shared pages divided among their users."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it ended meanwhile
        pass
    return 0


def best_seconds(command: Sequence[str], runs: int = 5) -> float:
    """Shortest wall time of a few runs."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def newest_summary() -> tuple[Path, dict[str, Any]]:
    """summary.json of the last run."""
    path = max((state_folder() / "runs").glob("*/summary.json"), key=lambda one: one.stat().st_mtime)
    return path, json.loads(path.read_text())


def machine() -> str:
    """Processor, cores and memory, in words."""
    names = [one for one in Path("/proc/cpuinfo").read_text().splitlines() if one.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(prog="python -m pipelines.measure", description=__doc__).parse_args()
    tool = [sys.executable, "-m", "pipelines.cli"]
    run = measure([*tool, "run", "--approve"])
    if run.status:
        sys.exit(run.status)
    path, summary = newest_summary()
    evaluation = json.loads((path.parent / "evaluation.json").read_text())
    rows = [
        ("`mla-pipeline run --approve`, environment and demo model there", f"{run.seconds:.1f} s", "≤ 90 s"),
        ("peak memory of the run, all processes", f"{run.peak_bytes / 2**30:.2f} GiB", "≤ 3 GB"),
        ("both definitions rendered, after import", f"{_render_seconds():.2f} s", "≤ 3 s"),
        ("`mla-pipeline --help`", f"{best_seconds([*tool, '--help']):.2f} s", "≤ 0.5 s"),
        (
            f"kernel `{evaluation['backend']}` over torch, geometric mean",
            f"{evaluation['gate']['speedup']:.2f}x",
            "≥ 1.5x",
        ),
        ("worst relative error, kernel and model", f"{evaluation['gate']['relative_error']:.1e}", ""),
        (
            "decode step of the demo model, batch 1, p50",
            f"{evaluation['gate']['decode_latency_ms']:.2f} ms",
            "",
        ),
    ]
    table = ["| measured | value | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    steps = ["| step | seconds |", "|---|---|"]
    steps += [f"| {name} | {seconds:.1f} |" for name, seconds in summary["seconds"].items()]
    when = f"{machine()}; {datetime.now(UTC):%Y-%m-%d}; made by `python -m pipelines.measure`."
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        "\n".join(["# The local run, measured", "", when, "", *table, "", "## Steps", "", *steps, ""])
    )
    readme.renew("output", f"```\n{run.output.replace(f'{Path.cwd()}/', '').strip()}\n```")
    readme.renew("measured", "\n".join([*table, "", when]))
    print(RESULTS.read_text())


def _render_seconds() -> float:
    command = [sys.executable, "-c", RENDER]
    return min(float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3))


if __name__ == "__main__":
    main()
