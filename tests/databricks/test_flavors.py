"""Models as MLflow's own flavors write them: which go in, which are refused, and why."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from tests.databricks.conftest import NAME, Pull
from tests.databricks.models import CONFIG, write_checkpoint
from tests.databricks.runner import failed
from tests.databricks.workspace import Workspace


def provenance_of(workspace: Workspace, pull: Pull, folder: Path) -> dict:
    outcome = pull(f"models:/{NAME}/{workspace.add_model(NAME, folder)}")
    assert outcome.code == 0, outcome.message
    return json.loads((outcome.output("provenance") / "provenance.json").read_text())


def extra_files(tmp_path: Path) -> list[str]:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    return [str(checkpoint / name) for name in ("config.json", "model.safetensors")]


@pytest.mark.slow
def test_transformers(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    import tokenizers
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]")
    kept = {key: value for key, value in CONFIG.items() if key not in ("architectures", "dtype")}
    sizes = {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1}
    config = DeepseekV3Config(**kept | sizes | {"topk_group": 1, "moe_intermediate_size": 16})
    mlflow.transformers.save_model(
        {"model": DeepseekV3ForCausalLM(config), "tokenizer": tokenizer},
        tmp_path / "model",
        task="text-generation",
        pip_requirements=["transformers"],
    )
    document = provenance_of(workspace, pull, tmp_path / "model")
    assert document["flavors"] == ["python_function", "transformers"]
    assert document["checkpoint"] == "model"
    assert document["mla"]["kv_lora_rank"] == CONFIG["kv_lora_rank"]
    assert document["signature"] is not None


def test_pytorch_with_safetensors(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    mlflow.pytorch.save_model(
        torch.nn.Linear(4, 4),
        tmp_path / "model",
        serialization_format="pt2",
        input_example=np.zeros((1, 4), np.float32),
        extra_files=extra_files(tmp_path),
        pip_requirements=["torch"],
    )
    document = provenance_of(workspace, pull, tmp_path / "model")
    assert document["flavors"] == ["python_function", "pytorch"]
    assert document["checkpoint"] == "extra_files"
    assert document["input_example"] is not None


def test_pytorch_pickles_by_default(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    mlflow.pytorch.save_model(
        torch.nn.Linear(4, 4),
        tmp_path / "model",
        extra_files=extra_files(tmp_path),
        pip_requirements=["torch"],
        serialization_format="pickle",
    )
    version = workspace.add_model(NAME, tmp_path / "model")
    failed(pull(f"models:/{NAME}/{version}"), "data/model.pth", "safetensors", "--allow-pickle true")
    outcome = pull(f"models:/{NAME}/{version}", "--allow-pickle", "true")
    assert outcome.code == 0, outcome.message


def test_a_pickled_pyfunc(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    class Pickled(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return []

    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=Pickled(),
        artifacts={"checkpoint": str(checkpoint)},
        pip_requirements=["mlflow"],
    )
    version = workspace.add_model(NAME, tmp_path / "model")
    failed(pull(f"models:/{NAME}/{version}"), "python_model.pkl", "--allow-pickle true")


def test_another_kind_of_model(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    """No language model at all: the reason names what is missing."""
    mlflow.pytorch.save_model(
        torch.nn.Linear(4, 4),
        tmp_path / "model",
        serialization_format="pt2",
        input_example=np.zeros((1, 4), np.float32),
        pip_requirements=["torch"],
    )
    version = workspace.add_model(NAME, tmp_path / "model")
    failed(pull(f"models:/{NAME}/{version}"), "no multi-head latent attention", "config.json")
