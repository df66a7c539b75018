"""Scratch memory of compiled targets: one a device and stream, and one for every CUDA graph under capture.

A GPU target counts in the first COUNTER_BYTES, from 0 and back to 0 with every run (csrc/mla_decode.h), so
they are zeroed when the memory is taken. Inside a capture the memory comes from the graph's own pool and its
zeroing is a part of that graph only: another graph may not run in it, nor a call outside of graphs.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

ALIGN = 256
COUNTER_BYTES = 4096


class Workspaces:
    """The workspaces of one thread: two runs at a time may not share one, nor may two graphs."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int | None], Tensor] = {}
        self._captured: dict[tuple[torch.device, int | None], tuple[int, Tensor]] = {}

    def address(self, device: torch.device, stream: int | None, size: int) -> int:
        """An aligned address with `size` bytes behind it for the next run on `stream` (None: on a CPU)."""
        capture = capture_id(stream) if stream is not None else 0
        key = (device, stream)
        if capture:
            owner, workspace = self._captured.get(key, (0, None))
            if owner != capture or workspace is None or workspace.numel() < size + ALIGN:
                # The one it replaces goes back to the graph's pool: later parts of that graph may take it.
                workspace = zeroed(device, size)
                self._captured[key] = capture, workspace
        else:
            self._captured.pop(key, None)
            workspace = self._kept.get(key)
            if workspace is None or workspace.numel() < size + ALIGN:
                workspace = self._kept[key] = zeroed(device, size)
        return aligned(workspace)


def capture_id(stream: int) -> int:
    """The CUDA driver's number of the capture under way on `stream`, 0 for none; torch does not tell it."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    code = _driver().cuStreamGetCaptureInfo(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number)
    )
    if code:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUresult {code}")
    return number.value if status.value else 0


def zeroed(device: torch.device, size: int) -> Tensor:
    """Memory for `size` bytes from its aligned address on, the counters zero."""
    workspace = torch.empty(size + ALIGN, dtype=torch.uint8, device=device)
    workspace[: COUNTER_BYTES + ALIGN].zero_()
    return workspace


def aligned(workspace: Tensor) -> int:
    """The address in memory of `zeroed` that a library is given."""
    base = workspace.data_ptr()
    return base + -base % ALIGN


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
