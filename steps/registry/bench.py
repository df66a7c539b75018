"""Measure the download: rate and peak memory against a raw copy of the same bytes by the same HTTP client.

    python -m steps.registry.bench URL --bytes N --out DIR [--raw [--hash] [--workers 1]]

One mode a process, so that each has its own peak memory. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import requests

from steps.registry.download import PART_BYTES, download
from steps.registry.progress import Progress
from steps.registry.remote import CHUNK, RemoteFile
from steps.registry.stores import HttpStore, Location


class UrlStore(HttpStore):
    """Files that all lie at one URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        super().__init__(lambda: None, describe="url")

    def locate(self, path: str) -> Location:
        return Location(self._url, {"x-stand-in": "1"})


def copy_raw(url: str, size: int, files: int, out: Path, workers: int, hashed: bool = False) -> None:
    """The same ranges by the same client and threads, only written: no resume, no check, no hash.

    With `hashed`, each thread also feeds what it has in hand to a SHA-256 of its own. That verifies nothing,
    since a file's hash needs its bytes in order, but no download that hashes every byte can cost less.
    """
    targets = [out / f"raw-{index}" for index in range(files)]
    for target in targets:
        with target.open("wb") as stream:
            stream.truncate(size)
    parts = [(target, start) for target in targets for start in range(0, size, PART_BYTES)]
    lock, session = threading.Lock(), requests.Session()

    def work() -> None:
        digest = hashlib.sha256()
        while True:
            with lock:
                if not parts:
                    return
                target, start = parts.pop(0)
            headers = {"Range": f"bytes={start}-{min(start + PART_BYTES, size) - 1}", "x-stand-in": "1"}
            with (
                target.open("r+b", buffering=0) as stream,
                session.get(url, headers=headers, stream=True, timeout=60) as answer,
            ):
                stream.seek(start)
                while chunk := answer.raw.read(CHUNK, decode_content=False):
                    stream.write(chunk)
                    if hashed:
                        digest.update(chunk)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--bytes", type=int, required=True, help="of one file")
    parser.add_argument("--files", type=int, default=1, help="so many files, all at URL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--raw", action="store_true", help="the yardstick instead of the downloader")
    parser.add_argument("--hash", action="store_true", help="with --raw: SHA-256 of each chunk in memory")
    args = parser.parse_args(argv)
    before, started = _peak(), time.perf_counter()
    result: dict[str, Any] = {}
    if args.raw:
        copy_raw(args.url, args.bytes, args.files, args.out, args.workers, args.hash)
    else:
        files = [RemoteFile(f"model-{index}.safetensors", args.bytes) for index in range(args.files)]
        progress = Progress(args.bytes * args.files, report=lambda line: print(line, file=sys.stderr))
        done = download(UrlStore(args.url), files, args.out, workers=args.workers, progress=progress)
        result["sha256"] = done[0].sha256
    seconds = time.perf_counter() - started
    result |= {
        "seconds": seconds,
        "mb_per_s": args.bytes * args.files / seconds / 1e6,
        "peak_mb": _peak(),
        "peak_mb_before": before,
        "cpu_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
    }
    print(json.dumps(result))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


if __name__ == "__main__":
    main()
