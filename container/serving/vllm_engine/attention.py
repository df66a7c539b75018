"""Our kernel as vLLM's MLA decode backend; vLLM 0.23.0's flashmla.py is the model. Only vLLM imports this.

Prefill, the cache's writes and the absorbed projections stay vLLM's: MLACommonImpl has them. The decode
metadata are the block table and the lengths, which vLLM keeps at fixed addresses and pads with empty rows, so
a captured CUDA graph replays on them as they are; the kernel computes its own schedule in every run.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, AttentionType, MultipleOf

from container.serving.attention import PAGE
from container.serving.vllm_engine.decode import decode
from container.serving.vllm_engine.plugin import kernel_backend
from kernels import Backend, Problem

ROPE = 64  # every DeepSeek model's; vLLM asks with the sum of both sizes


@functools.cache
def process_backend() -> Backend:
    """This process's kernel; all layers share it."""
    return kernel_backend()


class MlaKernelBackend(MLACommonBackend):
    """What the kernel can do, in vLLM's terms."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [PAGE]

    @staticmethod
    def get_builder_cls() -> type[MlaKernelMetadataBuilder]:
        return MlaKernelMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[MlaKernelImpl]:
        return MlaKernelImpl

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        """The kernel's own reason, None when it runs the sizes: vLLM shows it beside the setting's name."""
        return process_backend().unsupported(_problem(dtype, 1, head_size - ROPE, ROPE))


class MlaKernelMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    """MLACommon's metadata: block table and lengths. Decode takes equally many queries of each."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM


class MlaKernelImpl(MLACommonImpl[MLACommonMetadata]):
    """Decode attention of one layer."""

    can_return_lse_for_decode: bool = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = {name: kwargs.get(name) for name in ("alibi_slopes", "sliding_window", "logits_soft_cap")}
        if extra := [name for name, value in given.items() if value]:
            raise NotImplementedError(f"the MLA kernel has no {', '.join(extra)}")
        if kwargs.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            raise NotImplementedError(f"the MLA kernel is for decoders, got {kwargs['attn_type']}")
        self._kernel = process_backend()
        problem = _problem(
            torch.get_default_dtype(), self.num_heads, self.kv_lora_rank, self.qk_rope_head_dim
        )
        if reason := self._kernel.unsupported(problem):
            raise NotImplementedError(
                f"backend {self._kernel.name} cannot decode this model: {reason}; use engine: native"
            )

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[Tensor, Tensor | None]:
        """q [tokens, heads, rank + rope] or its parts -> out [tokens, heads, rank], lse [tokens, heads]."""
        metadata = attn_metadata.decode
        assert metadata is not None  # vLLM calls this for decode tokens only
        return decode(
            self._kernel,
            q,
            kv_c_and_k_pe_cache,
            metadata.block_table,
            metadata.seq_lens,
            self.kv_lora_rank,
            self.scale,
        )


def _problem(dtype: torch.dtype, heads: int, rank: int, rope: int) -> Problem:
    return Problem("cuda", dtype, dtype, 1, 1, heads, rank, rope, PAGE)
