"""A whole decode step of one token on a GPU, in seven kernels a layer and the attention's own.

The same arithmetic as model.py and layers.py with their weights; what is a kernel of its own there is the
prologue or epilogue of a product here.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from container.serving.batch import Batch
from container.serving.cache import LatentCache
from container.serving.gemv import chosen_experts, head_values, linear, linear_and_router
from container.serving.layers import LATENT_NORM_EPS, Attention, Mlp
from container.serving.rows import attention_input

if TYPE_CHECKING:
    from container.serving.model import Layer, Model


def decode_one_token(model: "Model", x: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
    """x [1, hidden], the token's embedding -> float32 logits [1, vocabulary]; stores the token's latents."""
    delta = None
    for layer in model.layers:
        mixed, x = linear(x, layer.attention.w_in, delta=delta, norm=layer.attention_norm, eps=layer.eps)
        delta = _attend(layer.attention, mixed, batch, cache)
        x, delta = _feed_forward(layer, x, delta)
    eps = model.config.rms_norm_eps
    return linear(x, model.head, delta=delta, norm=model.norm, eps=eps, out_dtype=torch.float32)[0]


def _attend(attention: Attention, mixed: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
    c = attention.config
    query, latent = mixed.split(attention.split, dim=-1)
    if c.q_lora_rank:
        query, _ = linear(query, attention.w_q, norm=attention.q_norm, eps=LATENT_NORM_EPS)
    q = mixed.new_empty(1, c.num_attention_heads, c.latent_dim)
    with cache.target(attention.layer, batch.slots, latent) as (rows, slots):
        attention_input(
            query, latent, attention.kv_norm, attention.w_kv, batch.cos, batch.sin, rows, slots, q,
            LATENT_NORM_EPS, absorb=True,
        )  # fmt: skip
    out = cache.attend(attention.layer, q, batch.rows.block_table, batch.rows.lengths)
    values = head_values(out, attention.w_kv, c.qk_nope_head_dim, mixed.dtype)
    return linear(values, attention.w_out)[0]


def _feed_forward(layer: "Layer", x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with `delta` added, and what the feed-forward adds to it."""
    mlp = layer.mlp
    if isinstance(mlp, Mlp):
        inner, x = linear(x, mlp.w_in, delta=delta, norm=layer.mlp_norm, eps=layer.eps, gated=True)
        return x, linear(inner, mlp.w_out)[0]
    assert mlp.shared is not None
    inner, x, logits, normed = linear_and_router(
        x, mlp.shared.w_in, delta, layer.mlp_norm, layer.eps, mlp.router
    )
    shares, experts = mlp.choose(logits)
    return x, chosen_experts(normed, mlp.w_in, mlp.w_out, experts, shares, inner, mlp.shared.w_out)
