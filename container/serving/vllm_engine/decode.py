"""vLLM's arguments of an MLA decode step, turned into the operator's."""

import torch
from torch import Tensor

from kernels import Backend


def decode(
    backend: Backend,
    q: Tensor | tuple[Tensor, Tensor],
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of `tokens` new queries of `n` requests, each with equally many, over the paged cache.

    q [tokens, heads, kv_lora_rank + rope], or its two parts; a request's queries stand together, in order.
    kv_cache [blocks, page, kv_lora_rank + rope]; block_table int32 [n, blocks a request]; seq_lens int32 [n]
    counts the new tokens, too. A row that pads a batch to its CUDA graph's size has length 0.

    Returns out [tokens, heads, kv_lora_rank] in q's dtype and lse [tokens, heads] float32 (natural
    logarithm); a padding row's are 0 and +inf. Nothing is read on the host, so a CUDA graph can capture it.
    """
    if isinstance(q, tuple):
        q = torch.cat(q, dim=-1)
    tokens, heads, width = q.shape
    requests = block_table.shape[0]
    if tokens % requests:
        raise ValueError(
            f"q holds {tokens} tokens of {requests} requests, expected equally many of each: "
            "vLLM's metadata builder must split off prefills"
        )
    new = tokens // requests
    out, lse = backend(
        q.view(requests, new, heads, width),
        kv_cache.unsqueeze(2),
        block_table,
        seq_lens,
        kv_lora_rank,
        softmax_scale,
        new > 1,
    )
    return out.view(tokens, heads, kv_lora_rank), lse.transpose(1, 2).reshape(tokens, heads)
