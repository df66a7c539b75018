"""The decode attention of the engine: one backend of `kernels`, chosen once, and the cache's format."""

from pathlib import Path

import torch
from torch import Tensor

from container.serving.checkpoint import ModelConfig
from kernels import Backend, BackendError, Problem, get_backend
from kernels.auto import AutoBackend
from kernels.reference import FP8_LATENT, FP8_TOKEN_BYTES, dequantize_fp8_ds_mla, quantize_fp8_ds_mla

FP8 = "fp8_ds_mla"
PAGE = 64  # tokens a page; the page size of every backend
SAMPLE_PAGES = 16  # context that `auto` measures with


class DecodeAttention:
    """softmax(scale * q . latents) . latents for rows of one query token over a paged cache of latents.

    Knows how a token is stored: `row_width` elements of `cache_dtype`, written by `pack` and read by
    `unpack`. Raises ValueError when the cache format cannot take the model's sizes, BackendError when the
    backend cannot be had or cannot run the model.
    """

    def __init__(
        self,
        backend: str,
        kernel_dir: Path | None,
        device: torch.device,
        config: ModelConfig,
        dtype: torch.dtype,
        cache: str,
    ):
        self._rank, self._scale = config.kv_lora_rank, config.softmax_scale
        self.fp8 = cache == FP8
        if self.fp8 and (config.kv_lora_rank, config.qk_rope_head_dim) != (FP8_LATENT, 64):
            raise ValueError(
                f"a {FP8} cache holds {FP8_LATENT} latents and 64 rope values, this model has "
                f"{config.kv_lora_rank} and {config.qk_rope_head_dim}; use bfloat16"
            )
        self.cache_dtype = torch.uint8 if self.fp8 else getattr(torch, cache)
        self.latent_dim = config.latent_dim
        self.row_width = FP8_TOKEN_BYTES if self.fp8 else config.latent_dim
        self._backend, self._q_dtype = self._choose(get_backend(backend, kernel_dir), device, config, dtype)
        self.name = self._backend.name

    def _choose(
        self, backend: Backend, device: torch.device, config: ModelConfig, dtype: torch.dtype
    ) -> tuple[Backend, torch.dtype]:
        """The backend, `auto` resolved by measuring once here, and the query dtype that it takes."""
        reasons = []
        # the model's own dtype first; a kernel that wants 16-bit queries gets them rounded
        for q_dtype in dict.fromkeys((dtype, torch.bfloat16)):
            q = torch.randn(1, 1, config.num_attention_heads, config.latent_dim, device=device).to(q_dtype)
            latents = torch.randn((SAMPLE_PAGES + 1) * PAGE, config.latent_dim, device=device)
            k_cache = self.pack(latents).view(-1, PAGE, 1, self.row_width)
            if reason := backend.unsupported(Problem.of(q, k_cache, self._rank)):
                reasons.append(reason)
                continue
            if not isinstance(backend, AutoBackend):
                return backend, q_dtype
            pages = torch.arange(1, SAMPLE_PAGES + 1, dtype=torch.int32, device=device)[None]
            lengths = torch.tensor([SAMPLE_PAGES * PAGE - 1], dtype=torch.int32, device=device)
            return backend.choose(q, k_cache, pages, lengths, self._rank, self._scale, False), q_dtype
        raise BackendError(f"backend {backend.name!r} cannot decode this model: {'; '.join(reasons)}")

    def pack(self, latents: Tensor) -> Tensor:
        """[T, rank + rope] of the model's dtype -> [T, row_width] of cache_dtype."""
        return quantize_fp8_ds_mla(latents) if self.fp8 else latents.to(self.cache_dtype)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, row_width] of cache_dtype -> [T, rank + rope] in `dtype`."""
        return dequantize_fp8_ds_mla(rows, dtype) if self.fp8 else rows.to(dtype)

    def __call__(self, q: Tensor, k_cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        """q [n, heads, rank + rope], k_cache [pages, 64, 1, row_width], block_table int32 [n, pages a row],
        lengths int32 [n] -> [n, heads, rank] in the backend's dtype of queries"""
        q = q.to(self._q_dtype)[:, None]
        out, _ = self._backend(q, k_cache, block_table, lengths, self._rank, self._scale, False)
        return out[:, 0]
