"""A DeepSeek-V2/V3 language model: embedding, layers, output head, on flat batches over the paged cache."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from container.serving.batch import Batch
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.layers import Attention, MixtureOfExperts, Mlp, rms_norm, rotary_table
from container.serving.weights import Checkpoint, Loader


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

    def __call__(self, x: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), batch, cache)
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))


class Model:
    """Weights of one checkpoint on one device; holds no state of requests.

    Raises WeightError when a tensor is missing, misshapen or not finite.
    """

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        progress: Callable[[float], None] | None = None,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        load = Loader(Checkpoint(folder), device, dtype, progress)
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = load.one("model.embed_tokens.weight", *vocabulary)
        self.layers = [Layer(config, index, load) for index in range(config.num_hidden_layers)]
        self.norm = load.one("model.norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else load.one("lm_head.weight", *vocabulary)
        cos, sin = rotary_table(config.rope, config.qk_rope_head_dim, max_positions)
        self.cos, self.sin = cos.to(device), sin.to(device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Runs the batch, fills the cache, returns float32 logits [R, vocabulary] of batch.logit_rows."""
        batch.cos, batch.sin = self.cos[batch.positions], self.sin[batch.positions]
        x = F.embedding(batch.tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, batch, cache)
        if batch.logit_rows is not None:
            x = x[batch.logit_rows]
        return F.linear(rms_norm(x, self.norm, self.config.rms_norm_eps), self.head).float()
