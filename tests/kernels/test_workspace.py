"""On a Hopper GPU: what a compiled target counts in its workspace holds in CUDA graphs and across streams."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import kernels.custom_op  # noqa: F401
from kernels import Backend, get_backend
from kernels.workloads import Inputs, make_inputs
from kernels.workspace import graph_workspaces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]


@pytest.fixture(scope="module")
def hopper() -> Backend:
    return get_backend("hopper")


def inputs_of(rows: int) -> Inputs:
    return make_inputs([3000, 70, 0, 1] * (rows // 4), h_q=16, device="cuda", seed=rows)


def captured(
    run: Callable[[], object], pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result


def test_each_graph_of_a_pool_runs_by_itself(hopper: Backend) -> None:
    """Only the last graph is replayed, in memory that holds no zeros."""
    pool = torch.cuda.graph_pool_handle()
    filled, _ = captured(lambda: torch.full((256 << 20,), 0xFF, dtype=torch.uint8, device="cuda").sum(), pool)
    filled.replay()
    torch.cuda.synchronize()
    cases = [inputs_of(rows) for rows in (16, 8, 4)]
    expected = [hopper(*case.arguments()) for case in cases]
    graphs = [captured(lambda case=case: hopper(*case.arguments()), pool) for case in cases]
    for number in (2, 1, 0, 2, 2):
        graph, result = graphs[number]
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(result, expected[number], strict=True))


def test_graphs_and_calls_of_one_thread_at_the_same_time(hopper: Backend) -> None:
    one, other = inputs_of(8), inputs_of(16)
    expected = hopper(*one.arguments()), hopper(*other.arguments())
    graph, result = captured(lambda: hopper(*one.arguments()))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        for stream in streams[1:]:
            with torch.cuda.stream(stream):
                called = hopper(*other.arguments())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(result, expected[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(called, expected[1], strict=True))


def test_graphs_give_their_workspaces_back(hopper: Backend) -> None:
    case = inputs_of(8)
    hopper(*case.arguments())
    graph, _ = captured(lambda: hopper(*case.arguments()))
    most = len(graph_workspaces)
    for _ in range(8):
        graph.replay()
        torch.cuda.synchronize()
        del graph
        time.sleep(0.05)  # a thread of the driver gives them back
        graph, result = captured(lambda: hopper(*case.arguments()))
    graph.replay()
    torch.cuda.synchronize()
    assert len(graph_workspaces) == most
    assert all(torch.equal(a, b) for a, b in zip(result, hopper(*case.arguments()), strict=True))


@pytest.mark.parametrize("backend", ["hopper", "auto"])
def test_graphs_that_torch_compile_captures(backend: str) -> None:
    """The custom op under torch.compile's graph trees, which count what is left in their pool."""
    case = inputs_of(8)

    def layer(q: Tensor) -> Tensor:
        out, _ = torch.ops.mla.decode(q * 2, *case.arguments()[1:], backend)
        return out.float().sum(-1)

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for factor in (1.0, 0.5, 2.0, 0.1):  # a first run, the capture, replays
        q = case.q * factor
        torch.testing.assert_close(compiled(q).clone(), layer(q), rtol=1e-2, atol=1e-2)


def test_a_static_cache_is_read_where_it_is(hopper: Backend) -> None:
    """Two graphs of a tree in turn, on a cache that a server writes between the replays."""
    cases = [inputs_of(8), inputs_of(16)]
    pages = torch.randn(cases[1].k_cache.shape, device="cuda").bfloat16()
    cache = pages.clone()
    torch._dynamo.mark_static_address(cache)

    @torch.compile(fullgraph=True, mode="reduce-overhead", dynamic=False)
    def layer(q: Tensor, k_cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        out, _ = torch.ops.mla.decode(q * 2, k_cache, table, lengths, 512, 0.1, False, "hopper")
        return out.float()

    for number in range(4):
        cache.copy_(pages * (number + 1))
        for case in cases:
            found = layer(case.q, cache, case.block_table, case.cache_seqlens).clone()
            expected, _ = hopper(case.q * 2, cache, case.block_table, case.cache_seqlens, 512, 0.1, False)
            assert torch.equal(found, expected.float())


def test_a_thread_that_does_nothing_else(hopper: Backend) -> None:
    case = inputs_of(8)
    expected = hopper(*case.arguments())
    with ThreadPoolExecutor(1) as other:
        found = other.submit(hopper, *case.arguments()).result()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_row_count_that_grows(hopper: Backend) -> None:
    for rows in (4, 64, 8, 128):
        case = inputs_of(rows)
        first, second = hopper(*case.arguments()), hopper(*case.arguments())
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.isfinite(first[0]).all()
