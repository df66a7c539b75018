"""The example against a real MLflow server: what it registers is what the pipeline and its users read."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from container.serving.checkpoint import ModelConfig, find_checkpoint
from container.serving.engine import Engine
from tests.databricks.mlflow_server import server_url

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_and_log.py"
FAST = ["--steps", "8", "--batch", "2", "--length", "64"]
# As a Databricks job runs a Python file: its compiled text, without __file__; an exit, even 0, has failed.
DATABRICKS = """
import sys
del sys.argv[0]
try:
    with open(sys.argv[0], "rb") as file:
        exec(compile(file.read(), sys.argv[0], "exec"), {"__name__": "__main__"})
except SystemExit as exit:
    raise RuntimeError("the script called sys.exit") from exit
"""


@pytest.fixture(scope="module")
def trained() -> str:
    """A server with one trained and registered model. Returns its URL."""
    server = server_url()
    uris = {"MLFLOW_TRACKING_URI": server, "MLFLOW_REGISTRY_URI": server}
    often = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5"}
    env = {**os.environ, **uris, **often, "PYTHONPATH": str(EXAMPLE.parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", DATABRICKS, str(EXAMPLE), *FAST],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Failed to validate" not in run.stderr
    assert "registered mla-demo version 1 with alias champion" in run.stderr
    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    return server


@pytest.fixture(scope="module")
def folder(trained: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts("models:/mla-demo@champion"))


@pytest.mark.slow
def test_the_run_has_parameters_and_a_loss_curve(trained: str) -> None:
    client = MlflowClient(trained, trained)
    version = client.get_model_version_by_alias("mla-demo", "champion")
    run = client.get_run(version.run_id)
    assert run.data.params["steps"] == "8"
    assert run.data.params["kv_lora_rank"] == "512"
    losses = client.get_metric_history(version.run_id, "loss")
    assert [m.step for m in losses] == list(range(8))
    assert losses[-1].value < losses[0].value
    assert {a.path for a in client.list_artifacts(version.run_id)} >= {"loss_curve.csv", "sample.txt"}


@pytest.mark.slow
def test_the_run_has_the_machines_load_and_one_model(trained: str) -> None:
    client = MlflowClient(trained, trained)
    version = client.get_model_version_by_alias("mla-demo", "champion")
    metrics = client.get_run(version.run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(metrics)
    outputs = client.get_run(version.run_id).outputs.model_outputs
    assert [client.get_logged_model(each.model_id).name for each in outputs] == ["model"]


@pytest.mark.slow
def test_the_model_folder_is_a_checkpoint_the_engine_serves(folder: Path) -> None:
    checkpoint = find_checkpoint(folder)
    assert checkpoint == folder / "artifacts" / "checkpoint"
    config = ModelConfig.from_folder(checkpoint)
    assert (config.architecture, config.latent_dim) == ("DeepseekV3ForCausalLM", 576)
    engine = Engine.load(folder, backend="reference")
    assert engine.tokenizer.encode("é") == [0xC3, 0xA9]
    assert len(engine.generate(["The "], max_tokens=3)[0].token_ids) == 3


@pytest.mark.slow
def test_signature_requirements_and_input_example(folder: Path) -> None:
    info = mlflow.models.get_model_info(str(folder))
    assert info.signature.inputs.input_names() == ["prompt"]
    names = {p.name for p in info.signature.params}
    assert names == {"max_new_tokens", "temperature", "top_p", "top_k", "seed"}
    pins = (folder / "requirements.txt").read_text().split()
    assert any(pin.startswith("torch==") for pin in pins)
    assert not any("+" in pin for pin in pins)
    assert (folder / "input_example.json").is_file()


@pytest.mark.slow
def test_the_model_brings_the_text_it_is_judged_by_and_the_prompt_it_is_tried_with(folder: Path) -> None:
    """The text is what training held out; Evaluate finds both."""
    sys.path.insert(0, str(EXAMPLE.parent))
    from train_and_log import HELD_OUT_BYTES, PROMPT, documentation

    from steps.evaluation.example import prompt_of
    from steps.evaluation.regression import OWN_TEXT, evaluation_text

    pieces, source = evaluation_text(folder, {})
    assert source.startswith(OWN_TEXT)
    held_out = documentation()[-HELD_OUT_BYTES:].decode(errors="ignore")
    assert held_out.startswith("".join(pieces))
    assert prompt_of(json.loads((folder / "input_example.json").read_text())) == PROMPT


@pytest.mark.slow
def test_predict_uses_the_parameters(folder: Path) -> None:
    model = mlflow.pyfunc.load_model(str(folder))
    table = pd.DataFrame({"prompt": ["The ", "An "]})
    short, longer = (model.predict(table, params={"max_new_tokens": n}) for n in (4, 9))
    assert [len(text) for text in short] == [4, 4]
    assert [text[:4] for text in longer] == short
    streamed = list(model.predict_stream({"prompt": "The "}, params={"max_new_tokens": 9}))
    assert "".join(streamed) == longer[0]
    assert len(streamed) > 1


@pytest.mark.slow
def test_transformers_gives_the_same_text_as_the_engine(folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLE.parent))
    from mla_pyfunc import DEFAULTS, TransformersGenerator

    from container.serving.pyfunc import EngineGenerator

    checkpoint = str(find_checkpoint(folder))
    settings = {**DEFAULTS, "max_new_tokens": 24}
    expected = TransformersGenerator(checkpoint).generate(["The statement "], **settings)
    assert (
        EngineGenerator(checkpoint, kv_cache_dtype="float32").generate(["The statement "], **settings)
        == expected
    )


@pytest.mark.parametrize("option", ["--steps 0", "--batch -1", "--length 0", "--alias v1"])
def test_options_that_would_spoil_the_model_are_refused_at_once(option: str, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    from train_and_log import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(option.split())
    assert f"error: {option}: " in capsys.readouterr().err
