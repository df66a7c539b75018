"""Memory layouts of a server's tensors: views with gaps, pages that rows share, tables wider than needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import Backend
from kernels.checks import compare
from kernels.workloads import Inputs, make_inputs
from tests.kernels.test_operator import device_of

Layout = Callable[[Inputs], dict[str, Tensor]]


def widened(tensor: Tensor, dim: int, by: int, fill: float) -> Tensor:
    """The same values as a view of memory that has `by` more of `fill` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] += by
    wide = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
    view = wide.narrow(dim, 0, tensor.shape[dim])
    view.copy_(tensor)
    return view


def swapped(tensor: Tensor, a: int, b: int) -> Tensor:
    """The same values with two dimensions exchanged in memory."""
    return tensor.transpose(a, b).contiguous().transpose(a, b)


LAYOUTS: dict[str, Layout] = {
    "heads before queries": lambda i: {"q": swapped(i.q, 1, 2)},
    "queries of two rows apart": lambda i: {"q": widened(i.q, 1, 3, float("nan"))},
    "q expanded over the batch": lambda i: {"q": i.q[:1].expand(len(i.q), -1, -1, -1)},
    "pages with a token between": lambda i: {"k_cache": widened(i.k_cache, 1, 1, float("nan"))},
    "tokens before pages": lambda i: {"k_cache": swapped(i.k_cache, 0, 1)},
    "tokens with a gap": lambda i: {"k_cache": widened(i.k_cache, 3, 64, float("nan"))},
    "table wider than needed": lambda i: {
        "block_table": torch.nn.functional.pad(i.block_table, (0, 3), value=-(2**31))
    },
    "table as a part of a wider one": lambda i: {"block_table": widened(i.block_table, 1, 5, 2**31 - 1)},
    "rows that share their pages": lambda i: {
        "block_table": i.block_table[:1].expand(len(i.q), -1),
        "cache_seqlens": i.cache_seqlens.clamp(max=int(i.cache_seqlens[0])),
    },
    "a page used twice by a row": lambda i: {
        "block_table": i.block_table[:, :1].expand(-1, 2).contiguous(),
        "cache_seqlens": torch.tensor([128, 3, 0], dtype=torch.int32, device=i.q.device),
    },
    "lengths within a longer list": lambda i: {"cache_seqlens": widened(i.cache_seqlens, 0, 4, 999)},
    "rows shorter than their queries": lambda i: {
        "cache_seqlens": torch.tensor([2, 1, 0], dtype=torch.int32, device=i.q.device)
    },
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(backend: Backend, layout: Layout, dtype: torch.dtype) -> None:
    if backend.name == "flash_mla" or (dtype == torch.float32 and backend.name in ("triton", "hopper")):
        pytest.skip("the wheel's own business, too slow in Triton's interpreter, or not taken")
    inputs = make_inputs(
        [129, 3, 64], s_q=3, h_q=3, causal=True, q_dtype=dtype, kv_dtype=dtype, device=device_of(backend)
    )
    inputs = dataclasses.replace(inputs, **layout(inputs))
    try:
        out, lse = backend(*inputs.arguments())
    except NotImplementedError as error:
        if backend.name != "hopper":
            raise
        pytest.skip(str(error))  # it refuses some layouts by name
    bound = 4 * 2.0**-9 if dtype == torch.bfloat16 else 2e-5
    # Triton's interpreter cuts float32 to bfloat16 where hardware rounds.
    result = compare("layout", inputs, out, lse, 2 * bound, 1e-3)
    assert result.passed, result
