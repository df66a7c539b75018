"""Models as MLflow's own flavors write them: which go in, which are refused, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml

from steps.registry.provenance import describe_model
from tests.databricks.conftest import NAME, Pull
from tests.databricks.models import CONFIG, write_checkpoint, write_model_folder
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


def test_transformers_without_its_weights(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    """save_pretrained=False logs where the weights were, not the weights."""
    folder = write_model_folder(tmp_path / "model")
    shutil.rmtree(folder / "artifacts")
    flavor = {"source_model_name": "deepseek-ai/DeepSeek-V2-Lite", "source_model_revision": "0"}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"transformers": flavor}}))
    version = workspace.add_model(NAME, folder)
    failed(
        pull(f"models:/{NAME}/{version}"),
        "reference to deepseek-ai/DeepSeek-V2-Lite",
        "persist_pretrained_model",
    )


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("artifacts/checkpoint/config.json", json.dumps({**CONFIG, "kv_lora_rank": None}), "kv_lora_rank"),
        (
            "artifacts/checkpoint/config.json",
            json.dumps({**CONFIG, "rope_scaling": 3}),
            "cannot be understood",
        ),
        ("artifacts/checkpoint/config.json", "[" * 100_000, "cannot be understood"),
        ("artifacts/checkpoint/generation_config.json", '{"eos_token_id": "x"}', "cannot be understood"),
        ("MLmodel", "flavors: [", "MLmodel is no YAML"),
        ("MLmodel", "flavors: {}\n" + "#" * (9 << 20), "MLmodel has"),
    ],
)
def test_a_description_that_is_wrong(
    file: str, content: str, words: str, workspace: Workspace, pull: Pull, tmp_path: Path
) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / file).write_text(content)
    message = failed(pull(f"models:/{NAME}/{workspace.add_model(NAME, folder)}"), words)
    assert "unexpectedly" not in message
    assert str(tmp_path) not in message, "a path of the job that nobody can look into"


@pytest.mark.parametrize(
    ("lines", "key", "value"),
    [
        ("saved_input_example_info: {artifact_path: ../secret.json}", "input_example", None),
        ("saved_input_example_info: {artifact_path: nan.json}", "input_example", None),
        ("saved_input_example_info: 3", "input_example", None),
        ("signature: {inputs: 2020-01-01}", "signature", {"inputs": "2020-01-01"}),
        ("signature: {inputs: .nan}", "signature", None),
    ],
)
def test_an_mlmodel_of_somebody_else(lines: str, key: str, value: object, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (tmp_path / "secret.json").write_text('"of another"')
    (folder / "nan.json").write_text("[NaN]")
    (folder / "MLmodel").write_text(f"flavors: {{python_function: {{}}, 1: {{}}}}\n{lines}\n")
    document = describe_model(folder)
    json.dumps(document, allow_nan=False)
    assert document[key] == value
