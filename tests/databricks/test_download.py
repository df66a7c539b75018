"""The downloader alone: resuming in another process, stores without ranges or sizes, checksums, paths."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps.job import StepError
from steps.registry import download as downloader
from steps.registry.download import download
from steps.registry.partial import Downloaded
from steps.registry.paths import check_paths
from steps.registry.progress import Progress
from steps.registry.remote import Body, RemoteFile, Store, TransferError

PART = 4 << 20


class FakeStore(Store):
    """Files in memory, served as a store may: with or without ranges, sizes and checksums."""

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True, sizes: bool = True) -> None:
        super().__init__("fake")
        self.files, self.ranges, self.sizes = files, ranges, sizes
        self.etag: str = "1"
        self.md5: dict[str, str] = {}
        self.break_after: list[int] = []  # bytes before each of the next answers breaks off
        self.sent = 0

    def list(self) -> list[RemoteFile]:
        return [RemoteFile(path, len(data) if self.sizes else None) for path, data in self.files.items()]

    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        data = self.files[path]
        first = start if self.ranges else 0
        last = end if self.ranges and end is not None else len(data)
        looking = (start, end) == (0, 1)  # at the validator, or whether ranges are honoured
        limit = self.break_after.pop(0) if self.break_after and not looking else None

        def chunks() -> Iterator[bytes]:
            sent = 0
            for position in range(first, last, 1 << 20):
                chunk = data[position : min(position + (1 << 20), last)]
                if limit is not None and sent + len(chunk) > limit:
                    raise TransferError(f"{path}: cut")
                sent += len(chunk)
                self.sent += 0 if looking else len(chunk)
                yield chunk

        total = len(data) if self.sizes else None
        return Body(chunks(), first, total, self.etag, self.ranges, self.md5.get(path))

    def renew(self) -> None:
        raise AssertionError("no credentials here")


def data(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def fetch(store: Store, destination: Path, **options) -> list[Downloaded]:
    destination.mkdir(exist_ok=True)
    return download(store, store.list(), destination, part_bytes=PART, backoff=0.0, **options)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("sizes", [True, False])
def test_every_kind_of_store(ranges: bool, sizes: bool, tmp_path: Path) -> None:
    files = {"empty": b"", "a/small": b"x", "a/b/large": data(3 * PART + 17), "exact": data(PART)}
    results = fetch(FakeStore(files, ranges=ranges, sizes=sizes), tmp_path / "out")
    for result, (path, content) in zip(results, files.items(), strict=True):
        assert (tmp_path / "out" / path).read_bytes() == content
        assert (result.path, result.bytes) == (path, len(content))
        assert result.sha256 == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "empty", "exact"]


def test_a_file_named_as_a_work_folder_might_be(tmp_path: Path) -> None:
    files = {".download/a": b"x", ".download-1": b"y"}
    fetch(FakeStore(files), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_a_store_without_ranges_sends_each_file_once(tmp_path: Path) -> None:
    """An MLflow 2 server: asked for parts, it sends the whole file for every one of them."""
    store = FakeStore({"a": data(6 * PART), "b": data(3 * PART, 1)}, ranges=False)
    fetch(store, tmp_path / "out")
    assert store.sent == 9 * PART


def test_a_broken_transfer_goes_on_where_it_broke(tmp_path: Path) -> None:
    content = data(3 * PART)
    store = FakeStore({"w": content})
    store.break_after = [1 << 20, 2 << 20]
    fetch(store, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "w").read_bytes() == content
    assert store.sent == len(content)


def test_another_process_goes_on_where_this_one_died(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(downloader, "ATTEMPTS", 1)
    content = data(3 * PART)
    store = FakeStore({"done": data(PART, 1), "w": content})
    store.break_after = [PART, PART, 2 << 20]
    resume = tmp_path / "resume"
    with pytest.raises(StepError, match="failed 1 times"):
        fetch(store, tmp_path / "first", workers=1, resume_dir=resume)
    assert list((tmp_path / "first").iterdir()) == []
    assert store.sent == 2 * PART + (2 << 20)

    progress = Progress(store.sent)
    fetch(store, tmp_path / "second", workers=1, resume_dir=resume, progress=progress)
    assert (tmp_path / "second" / "w").read_bytes() == content
    assert store.sent == 4 * PART, "what was on disk was fetched again"
    assert (progress.done, progress.fetched) == (4 * PART, 2 * PART - (2 << 20))
    assert not resume.exists()


@pytest.mark.parametrize("what", ["etag", "longer", "shorter", "garbage"])
def test_remains_of_another_content_are_not_used(what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(downloader, "ATTEMPTS", 1)
    resume = tmp_path / "resume"
    store = FakeStore({"w": data(2 * PART)})
    store.break_after = [PART, 2 << 20]
    with pytest.raises(StepError, match="failed 1 times"):
        fetch(store, tmp_path / "first", workers=1, resume_dir=resume)
    monkeypatch.setattr(downloader, "ATTEMPTS", 3)
    content = data(2 * PART + {"longer": 1, "shorter": -PART - 1}.get(what, 0), seed=9)
    store.files["w"] = content
    store.etag = "2"
    if what == "garbage":
        for state in resume.glob("*.json"):
            state.write_text("{")
    fetch(store, tmp_path / "second", workers=1, resume_dir=resume)
    assert (tmp_path / "second" / "w").read_bytes() == content


def test_a_checksum_of_the_store_is_compared(tmp_path: Path) -> None:
    content = data(2 * PART)
    store = FakeStore({"w": content, "s": b"small"})
    store.md5 = {name: hashlib.md5(value).hexdigest() for name, value in store.files.items()}
    fetch(store, tmp_path / "good")
    for name in store.files:
        store.md5 = {name: "0" * 32}
        with pytest.raises(StepError, match=f"{name} has the MD5"):
            fetch(store, tmp_path / f"bad-{name}")
        assert not (tmp_path / f"bad-{name}" / name).exists()


def test_a_store_that_answers_more_than_it_listed(tmp_path: Path) -> None:
    store = FakeStore({"s": b"12345"}, sizes=False)
    with pytest.raises(StepError, match="more than its 4 bytes"):
        download(store, [RemoteFile("s", 4)], tmp_path)


def test_a_disk_too_small(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StepError, match="VolumeSizeInGB"):
        fetch(FakeStore({"w": data(PART)}), tmp_path / "out")


def test_progress_tells_bytes_share_and_rate(tmp_path: Path) -> None:
    lines: list[str] = []
    store = FakeStore({"w": data(2 * PART)})
    fetch(store, tmp_path / "out", progress=Progress(2 * PART, seconds=0.0, report=lines.append))
    assert lines[-1].startswith("downloaded 8.4 MB of 8.4 MB (100 %), ")
    assert lines[-1].endswith("B/s")


class Replaced(FakeStore):
    """A file is replaced between the answers to its first two parts, before a byte of either was read."""

    def __init__(self, old: bytes, new: bytes) -> None:
        super().__init__({"w": old})
        self.old, self.new, self.second = old, new, threading.Event()

    def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
        if start == 0 and end == PART and not self.second.is_set():
            body = Body(self.late(), 0, len(self.old), "1")
            self.files[path], self.etag = self.new, "2"
            return body
        body = super().open(path, start, end)
        if start:
            self.second.set()
        return body

    def late(self) -> Iterator[bytes]:
        self.second.wait(10)
        time.sleep(0.2)  # the other part's answer is compared now
        yield from (self.old[at : at + (1 << 20)] for at in range(0, PART, 1 << 20))


def test_two_contents_are_never_glued_together(tmp_path: Path) -> None:
    store = Replaced(data(2 * PART), data(2 * PART, 1))
    fetch(store, tmp_path / "out", workers=2)
    assert (tmp_path / "out" / "w").read_bytes() == store.new


def test_two_pulls_at_once_do_not_share_unfinished_files(tmp_path: Path) -> None:
    """The first is still at work when the second, which sees another content, ends."""
    go_on = threading.Event()

    class Slow(FakeStore):
        def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
            body = super().open(path, start, end)
            if start:
                go_on.wait(20)
            return body

    slow, quick = Slow({"w": data(2 * PART)}), FakeStore({"w": data(2 * PART, 1)})
    quick.etag, resume = "2", tmp_path / "resume"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, slow, tmp_path / "first", resume_dir=resume)
        while not list(resume.glob("*.part")):
            time.sleep(0.01)
        fetch(quick, tmp_path / "second", resume_dir=resume)
        go_on.set()
        [result] = first.result()
    for store, name in ((slow, "first"), (quick, "second")):
        assert (tmp_path / name / "w").read_bytes() == store.files["w"]
    assert result.sha256 == hashlib.sha256(slow.files["w"]).hexdigest()


@pytest.mark.parametrize(("size", "count"), [(1, 300), ((2 << 20) + 1, 60)])
def test_thousands_of_files_take_few_descriptors_and_threads(size: int, count: int, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    most, blob = 0, data(size)

    class Counting(FakeStore):
        def open(self, path: str, start: int = 0, end: int | None = None) -> Body:
            nonlocal most
            most = max(most, threading.active_count())
            return super().open(path, start, end)

    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        results = fetch(Counting({f"f{index}": blob for index in range(count)}), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(results) == count
    assert most - threads <= 16, "one thread a file"


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 9 << 20), min_size=1, max_size=4),
    breaks=st.lists(st.integers(0, 5 << 20), max_size=4),
    workers=st.integers(1, 4),
    ranges=st.booleans(),
)
def test_any_sizes_and_breaks(sizes, breaks, workers, ranges, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("any")
    blob = data(9 << 20)
    store = FakeStore({f"f{index}": blob[:size] for index, size in enumerate(sizes)}, ranges=ranges)
    store.break_after = list(breaks)
    fetch(store, folder / "out", workers=workers)
    for path, content in store.files.items():
        assert (folder / "out" / path).read_bytes() == content


_PARTS = st.text(st.characters(blacklist_characters="/\\", min_codepoint=32, max_codepoint=0x24F), min_size=1)


@given(st.lists(_PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=4))
def test_accepted_paths_stay_below_the_folder(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        check_paths([path])
    except StepError:
        return
    base = Path("/base")
    assert os.path.normpath(base / path) == str(base / path)
    assert (base / path).is_relative_to(base)


@pytest.mark.parametrize(
    "path",
    [
        "a\ud800",
        "/etc/passwd",
        "",
        "../x",
        "a/../../x",
        "a//b",
        "a/./b",
        "C:/x",
        "a\\..\\x",
        "a\0b",
        "a\nb",
        "x" * 300,
    ],
)
def test_paths_that_leave_or_cannot_be(path: str) -> None:
    with pytest.raises(StepError, match="nothing was downloaded"):
        check_paths(["MLmodel", path])


def test_two_entries_for_one_file() -> None:
    with pytest.raises(StepError, match="twice"):
        check_paths(["a", "a"])
    with pytest.raises(StepError, match="both as a file and as a folder"):
        check_paths(["a/b", "a"])


def test_the_state_file_is_readable(tmp_path: Path, monkeypatch) -> None:
    """A person who looks into the resume folder sees which file it is about and how far it is."""
    monkeypatch.setattr(downloader, "ATTEMPTS", 1)
    store = FakeStore({"w": data(2 * PART)})
    store.break_after = [1 << 20]
    with pytest.raises(StepError):
        fetch(store, tmp_path / "out", workers=1, resume_dir=tmp_path / "resume")
    state = json.loads(next((tmp_path / "resume").glob("*.json")).read_text())
    assert state == {"path": "w", "bytes": 2 * PART, "etag": "1", "md5": None, "spans": [[0, 1 << 20]]}
