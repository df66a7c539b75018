"""The benchmark's random model is one that the engine's classes build and run."""

from typing import cast

import torch

from container.serving.attention import DecodeAttention
from container.serving.batch import Span, make_batch
from container.serving.bench_gpu import V2_LITE, RandomLoader
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.model import Model
from container.serving.weights import Loader

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "vocab_size": 100,
}


def test_random_weights_make_a_model() -> None:
    device, dtype = torch.device("cpu"), torch.float32
    config = ModelConfig.from_dict(V2_LITE | SMALL)
    model = Model(config, cast(Loader, RandomLoader(device, dtype)), 256)
    attention = DecodeAttention("reference", None, device, config, dtype, "float32")
    cache = LatentCache(config.num_hidden_layers, 4, attention, device)
    cache.fill_random()
    logits = model(make_batch([Span([7], 100, [1, 2]), Span([9], 3, [3])], device, None), cache)
    assert logits.shape == (2, 100)
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2  # as unit-variance weights over a normalised state give
