"""Which memory a captured graph gets, with the driver's part played; test_workspace.py has the real one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels import workspace

CPU = torch.device("cpu")


class Driver:
    """Captures by number, and the graphs' destructors: what to call, with what, once a graph is gone."""

    def __init__(self) -> None:
        self.capture = 1
        self.retained: dict[int, list[tuple[int, int]]] = {}
        self._created: tuple[int, int] = (0, 0)

    def state(self, stream: int) -> tuple[int, int]:
        return self.capture, 1000 + self.capture

    def call(self, name: str, *arguments: object) -> None:
        if name == "cuUserObjectCreate":
            _, argument, function, *_ = arguments
            self._created = (function.value, argument.value)  # type: ignore[attr-defined]
        elif name == "cuGraphRetainUserObject":
            graph = arguments[0].value  # type: ignore[attr-defined]
            self.retained.setdefault(graph, []).append(self._created)

    def destroy(self, capture: int) -> None:
        for function, argument in self.retained.pop(1000 + capture):
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(workspace, "_call", driver.call)
    monkeypatch.setattr(workspace, "_capture", driver.state)
    return driver


def test_a_graph_keeps_its_memory_until_it_is_destroyed(driver: Driver) -> None:
    graphs = workspace.GraphWorkspaces()
    first = graphs.lend(CPU, 5, 1000)
    assert graphs.lend(CPU, 5, 900) is first  # another layer of the same graph
    assert graphs.lend(CPU, 6, 900) is not first  # a stream that runs beside it
    driver.capture = 2
    second = graphs.lend(CPU, 5, 1000)
    assert len({id(memory) for memory in (first, second)}) == 2
    assert len(graphs) == 3
    driver.destroy(1)
    driver.capture = 3
    again = [graphs.lend(CPU, stream, 900) for stream in (5, 6, 7)]
    assert any(memory is first for memory in again)
    assert all(memory is not second for memory in again)
    assert len(graphs) == 4


def test_a_larger_call_of_a_graph_gets_other_memory(driver: Driver) -> None:
    graphs = workspace.GraphWorkspaces()
    small, large = graphs.lend(CPU, 5, 1000), graphs.lend(CPU, 5, 100_000)
    assert not workspace.fits(small, 100_000)
    assert workspace.fits(large, 100_000)
    assert graphs.lend(CPU, 5, 100_000) is large
    assert len(driver.retained[1001]) == 2


def test_the_address_is_aligned_and_has_room() -> None:
    memory = workspace.zeroed(CPU, 5000)
    address = workspace.aligned(memory)
    assert address % workspace.ALIGN == 0
    assert memory.data_ptr() <= address
    assert address + 5000 <= memory.data_ptr() + memory.numel()
