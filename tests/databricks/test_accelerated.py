"""The accelerated model: registered by RecordRelease, loaded by a batch job that has only the registry."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from container.serving.engine import Engine
from kernels.build import build
from steps import pull_model, record_release
from tests.databricks.mlflow_server import server_url
from tests.databricks.runner import failed, run_step
from tests.steps.test_record_release import ARN, document, give_release

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The assert statement "


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A tiny untrained model, registered, pulled and given a compiled kernel: what RecordRelease gets."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_mla import TinyConfig, TinyMla, save_checkpoint
    from train_and_log import signature

    root = tmp_path_factory.mktemp("released")
    save_checkpoint(TinyMla(TinyConfig()), root / "checkpoint")
    mlflow.set_tracking_uri(server_url())
    with mlflow.start_run() as run:
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "examples" / "mla_pyfunc.py"),
            artifacts={"checkpoint": str(root / "checkpoint")},
            signature=signature(),
            pip_requirements=["torch"],
        )
    version = mlflow.register_model(info.model_uri, "weights").version
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server_url())
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        uri = f"models:/weights/{version}"
        outcome = run_step(pull_model.main, pull_model.arguments, ["--model-uri", uri], root / "pull")
    assert outcome.code == 0, outcome.message
    build("cpu", root / "kernel")
    origin = json.loads((outcome.output("provenance") / "provenance.json").read_text())
    return {"root": root, "origin": origin, "version": version, "run_id": run.info.run_id}


@pytest.fixture
def root(released: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The step's /opt/ml, with all inputs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_url())
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLA_WEIGHTS_CACHE", str(tmp_path / "cache"))
    give_release(tmp_path, "weights", released["version"], released["run_id"])
    inputs = tmp_path / "processing" / "input"
    (inputs / "provenance" / "provenance.json").write_text(json.dumps(released["origin"]))
    evaluation = json.loads((inputs / "evaluation" / "evaluation.json").read_text())
    evaluation["requested"] = {"kv_cache_dtype": "float32"}
    (inputs / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    shutil.rmtree(inputs / "kernel")
    shutil.copytree(released["root"] / "kernel", inputs / "kernel")
    return tmp_path


def register(root: Path, stage: str = "staging", arn: str = ARN):
    argv = ["--model-package-arn", arn, "--endpoint-name", "e", "--stage", stage]
    argv += ["--register-accelerated", "fast"]
    return run_step(record_release.main, record_release.arguments, argv, root)


def promote(root: Path, released: dict, arn: str = ARN):
    from tests.steps.test_record_release import give_promotion

    give_promotion(root, "weights", released["version"], released["run_id"], arn)
    argv = ["--model-package-arn", arn, "--endpoint-name", "live", "--stage", "production"]
    return document(run_step(record_release.main, record_release.arguments, argv, root))


@pytest.mark.slow
def test_a_batch_job_runs_the_released_kernel(root: Path, released: dict, tmp_path: Path) -> None:
    written = document(register(root))
    assert any("accelerated model fast version" in line for line in written["recorded"])
    client = mlflow.MlflowClient(tracking_uri=server_url(), registry_uri=server_url())
    found = client.get_model_version_by_alias("fast", "staging")
    assert found.tags["mla.model_package_arn"] == ARN

    engine = Engine.load(
        released["root"] / "checkpoint", released["root"] / "kernel", kv_cache_dtype="float32"
    )
    expected = engine.generate([PROMPT], max_tokens=8)[0].text

    elsewhere = (
        tmp_path / "elsewhere"
    )  # neither this repository on the path nor a kernel cache: only the model's own
    elsewhere.mkdir()
    command = [
        sys.executable,
        str(ROOT / "examples" / "batch_inference.py"),
        "--model",
        "models:/fast@staging",
    ]
    command += ["--prompt", PROMPT, "--prompt", "x", "--max-new-tokens", "8", "--output", "out.jsonl"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLA_KERNEL_CACHE": str(elsewhere / "none"), "CXX": "/bin/false"}
    result = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (elsewhere / "out.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": PROMPT, "completion": expected}
    assert rows[1]["prompt"] == "x"


SPARK = """
import json, sys
from pyspark.sql import SparkSession
sys.path.insert(0, sys.argv[1])
from batch_inference import spark_udf
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
complete = spark_udf(spark, "models:/fast@staging", max_new_tokens=8)
table = spark.createDataFrame([(text,) for text in sys.argv[2:]], ["prompt"])
print(json.dumps([row.asDict() for row in table.withColumn("completion", complete("prompt")).collect()]))
"""


def no_spark() -> str | None:
    """Why Spark cannot run here, None when it can."""
    if not importlib.util.find_spec("pyspark"):
        return "pyspark is not installed (pip install pyspark)"
    return None if shutil.which("java") else "no Java (Debian: apt-get install openjdk-17-jre-headless)"


@pytest.mark.slow
@pytest.mark.skipif(no_spark() is not None, reason=no_spark() or "")
def test_spark_runs_the_released_kernel(root: Path, released: dict, tmp_path: Path) -> None:
    """examples/batch_inference.py's Spark function, in Spark's own worker process."""
    document(register(root))
    engine = Engine.load(
        released["root"] / "checkpoint", released["root"] / "kernel", kv_cache_dtype="float32"
    )
    expected = [engine.generate([text], max_tokens=8)[0].text for text in (PROMPT, "x")]
    environment = os.environ | {
        "CXX": "/bin/false",
        "MLA_KERNEL_CACHE": str(tmp_path / "none"),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", SPARK, str(ROOT / "examples"), PROMPT, "x"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    assert [row["completion"] for row in rows] == expected


def test_each_release_keeps_its_own_kernel(root: Path, released: dict, tmp_path: Path) -> None:
    """The registry of an MLflow server refers to the run's files: another release must not replace them."""
    client = mlflow.MlflowClient(tracking_uri=server_url(), registry_uri=server_url())
    library = root / "processing" / "input" / "kernel" / "cpu" / "libmla_decode.so"
    arns, versions, kernels = [f"{ARN}-first", f"{ARN}-second"], [], [b"first", b"second"]
    for arn, kernel in zip(arns, kernels, strict=True):
        library.write_bytes(kernel)
        document(register(root, arn=arn))
        versions.append(client.get_model_version_by_alias("fast", "staging").version)
    document(register(root, arn=arns[1]))
    assert client.get_model_version_by_alias("fast", "staging").version == versions[1], "registered twice"
    for version, kernel in zip(versions, kernels, strict=True):
        source = client.get_model_version("fast", version).source
        artifact = f"{source}/artifacts/kernel/cpu/libmla_decode.so"
        local = mlflow.artifacts.download_artifacts(artifact, dst_path=str(tmp_path / version))
        assert Path(local).read_bytes() == kernel

    assert (
        f"accelerated model fast version {versions[1]}, alias production"
        in (promote(root, released, arns[1])["recorded"])
    )
    promoted = client.get_model_version_by_alias("fast", "production")
    assert (promoted.version, promoted.tags["mla.endpoint"]) == (versions[1], "live")
    promote(root, released, arns[0])  # the version's tag names the later release's
    assert client.get_model_version_by_alias("fast", "production").version == versions[1]


