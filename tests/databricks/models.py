"""Tiny model folders for the registry's tests: real files, no training, no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "float32",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 0,
    "max_position_embeddings": 64,
}

CODE = """
import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return ["" for _ in model_input]


mlflow.models.set_model(Echo())
"""


def write_checkpoint(folder: Path, *, megabytes: float = 0.01, config: dict | None = None) -> Path:
    """A Hugging Face folder of about `megabytes` MB, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    rows = max(1, int(megabytes * 1e6 / 4 / 64))
    weights = np.random.default_rng(0).standard_normal((rows, 64), dtype=np.float32)
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_model_folder(folder: Path, *, megabytes: float = 0.01, config: dict | None = None) -> Path:
    """An MLflow pyfunc model folder as log_model writes it, made by hand."""
    write_checkpoint(folder / "artifacts" / "checkpoint", megabytes=megabytes, config=config)
    document = {
        "flavors": {"python_function": {"loader_module": "mlflow.pyfunc.model", "python_model": "model.py"}},
        "mlflow_version": "3.17.2",
        "model_uuid": "0" * 32,
        "signature": {"inputs": '[{"type": "string", "required": true}]', "outputs": None, "params": None},
        "saved_input_example_info": {"artifact_path": "input_example.json", "type": "json_object"},
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(document))
    (folder / "model.py").write_text(CODE)
    (folder / "input_example.json").write_text('["To be"]')
    (folder / "requirements.txt").write_text("mlflow==3.17.2\nsafetensors>=0.6  # weights\n")
    return folder
