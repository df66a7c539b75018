"""What a layer does between matrix products: Triton kernels of a launch each on a GPU, torch elsewhere.

On a GPU a decode step is hundreds of small kernels, whose launches cost as much as reading the weights.
"""

import functools
import importlib.util
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

TRITON_DEVICES = ["cuda"]  # a test adds "cpu", where Triton's interpreter runs the kernels


@functools.cache
def have_triton() -> bool:
    """Whether Triton is there, with the C compiler that its launchers need."""
    return importlib.util.find_spec("triton") is not None and any(
        shutil.which(name) for name in ("cc", "gcc", "clang")
    )


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`."""
    return x.device.type in TRITON_DEVICES and have_triton()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + dim/2]) of the last dimension in float32; cos and sin fit half of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, n] and what is to be added to it -> (x + delta, its norm)."""
    if on_triton(x):
        from container.serving import rows

        return rows.add_norm(x, delta, weight, eps)
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm of rows [T, n]."""
    return add_norm(x, None, weight, eps)[1]


def silu_product(x: Tensor) -> Tensor:
    """[T, 2 n] -> [T, n]: silu(first half) * second half."""
    if on_triton(x):
        from container.serving import rows

        return rows.silu_product(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def greedy(logits: Tensor) -> Tensor:
    """float32 [R, vocabulary] -> int32 [R]: the first of the largest, -1 where the largest is not finite."""
    if on_triton(logits):
        from container.serving import rows

        return rows.greedy(logits)
    largest = logits.max(dim=-1)  # a row with NaN has a NaN maximum
    return torch.where(torch.isfinite(largest.values), largest.indices, -1).int()