def test_the_signature_is_the_accelerated_models_own(released: dict, tmp_path: Path) -> None:
    """Whatever parameters the weights' own model had, the engine would not know them."""
    from steps.registry.accelerated import save
    from steps.registry.accelerated_model import DEFAULTS

    params = '[{"name": "max_length", "default": 20, "type": "long", "shape": null}]'
    strange = {"inputs": '[{"type": "long", "name": "x", "required": true}]', "params": params}
    origin = released["origin"] | {"signature": strange}
    save(tmp_path / "m", origin, released["root"] / "kernel", backend="cpu", kv_cache_dtype="float32")
    model = mlflow.models.Model.load(str(tmp_path / "m"))
    assert model.signature.inputs.input_names() == ["prompt"]
    assert {param.name: param.default for param in model.signature.params} == DEFAULTS
    assert model.metadata["mla_weights"] == f"models:/weights/{released['version']}", "an alias moves"


def test_the_row_without_a_prompt_is_named() -> None:
    import pandas as pd

    from steps.registry.accelerated_model import prompts

    for table in (pd.DataFrame({"prompt": ["a", "b"]}), {"text": ["a", "b"]}, ["a", {"prompt": "b"}]):
        assert prompts(table) == ["a", "b"]
    assert prompts("a") == prompts({"prompt": "a"}) == ["a"]
    for bad in (None, "", float("nan"), 3):
        with pytest.raises(ValueError, match="row 1 holds"):
            prompts(pd.DataFrame({"prompt": ["a", bad]}))


def test_the_weights_come_once_a_machine(root: Path, released: dict, tmp_path: Path, monkeypatch) -> None:
    """Spark starts a worker a core, all at once."""
    from steps.registry import accelerated_model

    files = [file for file in released["origin"]["files"] if file["path"].startswith("artifacts/checkpoint/")]
    config = {"weights_uri": f"models:/weights/{released['version']}", "files": files}
    fetched, fetch = [], mlflow.artifacts.download_artifacts
    monkeypatch.setattr(
        mlflow.artifacts, "download_artifacts", lambda *a, **k: fetched.append(a) or fetch(*a, **k)
    )
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(accelerated_model.weights, [config] * 4))
    assert len(folders) == len(fetched) == 1
    [folder] = folders
    shutil.rmtree(folder)
    left = folder.with_name(f".{folder.name}-killed")
    left.mkdir()
    assert accelerated_model.weights(config) == folder
    assert not left.exists()


def test_weights_that_were_changed_are_refused(
    root: Path, released: dict, tmp_path: Path, monkeypatch
) -> None:
    from steps.registry.accelerated_model import check, weights

    files = [file for file in released["origin"]["files"] if file["path"].startswith("artifacts/checkpoint/")]
    config = {"weights_uri": f"models:/weights/{released['version']}", "files": files}
    folder = weights(config)
    assert (folder / "artifacts" / "checkpoint" / "model.safetensors").is_file()
    assert weights(config) == folder, "the second use comes from the cache"
    config["files"] = [{**files[0], "sha256": "0" * 64}]
    with pytest.raises(RuntimeError, match="released was 0000"):
        weights(config)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]
    with pytest.raises(RuntimeError, match="missing or has another size"):
        check(tmp_path, files)
    monkeypatch.setenv("MLA_WEIGHTS", str(folder))
    assert weights({"files": files}) == folder


def test_a_promotion_cannot_register_it(root: Path) -> None:
    from tests.steps.test_record_release import give_promotion

    give_promotion(root, "-", "-", "-")
    failed(register(root, "production"), "--stage staging")


def test_weights_without_a_run_are_refused(root: Path, released: dict) -> None:
    origin = released["origin"] | {"run_id": "-"}
    (root / "processing" / "input" / "provenance" / "provenance.json").write_text(json.dumps(origin))
    failed(register(root), "names none")
