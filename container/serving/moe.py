"""The mixture of experts of a DeepSeek-V2/V3 layer on flat rows of tokens [T, hidden].

The arithmetic follows transformers' models/deepseek_v2 and deepseek_v3 (Apache-2.0), which the tests
compare with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from container.serving.checkpoint import ModelConfig
from container.serving.fused import on_triton, silu_product
from container.serving.layers import Mlp
from container.serving.weights import Loader


class MixtureOfExperts:
    """Routed experts as grouped matrix products over tokens sorted by expert, plus the shared experts."""

    def __init__(self, config: ModelConfig, layer: int, load: Loader):
        c, self.config = config, config
        prefix = f"model.layers.{layer}.mlp."
        hidden, width = c.hidden_size, c.moe_intermediate_size
        self.router = load.one(prefix + "gate.weight", c.n_routed_experts, hidden, dtype=torch.float32)
        # Products of 16-bit values are exact in float32, so a router that is stored in 16 bits needs no more.
        short = self.router.to(load.dtype)
        if self.router.is_cuda and torch.equal(short.float(), self.router):
            self.router = short
        self.bias = None
        if c.scoring == "sigmoid":
            name = prefix + "gate.e_score_correction_bias"
            self.bias = load.one(name, c.n_routed_experts, dtype=torch.float32)
        experts = [f"{prefix}experts.{e}." for e in range(c.n_routed_experts)]
        fused = f"{prefix}experts.gate_up_proj"
        if fused in load:  # as transformers 5 holds them in memory and writes them if asked to
            self.w_in = load.one(fused, c.n_routed_experts, 2 * width, hidden)
            self.w_out = load.one(f"{prefix}experts.down_proj", c.n_routed_experts, hidden, width)
        else:
            self.w_in = load.stacked(
                [[(f"{e}{n}.weight", (width, hidden)) for n in ("gate_proj", "up_proj")] for e in experts]
            )
            self.w_out = load.stacked([[(f"{e}down_proj.weight", (hidden, width))] for e in experts])
        shared = width * c.n_shared_experts
        self.shared = Mlp(prefix + "shared_experts.", hidden, shared, c.mlp_bias, load) if shared else None

    def __call__(self, x: Tensor) -> Tensor:
        shared = None if self.shared is None else self.shared(x)
        if on_triton(x):
            from container.serving.experts import routed_experts

            weights, experts = self.choose(self.scores(x))
            return routed_experts(x, self.w_in, self.w_out, experts, weights, shared)
        routed = self._many(x, *self.route(x))
        return routed if shared is None else routed + shared

    def scores(self, x: Tensor) -> Tensor:
        """The router's logits float32 [T, E]."""
        if self.router.dtype == torch.float32:
            return F.linear(x.float(), self.router)
        return torch.mm(x, self.router.T, out_dtype=torch.float32)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`route` as one Triton kernel, from the router's logits float32 [T, E]; indices int32."""
        from container.serving.experts import route

        c = self.config
        kept = c.topk_group if c.grouped else c.n_group
        return route(
            logits, self.bias, c.num_experts_per_tok, c.n_group, kept, c.norm_topk_prob,
            c.routed_scaling_factor,
        )  # fmt: skip

    def _many(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        k = experts.shape[1]
        order = experts.flatten().argsort()
        ends = torch.searchsorted(
            experts.flatten()[order],
            torch.arange(self.config.n_routed_experts, device=x.device),
            right=True,
            out_int32=True,
        )
        inner = silu_product(grouped_linear(x[order // k], self.w_in, ends))
        out = grouped_linear(inner, self.w_out, ends)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=x.device)
        routed = out[place].view(-1, k, x.shape[1])
        return (routed * weights.to(x.dtype)[..., None]).sum(dim=1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 and indices int64 [T, k] of the chosen experts, in no particular order."""
        c = self.config
        logits = self.scores(x)
        scores = logits.softmax(dim=-1) if c.scoring == "softmax" else logits.sigmoid()
        choice = scores if self.bias is None else scores + self.bias
        if c.grouped and c.topk_group < c.n_group:
            # a group's score: V2 takes its best expert, V3 the sum of its two best
            grouped = choice.view(-1, c.n_group, c.n_routed_experts // c.n_group)
            best = grouped.topk(1 if self.bias is None else min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            keep = torch.zeros_like(best, dtype=torch.bool)
            keep.scatter_(1, best.topk(c.topk_group, dim=-1, sorted=False).indices, True)
            choice = grouped.masked_fill(~keep[..., None], float("-inf")).flatten(1)
        experts = choice.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, experts


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [N, in], rows sorted by group; weights [G, out, in]; ends int32 [G] -> [N, out].

    One grouped kernel where the sizes suit it (rows of 16 bytes; bfloat16 on a GPU), else a product for
    each group.
    """
    aligned = all(width * x.element_size() % 16 == 0 for width in weights.shape[1:])
    if aligned and (x.dtype == torch.bfloat16 or not x.is_cuda):
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
    out = x.new_empty(x.shape[0], weights.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = F.linear(x[start:end], weights[group])
        start = end
    return out
