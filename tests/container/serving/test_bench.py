"""The GPU benchmark without a GPU: its random model, and its table."""

from typing import cast

import torch

from container.serving.attention import DecodeAttention
from container.serving.batch import Span, make_batch
from container.serving.bench_gpu import V2_LITE, RandomLoader
from container.serving.bench_table import Result, Timing, table
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


def test_a_table_compares_with_the_fastest_peer() -> None:
    """An engine that failed keeps what it had measured, and its reason stands below."""
    results = {
        "ours": Result([Timing(1024, 1, 2.0, 2.5), Timing(1024, 16, 10.0, 11.0)], None),
        "a": Result([Timing(1024, 1, 5.0, 5.0), Timing(1024, 16, 9.0, 9.5)], None),
        "b": Result([Timing(1024, 1, 4.0, 4.0)], "failed with status 1"),
    }
    titles = {"ours": "ours", "a": "theirs", "b": "theirs, too"}
    lines = table(results, titles, "ours", ["a", "b", "absent"]).splitlines()
    assert "| 1024 | 1 | 2.00 (2.50), 500/s | 5.00 (5.00), 200/s | 4.00 (4.00), 250/s | 2.00x |" in lines
    assert "| 1024 | 16 | 10.00 (11.00), 1600/s | 9.00 (9.50), 1778/s | - | 0.90x |" in lines
    assert lines[-1] == "- b: failed with status 1"
    assert "vLLM's own" not in table({"ours": results["ours"]}, titles, "ours", ["a"])
