"""A DeepSeek-V2/V3 language model: embedding, layers, output head, on flat batches over the paged cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from container.serving.batch import Batch
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.fused import add_norm, on_triton
from container.serving.layers import Attention, Mlp, rotary_table
from container.serving.moe import MixtureOfExperts
from container.serving.weights import Loader


class Layer:
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig, index: int, load: Loader):
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        self.eps = config.rms_norm_eps
        self.attention_norm = load.one(prefix + "input_layernorm.weight", hidden)
        self.attention = Attention(config, index, load)
        self.mlp_norm = load.one(prefix + "post_attention_layernorm.weight", hidden)
        self.mlp: Mlp | MixtureOfExperts
        if config.is_moe(index):
            self.mlp = MixtureOfExperts(config, index, load)
        else:
            self.mlp = Mlp(prefix + "mlp.", hidden, config.intermediate_size, config.mlp_bias, load)

    def __call__(
        self, x: Tensor, delta: Tensor | None, batch: Batch, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it: `delta` before, the mlp's after."""
        x, h = add_norm(x, delta, self.attention_norm, self.eps)
        x, h = add_norm(x, self.attention(h, batch, cache), self.mlp_norm, self.eps)
        return x, self.mlp(h)


class Model:
    """Weights of one checkpoint on one device; holds no state of requests.

    Raises WeightError when a tensor is missing, misshapen or not finite.
    """

    def __init__(self, config: ModelConfig, load: Loader, max_positions: int):
        self.config, self.device, self.dtype = config, load.device, load.dtype
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = load.one("model.embed_tokens.weight", *vocabulary)
        self.layers = [Layer(config, index, load) for index in range(config.num_hidden_layers)]
        self.norm = load.one("model.norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else load.one("lm_head.weight", *vocabulary)
        cos, sin = rotary_table(config.rope, config.qk_rope_head_dim, max_positions)
        self.cos, self.sin = cos.to(load.device), sin.to(load.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Runs the batch, fills the cache, returns float32 logits [R, vocabulary] of batch.logit_rows."""
        batch.cos, batch.sin = self.cos[batch.positions], self.sin[batch.positions]
        x, delta = F.embedding(batch.tokens, self.embedding), None
        if on_triton(x) and takes_one_token(self.config) and batch.is_one_token:
            from container.serving.one_token import decode_one_token

            return decode_one_token(self, x, batch, cache)
        for layer in self.layers:
            x, delta = layer(x, delta, batch, cache)
        if batch.logit_rows is not None and delta is not None:
            x, delta = x[batch.logit_rows], delta[batch.logit_rows]
        _, h = add_norm(x, delta, self.norm, self.config.rms_norm_eps)
        if h.is_cuda and h.dtype != torch.float32:  # logits as they are added up, not rounded to 16 bits
            return torch.mm(h, self.head.T, out_dtype=torch.float32)
        return F.linear(h, self.head).float()


def takes_one_token(config: ModelConfig) -> bool:
    """Whether the kernels for a single token (one_token.py) cover the model: no biases, shared experts."""
    biased = config.attention_bias or config.mlp_bias
    return not biased and not (config.n_routed_experts and not config.n_shared_experts)
