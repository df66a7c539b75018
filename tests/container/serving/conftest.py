"""Tiny random checkpoints of both families, written by transformers, and engines that serve them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see container/serving/__main__.py

import pytest
import torch

from container.serving.engine import Engine, Options

VOCABULARY = 300
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "beta_fast": 32,
    "beta_slow": 1,
}
# Unusual on purpose: 3 layers, 3 heads, rope 32, a rank that is no power of two, 3 experts a token.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "intermediate_size": 92,
    "moe_intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "kv_lora_rank": 48,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 32,
    "v_head_dim": 20,
    "qk_nope_head_dim": 24,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "v3-yarn": (3, {"rope_scaling": YARN}),
    "v3-plain-query-tied": (
        3,
        {"q_lora_rank": None, "tie_word_embeddings": True, "n_group": 1, "topk_group": 1},
    ),
    "v3-halves-biased": (3, {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}),
    "v2-yarn-grouped": (
        2,
        {"rope_scaling": YARN, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "v2-plain-query": (2, {"q_lora_rank": None, "first_k_dense_replace": 3, "v_head_dim": 64}),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder and transformers' model of the same weights, float32."""

    folder: Path
    model: Any


def write_checkpoint(folder: Path, form: str, **save: Any) -> Any:
    """Saves a random checkpoint of a form in FORMS with transformers, returns transformers' model."""
    import transformers

    family, changes = FORMS[form]
    config = getattr(transformers, f"DeepseekV{family}Config")(**{**SIZES, **changes})
    return save_random(config, family, 7, folder, **save)


def save_random(config: Any, family: int, seed: int, folder: Path, **save: Any) -> Any:
    """Saves transformers' model of a configuration with random weights, and returns it."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"DeepseekV{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                tensor.normal_(std=0.1)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    return model


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Reference of a form, made once a session."""
    made: dict[str, Reference] = {}

    def get(form: str) -> Reference:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            made[form] = Reference(folder, write_checkpoint(folder, form))
        return made[form]

    return get


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte tokenizer and a chat template, as the example writes them, untrained."""
    from examples.tiny_mla import TinyConfig, TinyMla, save_checkpoint

    folder = tmp_path_factory.mktemp("model") / "artifacts" / "checkpoint"
    torch.manual_seed(1)
    config = TinyConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=512)
    save_checkpoint(TinyMla(config), folder)
    return folder


@pytest.fixture
def tiny_engine(tiny_folder: Path) -> Callable[..., Engine]:
    """Engines of `tiny_folder` in float32 with the portable backend; keywords are Options."""

    def make(backend: str = "reference", **options: Any) -> Engine:
        return Engine.load(tiny_folder, backend=backend, kv_cache_dtype="float32", options=Options(**options))

    return make
