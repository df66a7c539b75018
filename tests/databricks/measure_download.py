"""Measure PullModel's download of a large file from the stand-in workspace; write docs/RESULTS_download.md.

    python -m tests.databricks.measure_download [--bytes 2000000000] [--repeat 5] [--json FILE]

Every mode is a process of its own, in turn, so that drift of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.databricks import storage
from tests.databricks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
MODES = {
    "download": ("PullModel's download: ranges, resumable, size and SHA-256", []),
    "ranges": ("raw copy, the same ranges and threads", ["--raw"]),
    "single": ("raw copy, one connection", ["--raw", "--workers", "1"]),
}


def measure(size: int, files: int, repeat: int, folder: Path) -> list[dict[str, Any]]:
    """Run every mode `repeat` times with `files` files of `size` bytes; one record a run."""
    source = folder / "source"
    block = os.urandom(1 << 24)
    with source.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
    records = []
    with Workspace() as workspace:
        for _ in range(repeat):
            for mode, (_, options) in MODES.items():
                out = Path(tempfile.mkdtemp(dir=folder))
                url = storage.sign(workspace, source)["url"]
                command = [sys.executable, "-m", "steps.registry.bench", url]
                command += ["--bytes", str(size), "--files", str(files), "--out", str(out), *options]
                result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                records.append({"mode": mode} | json.loads(result.stdout))
                shutil.rmtree(out)
    return records


def table(records: list[dict[str, Any]], size: int, files: int, cores: int, place: str) -> str:
    """The records as a Markdown section."""
    lines = [
        f"{files} x {size / 1e9:.1f} GB over loopback to {place}, {cores} cores, {platform.machine()}, "
        f"Python {platform.python_version()}; median of {len(records) // len(MODES)} runs, modes in turn.",
        "",
        "| what | MB/s | share of it that PullModel reaches | CPU seconds | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    rate = {mode: _median(records, mode, "mb_per_s") for mode in MODES}
    for mode, (meaning, _) in MODES.items():
        share = "" if mode == "download" else f"{100 * rate['download'] / rate[mode]:.0f} %"
        cpu, peak = _median(records, mode, "cpu_seconds"), max(_values(records, mode, "peak_mb"))
        lines.append(f"| {meaning} | {rate[mode]:.0f} | {share} | {cpu:.1f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="of all files together")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, help="write the records there instead of docs/RESULTS_download.md"
    )
    parser.add_argument("--folder", default="/tmp", help="where source and copy lie; /dev/shm is memory")
    args = parser.parse_args()
    folder, size = Path(tempfile.mkdtemp(dir=args.folder)), args.bytes // args.files
    try:
        records = measure(size, args.files, args.repeat, folder)
    finally:
        shutil.rmtree(folder)
    text = table(records, size, args.files, len(os.sched_getaffinity(0)), args.folder)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"records": records, "table": text}, indent=1))
    else:
        head = (
            "# Download of a large model, measured\n\nBy `python -m tests.databricks.measure_download`.\n\n"
        )
        (ROOT / "docs" / "RESULTS_download.md").write_text(head + text)


def _values(records: list[dict[str, Any]], mode: str, key: str) -> list[float]:
    return [record[key] for record in records if record["mode"] == mode]


def _median(records: list[dict[str, Any]], mode: str, key: str) -> float:
    return statistics.median(_values(records, mode, key))


if __name__ == "__main__":
    main()
