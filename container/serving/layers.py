"""The layers of a DeepSeek-V2/V3 model on flat rows of tokens [T, hidden]; a class holds weights only.

The arithmetic follows transformers' models/deepseek_v2 and deepseek_v3 (Apache-2.0), which the tests
compare with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from container.serving.batch import Batch
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.fused import norm, on_triton, rms_norm, rotate, silu_product
from container.serving.rope import Rope
from container.serving.weights import Loader

LATENT_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm do not take rms_norm_eps


def rotary_table(rope: Rope, dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, dim / 2], of the rotary embedding with YaRN's scaling if configured.

    YaRN (arXiv 2309.00071) keeps high frequencies, divides low ones by `factor` and blends linearly between
    the dimensions that turn beta_fast and beta_slow times over the original context.
    """
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    frequencies = 1.0 / powers
    if rope.kind == "yarn":

        def dimension_of(turns: float) -> float:
            return (
                dim
                * math.log(rope.original_max_positions / (turns * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        stretched = ramp.clamp(0, 1)
        frequencies = frequencies * (1 - stretched) + stretched / (rope.factor * powers)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * rope.embedding_scale, angles.sin() * rope.embedding_scale


class Attention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) over the paged latent cache.

    A decoded token attends in the absorbed form: W_UK is folded into the query and W_UV into the output, so
    that the kernel reads only latents. A prefilled chunk expands the latents once into keys and values for
    all its tokens, which costs fewer operations from a few tokens on.
    """

    def __init__(self, config: ModelConfig, layer: int, load: Loader):
        c, self.config, self.layer = config, config, layer
        prefix = f"model.layers.{layer}.self_attn."
        heads, hidden = c.num_attention_heads, c.hidden_size
        query_width = c.q_lora_rank or heads * c.qk_head_dim
        query = "q_a_proj" if c.q_lora_rank else "q_proj"
        # the query's and the latent's projections read the same input: one matrix, one pass
        self.split = (query_width, c.latent_dim)
        parts = ((query, query_width), ("kv_a_proj_with_mqa", c.latent_dim))
        self.w_in = load.joined(*((f"{prefix}{n}.weight", (rows, hidden)) for n, rows in parts))
        self.b_in = None
        if c.attention_bias:
            biases = [load.optional(f"{prefix}{n}.bias", rows) for n, rows in parts]
            filled = [
                self.w_in.new_zeros(r) if b is None else b for b, (_, r) in zip(biases, parts, strict=True)
            ]
            self.b_in = torch.cat(filled)
        self.kv_norm = load.one(prefix + "kv_a_layernorm.weight", c.kv_lora_rank)
        if c.q_lora_rank:
            self.q_norm = load.one(prefix + "q_a_layernorm.weight", c.q_lora_rank)
            self.w_q = load.one(prefix + "q_b_proj.weight", heads * c.qk_head_dim, c.q_lora_rank)
        kv_width = c.qk_nope_head_dim + c.v_head_dim
        self.w_kv = load.one(prefix + "kv_b_proj.weight", heads * kv_width, c.kv_lora_rank)
        per_head = self.w_kv.view(heads, kv_width, c.kv_lora_rank)
        self.w_uk = per_head[:, : c.qk_nope_head_dim]  # [heads, nope, rank]
        self.w_uv = per_head[:, c.qk_nope_head_dim :].transpose(1, 2)  # [heads, rank, v]
        self.w_out = load.one(prefix + "o_proj.weight", hidden, heads * c.v_head_dim)
        self.b_out = load.optional(prefix + "o_proj.bias", hidden) if c.attention_bias else None
        if c.rope_interleave:
            self._pair_halves()

    def _pair_halves(self) -> None:
        """Reorders the rope rows once, from pairs (0, 1), (2, 3), ... to halves; no score depends on it."""
        c = self.config
        order = torch.arange(c.qk_rope_head_dim, device=self.w_in.device).view(-1, 2).T.flatten()
        for tensor in (self.w_in, self.b_in):
            if tensor is not None:
                rope = tensor[-c.qk_rope_head_dim :]
                rope.copy_(rope[order].clone())
        if c.q_lora_rank:
            self.w_q = self.w_q.clone()
            query = self.w_q
        else:
            query = self.w_in[: self.split[0]]
        rope = query.view(c.num_attention_heads, c.qk_head_dim, -1)[:, c.qk_nope_head_dim :]
        rope.copy_(rope[:, order].clone())
        if not c.q_lora_rank and self.b_in is not None:
            rope = self.b_in[: self.split[0]].view(c.num_attention_heads, -1)[:, c.qk_nope_head_dim :]
            rope.copy_(rope[:, order].clone())

    def __call__(self, x: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        """x [T, hidden] -> [T, hidden]; stores the T tokens' latents in the cache before attending."""
        c = self.config
        query, latent = F.linear(x, self.w_in, self.b_in).split(self.split, dim=-1)
        if c.q_lora_rank:
            query = F.linear(norm(query, self.q_norm, LATENT_NORM_EPS), self.w_q)
        q = self._store(query, latent, batch, cache)
        query = query.view(-1, c.num_attention_heads, c.qk_head_dim)[..., : c.qk_nope_head_dim]

        n = batch.rows.count
        if n == x.shape[0]:
            out = self._decode(query, q, batch, cache)
        else:
            out = x.new_empty(x.shape[0], c.num_attention_heads, c.v_head_dim)
            if n:
                out[:n] = self._decode(query[:n], q[:n], batch, cache)
            for chunk in batch.chunks:
                part = slice(chunk.start, chunk.end)
                latents = cache.read(self.layer, chunk.pages, chunk.length, x.dtype)
                out[part] = self._prefill(query[part], q[part, :, c.kv_lora_rank :], latents)
        return F.linear(out.flatten(1), self.w_out, self.b_out)

    def _store(self, query: Tensor, latent: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        """Rotates and norms what the cache holds and stores it. -> the queries [T, heads, rank + rope] of the
        absorbed form, whose rotated part is set and whose first `rank` values are not."""
        c, rank = self.config, self.config.kv_lora_rank
        q = query.new_empty(query.shape[0], c.num_attention_heads, c.latent_dim)
        if on_triton(query):
            from container.serving.rows import attention_input

            with cache.target(self.layer, batch.slots, latent) as (rows, slots):
                attention_input(
                    query, latent, self.kv_norm, self.w_kv, batch.cos, batch.sin, rows, slots, q,
                    LATENT_NORM_EPS, absorb=False,
                )  # fmt: skip
            return q
        normed = rms_norm(latent[:, :rank], self.kv_norm, LATENT_NORM_EPS)
        rotated = rotate(latent[:, rank:], batch.cos, batch.sin)
        cache.write(self.layer, batch.slots, torch.cat((normed, rotated), dim=-1))
        q_rope = query.view(-1, c.num_attention_heads, c.qk_head_dim)[..., c.qk_nope_head_dim :]
        q[..., rank:] = rotate(q_rope, batch.cos[:, None], batch.sin[:, None])
        return q

    def _decode(self, q_nope: Tensor, q: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        """q_nope [n, heads, nope], q as `_store` gives it -> [n, heads, v]; row i sees lengths[i] tokens."""
        absorbed = q[..., : self.config.kv_lora_rank].transpose(0, 1)
        torch.bmm(q_nope.transpose(0, 1), self.w_uk, out=absorbed)
        out = cache.attend(self.layer, q, batch.rows.block_table, batch.rows.lengths).to(q.dtype)
        values = q.new_empty(q.shape[0], q.shape[1], self.config.v_head_dim)
        torch.bmm(out.transpose(0, 1), self.w_uv, out=values.transpose(0, 1))
        return values

    def _prefill(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor) -> Tensor:
        """Queries are the last n of the S tokens in `latents` [S, rank + rope]; causal. -> [n, heads, v]"""
        c = self.config
        n, total = q_nope.shape[0], latents.shape[0]
        latent, k_rope = latents.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        expanded = F.linear(latent, self.w_kv).view(total, c.num_attention_heads, -1)
        k_nope, v = expanded.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, c.num_attention_heads, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        mask = None
        if n != total:
            ahead = (
                torch.arange(total, device=q.device)
                - torch.arange(total - n, total, device=q.device)[:, None]
            )
            mask = ahead <= 0
        if c.v_head_dim < c.qk_head_dim:  # the fused kernels want equal widths
            v = F.pad(v, (0, c.qk_head_dim - c.v_head_dim))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=c.softmax_scale,
        )
        return out[0].transpose(0, 1)[..., : c.v_head_dim]


class Mlp:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, prefix: str, hidden: int, width: int, bias: bool, load: Loader):
        pair = [(f"{prefix}{name}", (width, hidden)) for name in ("gate_proj", "up_proj")]
        self.w_in = load.joined(*((f"{name}.weight", shape) for name, shape in pair))
        self.w_out = load.one(f"{prefix}down_proj.weight", hidden, width)
        self.b_in = load.joined(*((f"{name}.bias", (width,)) for name, _ in pair)) if bias else None
        self.b_out = load.one(f"{prefix}down_proj.bias", hidden) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(silu_product(F.linear(x, self.w_in, self.b_in)), self.w_out, self.b_out)
