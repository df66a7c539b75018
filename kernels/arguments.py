"""What the operator accepts: a problem's description, and checks that name the argument and both values."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from kernels.reference import FP8_LATENT, FP8_TOKEN_BYTES

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_WIDTH = FP8_LATENT + 64
FP8_VIEWS = (torch.float8_e4m3fn, torch.int8)  # what flash_mla calls fp8_ds_mla's bytes, besides uint8
LARGEST_SCALE = torch.finfo(torch.float32).max  # kernels multiply by it in float32


@dataclass(frozen=True, slots=True)
class Problem:
    """The shape of a call, without its tensors: what decides whether a backend can run it."""

    device_type: str
    q_dtype: torch.dtype
    kv_dtype: torch.dtype  # torch.uint8 means fp8_ds_mla
    batch: int
    s_q: int
    h_q: int
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    causal: bool = False

    @classmethod
    def of(cls, q: Tensor, k_cache: Tensor, head_dim_v: int, causal: bool = False) -> Problem:
        """The problem of q [b, s_q, h_q, width] and k_cache [num_blocks, page_size, 1, width or 656]."""
        b, s_q, h_q, width = q.shape
        return cls(
            q.device.type,
            q.dtype,
            k_cache.dtype,
            b,
            s_q,
            h_q,
            head_dim_v,
            width - head_dim_v,
            k_cache.shape[1],
            causal,
        )


def empty_result(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Memory for out [b, s_q, h_q, head_dim_v] of q's dtype and lse [b, h_q, s_q] float32, on q's device."""
    b, s_q, h_q, _ = q.shape
    return q.new_empty(b, s_q, h_q, head_dim_v), q.new_empty(b, h_q, s_q, dtype=torch.float32)


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float | None = None,
) -> None:
    """Raise ValueError (TypeError for no tensor) naming the argument, its value and the value expected.

    Reads metadata only, never tensor contents: block indices and lengths are checked by the backend.
    """
    tensors = {"q": q, "k_cache": k_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
    check_tensors(**tensors)
    if q.dim() != 4:
        _refuse("q", f"has shape {list(q.shape)}", "4 dimensions [b, s_q, h_q, kv_lora_rank + rope]")
    if q.dtype not in FLOAT_DTYPES:
        _refuse("q", f"is {q.dtype}", "bfloat16, float16 or float32")
    b, s_q, h_q, width = q.shape
    if not s_q or not h_q:
        _refuse("q", f"has shape {list(q.shape)}", "at least one query (s_q) and one head (h_q)")
    if k_cache.dim() != 4 or k_cache.shape[2] != 1:
        _refuse(
            "k_cache", f"has shape {list(k_cache.shape)}", "[num_blocks, page_size, 1, kv_lora_rank + rope]"
        )
    if not k_cache.shape[1]:
        _refuse("k_cache", "has pages of 0 tokens", "at least 1")
    if k_cache.dtype == torch.uint8:
        if k_cache.shape[3] != FP8_TOKEN_BYTES:
            _refuse("k_cache", f"holds {k_cache.shape[3]} bytes a token", f"{FP8_TOKEN_BYTES} (fp8_ds_mla)")
        if width != FP8_WIDTH:
            _refuse("q", f"has {width} values a head", f"{FP8_WIDTH}, as an fp8_ds_mla cache has")
    elif k_cache.dtype not in FLOAT_DTYPES:
        _refuse("k_cache", f"is {k_cache.dtype}", "bfloat16, float16, float32 or uint8 (fp8_ds_mla)")
    elif k_cache.shape[3] != width:
        _refuse("k_cache", f"has {k_cache.shape[3]} values a token", f"{width}, as q has")
    if not isinstance(head_dim_v, int) or not 0 < head_dim_v <= width:
        _refuse("head_dim_v", f"is {head_dim_v}", f"1 to {width} (q's last dimension)")
    if block_table.dim() != 2 or block_table.shape[0] != b:
        _refuse(
            "block_table", f"has shape {list(block_table.shape)}", f"[{b}, max_blocks], as q has batch {b}"
        )
    if list(cache_seqlens.shape) != [b]:
        _refuse("cache_seqlens", f"has shape {list(cache_seqlens.shape)}", f"[{b}], as q has batch {b}")
    for name, tensor in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if tensor.dtype != torch.int32:
            _refuse(name, f"is {tensor.dtype}", "torch.int32")
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            _refuse(name, f"is on {tensor.device}", f"{q.device}, where q is")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            _refuse(name, f"has stride {tensor.stride(-1)} in its last dimension", "1; call .contiguous()")
    if softmax_scale is not None:
        if not isinstance(softmax_scale, Real):
            raise TypeError(f"softmax_scale is {type(softmax_scale).__name__}, expected a number")
        if not abs(softmax_scale) <= LARGEST_SCALE:
            _refuse("softmax_scale", f"is {softmax_scale}", "a finite float32")


def check_tensors(**arguments: object) -> None:
    """TypeError naming the first of `arguments` that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")


def check_contents(block_table: Tensor, cache_seqlens: Tensor, num_blocks: int, page_size: int) -> None:
    """Raise ValueError for a length or a used block index that lies outside of table and cache.

    The cpu target checks the same in C; here for kernels in Python, which would read other memory or crash.
    It waits for a GPU.
    """
    capacity = block_table.shape[1] * page_size
    bad = ((cache_seqlens < 0) | (cache_seqlens > capacity)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        expected = f"0 to {capacity} (max_blocks_per_seq * page_size)"
        _refuse(f"cache_seqlens[{row}]", f"is {int(cache_seqlens[row])}", expected)
    first_token = torch.arange(0, capacity, page_size, device=block_table.device)
    used = first_token < cache_seqlens[:, None]
    bad = (used & ((block_table < 0) | (block_table >= num_blocks))).nonzero()
    if len(bad):
        row, page = map(int, bad[0])
        expected = f"0 to {num_blocks - 1} (num_blocks - 1)"
        _refuse(f"block_table[{row}, {page}]", f"is {int(block_table[row, page])}", expected)


def _refuse(argument: str, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{argument} {found}, expected {expected}")
