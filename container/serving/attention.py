"""The decode attention of the engine: one backend of the `kernels` package, chosen once, and its cache format."""

from pathlib import Path

import torch
from torch import Tensor

from container.serving.checkpoint import ModelConfig
from kernels.reference import (
    FP8_LATENT,
    FP8_TOKEN_BYTES,
    dequantize_fp8_ds_mla,
    mla_decode_absorbed,
    quantize_fp8_ds_mla,
)

FP8 = "fp8_ds_mla"


class DecodeAttention:
    """softmax(scale * q . latents) . latents for rows of one query token over a paged latent cache.

    Knows how a token is stored: `row_width` elements of `cache_dtype`, written by `pack` and read by `unpack`.
    Raises ValueError when the backend or the cache format cannot take the model's sizes.
    """

    def __init__(
        self, backend: str, kernel_dir: Path | None, device: torch.device, config: ModelConfig, cache: str
    ):
        self._rank, self._scale = config.kv_lora_rank, config.softmax_scale
        self.fp8 = cache == FP8
        if self.fp8 and (config.kv_lora_rank, config.qk_rope_head_dim) != (FP8_LATENT, 64):
            raise ValueError(
                f"a {FP8} cache holds {FP8_LATENT} latents and 64 rope values, this model has "
                f"{config.kv_lora_rank} and {config.qk_rope_head_dim}; use bfloat16"
            )
        self.cache_dtype = torch.uint8 if self.fp8 else getattr(torch, cache)
        self.row_width = FP8_TOKEN_BYTES if self.fp8 else config.latent_dim
        self.name = "reference"

    def pack(self, latents: Tensor) -> Tensor:
        """[T, rank + rope] of the model's dtype -> [T, row_width] of cache_dtype."""
        return quantize_fp8_ds_mla(latents) if self.fp8 else latents.to(self.cache_dtype)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, row_width] of cache_dtype -> [T, rank + rope] in `dtype`."""
        return dequantize_fp8_ds_mla(rows, dtype) if self.fp8 else rows.to(dtype)

    def __call__(self, q: Tensor, k_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        """q [n, heads, rank + rope], k_cache [pages, 64, 1, row_width], block_table int32 [n, pages a row],
        lengths int32 [n] -> [n, heads, rank] in q's dtype"""
        out, _ = mla_decode_absorbed(
            q[:, None], k_cache, block_table, lengths, self._rank, self._scale, compute_dtype=torch.float32
        )
        return out[:, 0]
