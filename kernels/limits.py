"""What a machine does at most: bytes read and operations of a matrix product, measured with large inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.timing import one_call_us

REPEATS = 15
# A side of the square matrices: large enough to fill a GPU, small enough for a CPU to be done at once.
SIDE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class Limits:
    """Rates of one machine, a microsecond each."""

    bytes_per_us: float
    operations_per_us: float


H100 = Limits(2.75e6, 788e6)  # of one SXM card, for estimates without one


def measured(memory: Tensor) -> Limits:
    """Limits of the device that holds `memory`, whose bytes are read; it has to exceed the caches by far."""
    return Limits(read_bytes_per_us(memory), operations_per_us(memory.device))


def read_bytes_per_us(memory: Tensor) -> float:
    """Bytes a microsecond at which `memory` is summed as float32, the best of REPEATS."""
    whole = memory.flatten().view(torch.uint8)
    values = whole[: whole.numel() // 4 * 4].view(torch.float32)
    best = min(one_call_us(values.sum, memory.device) for _ in range(REPEATS))
    return values.numel() * values.itemsize / best


def operations_per_us(device: torch.device) -> float:
    """Multiplications and additions a microsecond of a bfloat16 matrix product, the best of REPEATS."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    best = min(one_call_us(lambda: a @ b, device) for _ in range(REPEATS))
    return 2 * side**3 / best
