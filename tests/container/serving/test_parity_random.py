"""The engine against transformers on configurations drawn at random, in whatever batches a draw gives."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from container.serving.engine import Engine, Options
from container.serving.sequence import Sampling
from tests.container.serving.conftest import save_random

# of logits, relative, and of log probabilities, absolute: float32 in another order of operations
LOGITS_BOUND, LOGPROB_BOUND = 1e-3, 5e-3
SEEDS = range(6)


def configuration(draw: random.Random) -> tuple[int, dict[str, Any]]:
    """A family and its fields, over everything that transformers reads and this engine takes."""
    family = draw.choice((2, 3))
    heads, layers, groups = draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    size, kept = draw.choice((2, 3, 4)), draw.randint(1, groups)  # transformers' V3 wants two experts a group
    method = draw.choice(("greedy", "group_limited_greedy"))
    eligible = size * (kept if family == 3 or method != "greedy" else groups)
    fields: dict[str, Any] = {
        "vocab_size": draw.choice((17, 97, 300)),
        "hidden_size": heads * draw.choice((4, 6, 12)),
        "intermediate_size": draw.choice((8, 33, 64)),
        "moe_intermediate_size": draw.choice((4, 12, 36)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_shared_experts": draw.choice((0, 1, 3)),
        "n_routed_experts": groups * size,
        "kv_lora_rank": draw.choice((16, 48, 128)),
        "q_lora_rank": draw.choice((None, 5, 24)),
        "qk_rope_head_dim": draw.choice((16, 32, 48)),
        "v_head_dim": draw.choice((4, 7, 64)),
        "qk_nope_head_dim": draw.choice((2, 8, 32)),
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw.randint(1, eligible),
        "first_k_dense_replace": draw.randint(0, layers),
        "norm_topk_prob": draw.choice((True, False)),
        "routed_scaling_factor": draw.choice((0.3, 1.0, 2.5)),
        "max_position_embeddings": 300,
        "rms_norm_eps": draw.choice((1e-6, 1e-3)),
        "initializer_range": 0.2,
        "attention_bias": draw.choice((True, False)),
        "tie_word_embeddings": draw.choice((True, False)),
        "rope_theta": draw.choice((50.0, 10000.0, 500000.0)),
    }
    if draw.random() < 0.6:
        scaling = {
            "mscale": draw.choice((None, 0.0, 0.7, 1.0)),
            "mscale_all_dim": draw.choice((None, 0.0, 0.9, 1.0)),
            "beta_fast": draw.choice((None, 16, 32)),
            "attention_factor": draw.choice((None, None, 0.8)),
            "truncate": draw.choice((None, False)),
        }
        fields["rope_scaling"] = {
            "type": "yarn",
            "factor": draw.choice((1.0, 4.0, 40.0)),
            "original_max_position_embeddings": draw.choice((32, 128, 4096)),
            **{name: value for name, value in scaling.items() if value is not None},
        }
    if family == 2:
        fields |= {"topk_method": method, "mlp_bias": fields["n_shared_experts"] > 0 and draw.random() < 0.5}
    else:
        fields["rope_interleave"] = draw.choice((True, False))
    return family, fields


def checkpoint(folder: Path, seed: int, draw: random.Random) -> Any:
    """Saves a random checkpoint, sharded or not, and returns transformers' model of it."""
    import transformers

    family, fields = configuration(draw)
    config = getattr(transformers, f"DeepseekV{family}Config")(**fields)
    config._experts_implementation = "eager"  # the grouped one takes no odd sizes
    return save_random(config, family, seed, folder, max_shard_size=draw.choice(("20KB", "1GB")))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # no shared experts
@pytest.mark.parametrize("seed", SEEDS)
def test_any_configuration_in_any_batch(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    model = checkpoint(tmp_path, seed, draw)
    vocabulary = model.config.vocab_size
    tokens = [draw.randrange(vocabulary) for _ in range(150)]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    options = Options(
        max_batch=draw.choice((2, 5)),
        step_tokens=draw.choice((3, 17, 64, 512)),
        cache_tokens=draw.choice((None, 192, 320)),  # the small ones preempt
    )
    engine = Engine.load(tmp_path, backend="reference", kv_cache_dtype="float32", options=options)
    error = (engine.logits(tokens) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < LOGITS_BOUND

    sequences = []
    for length in draw.choices((1, 63, 64, 65, 100), k=5):
        start = draw.choice((0, 0, 40))  # prompts that share their beginning, and others
        sampling = Sampling(max_tokens=draw.choice((1, 30, 64)), ignore_eos=True, logprobs=0)
        sequences.append(engine.add(tokens[start : start + length], sampling))
        for _ in range(draw.randrange(20)):
            engine.step()
    while engine.busy:
        engine.step()
    assert engine.allocator.used == 0
    for sequence in sequences:
        with torch.inference_mode():
            logits = model(torch.tensor([sequence.prompt + sequence.output])).logits[0]
        wanted = logits[len(sequence.prompt) - 1 : -1].log_softmax(dim=-1)
        chosen = wanted.gather(1, torch.tensor(sequence.output)[:, None])[:, 0]
        got = torch.tensor([entry.logprob for entry in sequence.logprobs])
        assert (got - chosen).abs().max() < LOGPROB_BOUND
        assert (wanted.max(dim=-1).values - chosen).max() < LOGPROB_BOUND  # greedy, but for ties
