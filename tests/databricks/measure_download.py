"""Measure PullModel's download of a large file from the stand-in workspace; write docs/RESULTS_download.md.

    python -m tests.databricks.measure_download [--bytes 2000000000] [--repeat 5]

Every mode is a process of its own, in turn, so that drift of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.databricks import storage
from tests.databricks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
MODES = {
    "download": ("PullModel's download: ranges, resumable, size and SHA-256", []),
    "ranges": ("raw copy, the same ranges and threads", ["--raw"]),
    "bound": ("bound: the same, each chunk hashed while in memory", ["--raw", "--hash"]),
    "single": ("raw copy, one connection", ["--raw", "--workers", "1"]),
}

# title, files that share the bytes, network's rate in MB/s (0: the loopback's own)
CASES = [
    ("One file, network of 2.4 Gbit/s (300 MB/s)", 1, 300.0),
    ("One file, network of 5 Gbit/s (625 MB/s)", 1, 625.0),
    ("One file, no limit", 1, 0.0),
    ("Four files, no limit", 4, 0.0),
]
HEAD = """# Download of a large model, measured

By `python -m tests.databricks.measure_download`: {gigabytes:.1f} GB from the stand-in workspace over
loopback into memory, {cores} cores ({machine}, Python {python}), median of {repeat} runs, modes in turn.
Load average during the runs: {load:.1f}; far above the number of cores, other work decides the rates, and
only CPU seconds and memory mean something.

- **Raw copy** is what the download is measured against: the same HTTP client asks for the same ranges with as
  many threads and writes what comes to a file. No hash, no check, no resume.
- **Bound** is that copy with SHA-256 of each chunk while it is in memory. It verifies nothing, but a download
  that hashes every byte cannot cost less. Where the network is the limit, bound and raw copy are equally
  fast. Where the cores are (client and server share {cores} here), the bound lies below the copy: one core
  hashes {sha:.0f} MB/s, so {gigabytes:.1f} GB cost {seconds:.1f} CPU seconds on top of the copy's.

"""


def measure(size: int, files: int, limit: float, repeat: int, folder: Path) -> list[dict[str, Any]]:
    """Run every mode `repeat` times with `files` files of `size` bytes; one record a run.

    `limit` is the rate of the stand-in's network in MB/s, 0 for none.
    """
    source = folder / "source"
    block = os.urandom(1 << 24)
    with source.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
    records = []
    with Workspace() as workspace:
        workspace.bytes_per_second = limit * 1e6
        for _ in range(repeat):
            for mode, (_, options) in MODES.items():
                out = Path(tempfile.mkdtemp(dir=folder))
                url = storage.sign(workspace, source)["url"]
                command = [sys.executable, "-m", "steps.registry.bench", url]
                command += ["--bytes", str(size), "--files", str(files), "--out", str(out), *options]
                result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                records.append({"mode": mode} | json.loads(result.stdout))
                shutil.rmtree(out)
    source.unlink()
    return records


def table(records: list[dict[str, Any]], title: str) -> str:
    """The records as a Markdown section."""
    lines = [
        f"## {title}",
        "",
        "| what | MB/s | share of it that PullModel reaches | client's CPU seconds | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    rate = {mode: _median(records, mode, "mb_per_s") for mode in MODES}
    for mode, (meaning, _) in MODES.items():
        share = "" if mode == "download" else f"{100 * rate['download'] / rate[mode]:.0f} %"
        cpu, peak = _median(records, mode, "cpu_seconds"), max(_values(records, mode, "peak_mb"))
        lines.append(f"| {meaning} | {rate[mode]:.0f} | {share} | {cpu:.1f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def sha256_rate() -> float:
    """MB/s of SHA-256 on one core of this machine, which no single file's verified download can exceed."""
    block, digest, started = os.urandom(1 << 22), hashlib.sha256(), time.process_time()
    for _ in range(100):
        digest.update(block)
    return 100 * len(block) / (time.process_time() - started) / 1e6


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="of all files together")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--folder", default="/dev/shm", help="where source and copies lie; memory, not a disk"
    )
    args = parser.parse_args()
    sections = []
    for title, files, limit in CASES:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            records = measure(args.bytes // files, files, limit, args.repeat, folder)
        finally:
            shutil.rmtree(folder)
        sections.append(table(records, title))
        print(sections[-1])
    load, sha = os.getloadavg()[1], sha256_rate()
    head = HEAD.format(
        gigabytes=args.bytes / 1e9,
        cores=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        python=platform.python_version(),
        repeat=args.repeat,
        load=load,
        sha=sha,
        seconds=args.bytes / sha / 1e6,
    )
    (ROOT / "docs" / "RESULTS_download.md").write_text(head + "\n".join(sections))


def _values(records: list[dict[str, Any]], mode: str, key: str) -> list[float]:
    return [record[key] for record in records if record["mode"] == mode]


def _median(records: list[dict[str, Any]], mode: str, key: str) -> float:
    return statistics.median(_values(records, mode, key))


if __name__ == "__main__":
    main()
