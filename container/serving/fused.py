"""Element-wise operations between matrix products: one generated kernel each on a GPU, torch on a CPU.

On a GPU a decode step of one token is hundreds of tiny kernels, whose launches cost as much as reading the
weights; torch.compile turns each function here into one or two.
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def can_compile() -> bool:
    """Whether the C compiler that generated kernels need for their launchers is there."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` for GPU tensors, for any number of rows; leaves it as it is on a CPU."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Any:
        return (compiled if first.is_cuda and can_compile() else function)(first, *rest)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + dim/2]) of the last dimension in float32; cos and sin fit half of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@fused
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm as one kernel."""
    return rms_norm(x, weight, eps)


@fused
def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)"""
    total = x + delta
    return total, rms_norm(total, weight, eps)


@fused
def cache_row(latent: Tensor, rope: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """What the cache holds for a token: the normed latent, then the rotated key. -> [T, rank + rope]"""
    return torch.cat((rms_norm(latent, weight, eps), rotate(rope, cos, sin)), dim=-1)


@fused
def absorbed_query(latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, rank] and [T, heads, rope] -> [T, heads, rank + rope], rope rotated."""
    return torch.cat((latent, rotate(rope, cos[:, None], sin[:, None])), dim=-1)


@fused
def silu_product(x: Tensor) -> Tensor:
    """[T, 2 n] -> [T, n]: silu(first half) * second half."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
