"""The pool that all cases of a comparison take their pages from, and the comparison itself, here on a CPU."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import Backend, get_backend, versus
from kernels.bench_options import parse
from kernels.checks import compare as check
from kernels.grid import GridCase
from kernels.limits import H100
from kernels.peers import PEERS, Peer, Run, gathered
from kernels.pool import PagePool, room_pages
from kernels.versus import compare
from kernels.versus_rows import NOTHING, Comparison, read
from kernels.versus_table import render
from kernels.workloads import Inputs

CPU = torch.device("cpu")
PAGE_BYTES = 64 * 576 * 2
SMALL = GridCase("small", (3, 200), 1, 4)
RAGGED = GridCase("ragged", (65, 1, 64, 130), 2, 3)
PACKED = GridCase("small", (3, 200), 1, 4, fp8=True)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_every_case_reads_pages_of_one_allocation() -> None:
    pool = PagePool([SMALL, RAGGED, PACKED], CPU, 100 * PAGE_BYTES)
    assert pool.bytes == 100 * PAGE_BYTES
    seen = {storage(pool.inputs(case).k_cache) for case in (SMALL, RAGGED, PACKED)}
    seen |= {storage(pool.room(case)) for case in (SMALL, RAGGED)}
    assert len(seen) == 1


def test_pages_come_from_all_of_the_pool_and_no_two_are_one() -> None:
    pool = PagePool([SMALL, RAGGED], CPU, 400 * PAGE_BYTES)
    inputs = pool.inputs(RAGGED)
    used = [
        int(inputs.block_table[row, page]) for row, count in enumerate((2, 1, 1, 3)) for page in range(count)
    ]
    assert len(set(used)) == 7
    assert max(used) - min(used) > 100
    assert len(inputs.k_cache) + room_pages(RAGGED) == 400
    assert room_pages(RAGGED) == 4 * 3
    end = inputs.k_cache[-1].data_ptr() + PAGE_BYTES
    assert pool.room(RAGGED).data_ptr() == end


def test_pool_grows_to_the_largest_case() -> None:
    assert PagePool([SMALL, RAGGED], CPU, 0).bytes == (7 + 12) * PAGE_BYTES
    assert PagePool([PACKED], CPU, 0).bytes == 5 * 64 * 656


@pytest.mark.parametrize("case", [SMALL, RAGGED, PACKED], ids=lambda case: case.name)
def test_a_case_is_computed_right_on_the_pool(cpu: Backend, case: GridCase) -> None:
    pool = PagePool([SMALL, RAGGED, PACKED], CPU, 0)
    pool.inputs(PACKED)  # its pages are not those of 16 bits
    inputs = pool.inputs(case)
    result = check("pool", inputs, *cpu(*inputs.arguments()), 2.0**-6, 1e-2)
    assert result.passed, result


def test_rows_are_gathered_into_the_room() -> None:
    pool = PagePool([SMALL], CPU, 20 * PAGE_BYTES)
    inputs, room = pool.inputs(SMALL), pool.room(SMALL)
    table = inputs.block_table[:, :4].long()
    rows = gathered(inputs.k_cache, table, room)
    assert torch.equal(rows.view(2, 4, 64, 1, 576), inputs.k_cache[table])
    assert rows.data_ptr() == room.data_ptr()


def test_too_large_a_pool_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        ValueError, match=r"pool of pages takes 32.0 GiB, more than cpu has free; .*--pool-gib"
    ):
        PagePool([SMALL], CPU, 32 << 30)


def stand_in(name: str, prepare: Callable[[Inputs, Tensor], tuple[Run, Run]]) -> Peer:
    return Peer(name, "pytest", lambda: None, prepare)


def by_reference(inputs: Inputs, room: Tensor) -> tuple[Run, Run]:
    """A peer that is the reference, on a contiguous copy of the cache."""
    b, pages = len(inputs.q), len(room) // len(inputs.q)
    copy = gathered(inputs.k_cache, inputs.block_table[:, :pages].long(), room)
    table = torch.arange(b * pages, dtype=torch.int32).view(b, pages)

    def run() -> tuple[Tensor, Tensor]:
        return get_backend("reference")(inputs.q, copy, table, *inputs.arguments()[3:])

    return run, run


def test_the_comparison_goes_on_after_a_peer_is_out_of_memory(
    cpu: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[weakref.ref[Tensor]] = []

    def hungry(inputs: Inputs, room: Tensor) -> tuple[Run, Run]:
        assert all(one() is None for one in taken), "what a failed case took has to be free again"
        memory = torch.empty(1000)
        taken.append(weakref.ref(memory))

        def run() -> tuple[Tensor, Tensor]:
            if len(inputs.q) == 4:
                raise torch.OutOfMemoryError(f"no room beside {len(memory)}")
            return by_reference(inputs, room)[0]()

        return run, run

    monkeypatch.setitem(PEERS, "flash_mla", stand_in("FlashMLA", hungry))
    monkeypatch.setitem(PEERS, "fa3", stand_in("FlashAttention-3", by_reference))
    cases = [RAGGED, SMALL, PACKED]
    pool = PagePool(cases, CPU, 0)
    rows = list(compare({"hopper": cpu}, ["flash_mla", "fa3"], cases, 3, pool))
    assert [dict(row.failures) for row in rows] == [{"flash_mla": "out of memory"}, {}, {}]
    assert [set(row.cold) for row in rows] == [
        {"hopper", "fa3", "fa3 planned", NOTHING},
        {"hopper", "flash_mla", "flash_mla planned", "fa3", "fa3 planned", NOTHING},
        {"hopper", NOTHING},
    ]
    for row in rows:
        assert row.cold.keys() == row.warm.keys()
        assert not row.disagreeing
        assert all(timing.samples == 3 and timing.p50_us > 0 for timing in row.cold.values())
    page = render(Comparison("hopper", "a machine", (), pool.bytes, H100), rows)
    assert "**Not measured:**\nragged q2 h3: flash_mla, out of memory" in page
    assert all(one() is None for one in taken)


def test_a_case_that_is_too_large_for_ours_is_said_and_passed_over(cpu: Backend) -> None:
    def too_large(q: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        if len(q) == 4:
            raise RuntimeError("CUDA error: out of memory")  # as a library that allocates by itself
        return cpu(q, *arguments)

    cases = [RAGGED, SMALL]
    rows = list(compare({"hopper": too_large}, [], cases, 3, PagePool(cases, CPU, 0)))
    assert [dict(row.failures) for row in rows] == [{"hopper": "out of memory"}, {}]
    assert [set(row.cold) for row in rows] == [set(), {"hopper", NOTHING}]


def test_the_command_writes_what_was_measured_before_an_error(
    cpu: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_on_ragged(inputs: Inputs, room: Tensor) -> tuple[Run, Run]:
        assert len(inputs.q) != 4, "refused by the peer"
        return by_reference(inputs, room)

    monkeypatch.setitem(PEERS, "fa3", stand_in("FlashAttention-3", broken_on_ragged))
    page, out = tmp_path / "page.md", tmp_path / "rows.jsonl"
    arguments = ["--peers", "--rounds", "3", "--pool-gib", "0.01", "--results", str(page), "--out", str(out)]
    options = parse(arguments, None)
    assert versus.measure(options, {"hopper": cpu}, ["fa3"], [SMALL], CPU, whole=True) == 0
    assert [row.case for row in read(out)[1]] == [SMALL]
    assert "| small | 1 | 4 |" in page.read_text()
    page.unlink()
    assert versus.measure(options, {"hopper": cpu}, ["fa3"], [SMALL, RAGGED, SMALL], CPU, whole=True) == 1
    assert page.read_text().count("| small | 1 | 4 |") == 2  # cold and warm
    assert [row.case for row in read(out)[1]] == [SMALL]
    said = capsys.readouterr()
    assert "stopped after 1 of 3 cases: AssertionError('refused by the peer" in said.err
    assert json.loads(said.out.splitlines()[0])["case"] == "small q1 h4"


def test_another_error_ends_the_comparison(cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> tuple[Run, Run]:
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(PEERS, "fa3", stand_in("FlashAttention-3", broken))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(compare({"hopper": cpu}, ["fa3"], [SMALL], 3, PagePool([SMALL], CPU, 0)))
