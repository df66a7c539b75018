"""Scratch memory of compiled targets: one a thread, device and stream, and others for CUDA graphs.

A GPU target counts in the first COUNTER_BYTES, from 0 and back to 0 with every run (csrc/mla_decode.h): they
are zeroed once, when the memory is taken, so that a graph holds the kernel alone. Memory is taken by a thread
and on a stream of its own: what a capture's stream allocates, and under torch.compile's graph trees what the
thread allocates on any stream, belongs to the graphs' pool, which may hand it to another graph.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGN = 256
COUNTER_BYTES = 4096
_SEMAPHORE_BYTES = 64  # at least sizeof(sem_t)
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
_MOVE = 1  # CU_GRAPH_USER_OBJECT_MOVE


class Workspaces:
    """The workspaces of one thread outside of graphs: two runs at a time may not share one."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int | None], Tensor] = {}

    def address(self, device: torch.device, stream: int | None, size: int) -> int:
        """An aligned address with `size` bytes behind it for the next run.

        `device` is the current one and `stream` its current stream; None on a CPU.
        """
        if stream is not None and torch.cuda.is_current_stream_capturing():
            return aligned(graph_workspaces.lend(device, stream, size))
        kept = self._kept.get((device, stream))
        if kept is None or not fits(kept, size):
            kept = self._kept[device, stream] = zeroed(device, size)
            if stream is not None:  # a run may still use it when it is outgrown or the thread ends
                kept.record_stream(torch.cuda.current_stream(device))
        return aligned(kept)


@dataclass
class _Lent:
    """Memory that a graph uses from its capture until the driver, done with the graph, posts `returned`."""

    memory: Tensor
    owner: tuple[int, int] = (0, 0)  # capture and stream
    returned: int = field(default_factory=lambda: _semaphore())

    def is_back(self) -> bool:
        """Whether the graph that had it is gone; true once for each time it was lent."""
        return _libc().sem_trywait(ctypes.c_void_p(self.returned)) == 0

    def lend(self, owner: tuple[int, int], graph: int) -> None:
        """Give it to the graph under capture, for as long as that or an instance of it lives."""
        user_object = ctypes.c_void_p()
        post = ctypes.cast(_libc().sem_post, ctypes.c_void_p)
        _call(
            "cuUserObjectCreate", ctypes.byref(user_object), ctypes.c_void_p(self.returned), post, 1,
            _NO_DESTRUCTOR_SYNC,
        )  # fmt: skip
        _call("cuGraphRetainUserObject", ctypes.c_void_p(graph), user_object, 1, _MOVE)
        self.owner = owner


class GraphWorkspaces:
    """Workspaces of captured graphs, of all threads: a graph keeps its own until it is destroyed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lent: list[_Lent] = []

    def __len__(self) -> int:
        return len(self._lent)

    def lend(self, device: torch.device, stream: int, size: int) -> Tensor:
        """Memory for the capture under way on `stream`, the same one for all of its calls."""
        capture, graph = _capture(stream)
        with self._lock:
            usable = [lent for lent in self._lent if lent.memory.device == device and fits(lent.memory, size)]
            for lent in usable:
                if lent.owner == (capture, stream):
                    return lent.memory
            found = next((lent for lent in usable if lent.is_back()), None)
            if found is None:
                found = _Lent(zeroed(device, size))
                self._lent.append(found)
            found.lend((capture, stream), graph)
            return found.memory


graph_workspaces = GraphWorkspaces()


def fits(memory: Tensor, size: int) -> bool:
    """Whether `size` bytes lie behind the aligned address."""
    return memory.numel() >= size + ALIGN


def aligned(memory: Tensor) -> int:
    """The address in memory of `zeroed` that a library is given."""
    base = memory.data_ptr()
    return base + -base % ALIGN


def zeroed(device: torch.device, size: int) -> Tensor:
    """Memory that `fits` size bytes, the counters zero now, whatever is being captured."""
    if device.type == "cpu":
        return torch.empty(size + ALIGN, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as other:
        return other.submit(_zeroed_on_gpu, device, size).result()


def _zeroed_on_gpu(device: torch.device, size: int) -> Tensor:
    """For a thread of its own, which ends with the capture mode that it leaves."""
    # while another thread captures, allocating and waiting are refused unless this one's mode is relaxed
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))
    stream = _own_stream(device)
    with torch.cuda.stream(stream):
        memory = torch.empty(size + ALIGN, dtype=torch.uint8, device=device)
        memory[: COUNTER_BYTES + ALIGN].zero_()
        stream.synchronize()
    return memory


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is none of torch's pool, whose streams come round and may be under capture."""
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device.index)  # a new thread has none
    _call("cuCtxSetCurrent", context)
    _call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
    return torch.cuda.ExternalStream(stream.value, device)


def _capture(stream: int) -> tuple[int, int]:
    """The number and the graph that the driver gave to the capture on `stream`; torch does not tell them."""
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    _call(
        "cuStreamGetCaptureInfo_v2", ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number),
        ctypes.byref(graph), None, None,
    )  # fmt: skip
    return number.value, graph.value or 0


def _semaphore() -> int:
    """A semaphore at 0, by address; never freed, as the driver may post it when the process ends."""
    libc = _libc()
    address = int(libc.calloc(1, _SEMAPHORE_BYTES))
    libc.sem_init(ctypes.c_void_p(address), 0, 0)
    return address


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with CUresult {code}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    return libc
