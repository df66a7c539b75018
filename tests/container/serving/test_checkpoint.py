"""Finding a checkpoint and reading its configuration; every refusal names the file and the key."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from container.serving.checkpoint import ModelConfig, NotMlaModel, find_checkpoint, find_tokenizer
from container.serving.generation import GenerationDefaults

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "rope_theta": 10000,
}


def write(folder: Path, config: dict[str, Any] | None = None, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / weights).write_bytes(b"")
    return folder


@pytest.mark.parametrize("where", [".", "artifacts/checkpoint", "model", "artifacts/a/b"])
def test_finds_the_checkpoint_of_a_model_folder(tmp_path: Path, where: str) -> None:
    folder = write(tmp_path / where, V3)
    assert find_checkpoint(tmp_path).resolve() == folder.resolve()


def test_refuses_folders_without_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotMlaModel, match="not a folder"):
        find_checkpoint(tmp_path / "missing")
    with pytest.raises(NotMlaModel, match="no folder under"):
        find_checkpoint(tmp_path)
    write(tmp_path / "a", V3, "pytorch_model.bin")
    with pytest.raises(NotMlaModel, match="pickled"):
        find_checkpoint(tmp_path)
    write(tmp_path / "b", V3)
    write(tmp_path / "c", V3)
    with pytest.raises(NotMlaModel, match=r"several checkpoints \(b, c\)"):
        find_checkpoint(tmp_path)


def test_tokenizer_of_the_transformers_flavor(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "model", V3)
    assert find_tokenizer(checkpoint, tmp_path) is None
    other = tmp_path / "components" / "tokenizer" / "tokenizer.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert find_tokenizer(checkpoint, tmp_path) == other


def test_reads_a_configuration(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(write(tmp_path, V3))
    assert config.architecture == "DeepseekV3ForCausalLM"
    assert config.dtype == "bfloat16"
    assert config.latent_dim == 576
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert config.eos_token_ids == (1,)
    assert [config.is_moe(i) for i in range(2)] == [False, True]


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    write(tmp_path, V3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5, 7)


def test_defaults_of_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path, V3)
    assert ModelConfig.from_folder(tmp_path).generation == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.3, "top_p": 0.95, "max_new_tokens": 64}')
    assert ModelConfig.from_folder(tmp_path).generation == GenerationDefaults(0.3, 0.95, None, 64)
    path.write_text('{"do_sample": true, "top_p": 0.9}')  # a temperature of 1 is not written
    assert ModelConfig.from_folder(tmp_path).generation == GenerationDefaults(1.0, 0.9)
    path.write_text('{"do_sample": false, "temperature": 0.3}')
    assert ModelConfig.from_folder(tmp_path).generation.temperature == 0
    path.write_text('{"top_p": 2}')
    with pytest.raises(NotMlaModel, match=r"generation_config\.json: top_p is 2, expected"):
        ModelConfig.from_folder(tmp_path)


def test_what_the_server_does_not_apply_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, V3)
    path = tmp_path / "generation_config.json"
    path.write_text('{"repetition_penalty": 1.0, "num_beams": 1, "min_p": null}')
    ModelConfig.from_folder(tmp_path)
    assert not caplog.messages
    path.write_text('{"repetition_penalty": 1.1, "num_beams": 4, "temperature": 0.5}')
    assert ModelConfig.from_folder(tmp_path).generation.temperature == 0.5
    assert caplog.messages == [
        f"{path}: num_beams, repetition_penalty will not be applied: this server has no such thing"
    ]


@pytest.mark.parametrize("family", [2, 3])
def test_keys_left_out_are_those_of_transformers(family: int) -> None:
    import transformers

    theirs = getattr(transformers, f"DeepseekV{family}Config")()
    own = ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor")
    raw = {k: v for k, v in V3.items() if k not in own}
    config = ModelConfig.from_dict({**raw, "model_type": theirs.model_type})
    for key in own:
        # transformers' V2 has no groups, which is one group here
        assert getattr(config, key) == (1 if getattr(theirs, key) is None else getattr(theirs, key)), key
    none = ModelConfig.from_dict({**raw, "model_type": theirs.model_type, "n_shared_experts": None})
    assert none.n_shared_experts == 0


def test_v2_knows_one_rope_and_v3_no_bias_of_its_mlps() -> None:
    # transformers' classes do not read these keys
    v2 = ModelConfig.from_dict({**V3, "model_type": "deepseek_v2", "rope_interleave": False})
    assert v2.rope_interleave
    assert not ModelConfig.from_dict({**V3, "mlp_bias": True}).mlp_bias


def test_yarn_of_deepseek_v3() -> None:
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}
    config = ModelConfig.from_dict({**V3, "rope_scaling": {**scaling, "mscale_all_dim": 1.0}})
    # the published model's scale: 192^-0.5 * (0.1 ln 40 + 1)^2
    assert config.softmax_scale == pytest.approx(0.1352337788608801)
    assert config.rope.embedding_scale == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"kv_lora_rank": None}, "'kv_lora_rank' is missing"),
        ({"kv_lora_rank": 500}, "kv_lora_rank is 500, expected a positive multiple of 16"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\)"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size is",
        ),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"n_group": 3}, "do not fit together"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, "no 'factor'"),
    ],
)
def test_refuses_what_it_cannot_run(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = write(tmp_path, {**V3, **change})
    with pytest.raises(NotMlaModel, match=words) as caught:
        ModelConfig.from_folder(folder)
    assert "config.json" in str(caught.value)


def test_refuses_broken_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NotMlaModel, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)


def test_imports_no_torch() -> None:
    code = "import sys, container.serving.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
