"""The whole chain for real: training, registry, compiler, measurement, registration, endpoints, approval.

The tests build on one release and run in the order in which they stand.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from rich.console import Console

from pipelines import run, service, versions
from pipelines.display import Display
from pipelines.errors import UserError
from tests.e2e.conftest import QUICK, Chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = {
    "PullModel", "CompileKernel", "Evaluate", "QualityGate", "RegisterModel", "CreateModel",
    "CreateEndpointConfig", "DeployStaging", "SmokeTest", "RecordRelease",
}  # fmt: skip


def quiet() -> Display:
    return Display(Console(quiet=True))


def tags(chain: Chain, version: str) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(chain.local.mlflow.uri, chain.local.mlflow.uri)
    return dict(client.get_model_version(run.DEMO, version).tags)


def alias(chain: Chain, name: str) -> str | None:
    from mlflow import MlflowClient

    client = MlflowClient(chain.local.mlflow.uri, chain.local.mlflow.uri)
    return client.get_registered_model(run.DEMO).aliases.get(name)


def explain(chain: Chain, execution: service.Execution) -> str:
    """Why it failed, with the failed steps' logs."""
    failed = [step.name for step in execution.steps if step.status == "Failed"]
    logs = [line for name in failed for line in service.logs(chain.aws, execution.arn, name)]
    return "\n".join([service.reason(execution), *logs])


def test_the_release_passes_every_step(chain: Chain) -> None:
    assert chain.summary.status == "Succeeded"
    assert set(chain.summary.seconds) >= STEPS
    evaluation = json.loads(Path(chain.summary.report).with_name("evaluation.json").read_text())
    assert evaluation["correctness"]["passed"]
    assert all(case["passed"] for case in evaluation["correctness"]["cases"])
    assert "<html" in Path(chain.summary.report).read_text()
    saved = json.loads(Path(chain.summary.report).with_name("summary.json").read_text())
    assert saved["release"] == chain.summary.release


def test_the_package_holds_weights_kernel_and_figures(chain: Chain) -> None:
    answer = chain.aws.sagemaker.describe_model_package(ModelPackageName=chain.summary.model_package_arn)
    container = answer["InferenceSpecification"]["Containers"][0]
    weights = container["ModelDataSource"]["S3DataSource"]["S3Uri"]
    kernel = container["AdditionalModelDataSources"][0]["S3DataSource"]["S3Uri"]
    assert any(key.endswith("model.safetensors") for key in keys(chain, weights))
    assert any(key.endswith("cpu/libmla_decode.so") for key in keys(chain, kernel))
    evaluation = json.loads(Path(chain.summary.report).with_name("evaluation.json").read_text())
    metadata = answer["CustomerMetadataProperties"]
    assert metadata["MlflowModelName"] == run.DEMO
    assert metadata["KernelSha256"] == evaluation["kernel_sha256"]
    assert float(metadata["Speedup"]) == evaluation["gate"]["speedup"]
    assert container["Environment"]["MLA_KERNEL_BACKEND"] == evaluation["backend"] == "cpu"
    assert tags(chain, metadata["MlflowModelVersion"])["mla.model_package_arn"] == answer["ModelPackageArn"]


def keys(chain: Chain, uri: str) -> list[str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return [one["Key"] for one in chain.aws.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]


def test_staging_answers_over_http(chain: Chain) -> None:
    answer = service.invoke(chain.aws, chain.summary.staging_endpoint, "The assert", 8)
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 8


def test_the_logs_of_a_step_and_of_an_endpoint_are_readable(chain: Chain) -> None:
    arn = service.latest(chain.aws, chain.release)
    assert any("compile_kernel" in line for line in service.logs(chain.aws, arn, "CompileKernel"))
    assert list(service.logs(chain.aws, arn, "DeployStaging"))


def test_neither_a_pending_nor_a_rejected_version_deploys(chain: Chain) -> None:
    assert chain.before_decision["status"] == "PendingManualApproval"
    assert chain.before_decision["executions"]["PipelineExecutionSummaries"] == []
    assert chain.summary.approval == "Rejected"
    time.sleep(1.0)  # an event would have arrived
    assert chain.production_executions() == []
    assert alias(chain, "production") is None
    with pytest.raises(chain.aws.sagemaker.exceptions.ClientError):
        chain.aws.sagemaker.describe_endpoint(EndpointName="mla-production")


def test_production_started_by_hand_refuses_a_rejected_version(chain: Chain) -> None:
    arn = service.start(chain.aws, chain.production, {"ModelPackageArn": chain.summary.model_package_arn})
    ended = service.wait(chain.aws, arn, 0.2, 120)
    assert ended.status == "Failed"
    assert "Rejected" in ended.step("VerifyPackage").failure
    assert [step.name for step in ended.steps] == ["VerifyPackage"]


def test_approval_by_a_plain_client_moves_the_version_to_production(chain: Chain) -> None:
    package = chain.summary.model_package_arn
    started = len(chain.production_executions())
    boto3.Session(region_name="us-east-1").client("sagemaker").update_model_package(
        ModelPackageArn=package, ModelApprovalStatus="Approved"
    )
    deadline = time.monotonic() + 30
    while len(chain.production_executions()) == started and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = service.wait(chain.aws, service.latest(chain.aws, chain.production), 0.2, 180)
    assert ended.status == "Succeeded", explain(chain, ended)
    answer = service.invoke(chain.aws, "mla-production", "The assert", 4)
    assert answer["usage"]["completion_tokens"] == 4
    version = versions.package(chain.aws, package).metadata["MlflowModelVersion"]
    assert alias(chain, "production") == version
    assert tags(chain, version)["mla.stage"] == "production"


def test_the_sdk_starts_and_waits_and_a_second_delivery_changes_nothing(chain: Chain) -> None:
    live = chain.aws.sagemaker.describe_endpoint(EndpointName="mla-production")["EndpointConfigName"]
    execution = chain.sdk[chain.production].start({"ModelPackageArn": chain.summary.model_package_arn})
    execution.wait(delay=1, max_attempts=120)
    assert execution.describe()["PipelineExecutionStatus"] == "Succeeded"
    after = chain.aws.sagemaker.describe_endpoint(EndpointName="mla-production")
    assert (after["EndpointConfigName"], after["EndpointStatus"]) == (live, "InService")


def test_a_missed_limit_fails_with_the_figures_and_registers_nothing(chain: Chain) -> None:
    before = chain.packages()
    live = chain.aws.sagemaker.describe_endpoint(EndpointName="mla-production")["EndpointConfigName"]
    values = {**QUICK, "MinSpeedup": "1000000", "StagingEndpointName": "mla-production"}
    with pytest.raises(run.ReleaseFailed) as error:
        run.run(chain.local, quiet(), values)
    message = str(error.value)
    assert message.startswith("GateFailed: ")
    assert "(>= 1000000" in message
    assert "staging endpoint mla-production (not mla-production)" in message
    after = chain.aws.sagemaker.describe_endpoint(EndpointName="mla-production")["EndpointConfigName"]
    assert after == live
    evaluation = json.loads((newest(chain) / "evaluation.json").read_text())
    assert str(evaluation["gate"]["speedup"]) in message
    assert str(evaluation["gate"]["relative_error"]) in message
    assert json.loads((newest(chain) / "summary.json").read_text())["status"] == "Failed"
    assert chain.packages() == before


def newest(chain: Chain) -> Path:
    return max((chain.local.state / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def checkpoint(chain: Chain, name: str) -> Path:
    """A file of the demo model in the MLflow server's own store."""
    found = list((chain.local.state / "mlflow" / "artifacts").rglob(f"checkpoint/{name}"))
    assert len(found) == 1
    return found[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget_mla(path: Path) -> None:
    config = json.loads(path.read_text())
    del config["kv_lora_rank"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "values", "words"),
    [
        (None, {"ModelUri": "models:/mla-demo@champoin"}, "champoin"),
        (None, {"ModelUri": "models:/nothing/1"}, "nothing"),
        (("model.safetensors", truncate), {}, "model.safetensors"),
        (("config.json", forget_mla), {}, "kv_lora_rank"),
    ],
)
def test_a_model_that_cannot_be_released_stops_at_the_pull(
    chain: Chain, damage: Any, values: dict[str, str], words: str
) -> None:
    before = chain.packages()
    path = checkpoint(chain, damage[0]) if damage else None
    whole = path.read_bytes() if path else b""
    try:
        if path:
            damage[1](path)
        arn = service.start(chain.aws, chain.release, {**QUICK, **values})
        ended = service.wait(chain.aws, arn, 0.2, 180)
    finally:
        if path:
            path.write_bytes(whole)
    assert ended.status == "Failed"
    assert words in ended.step("PullModel").failure
    assert {step.name for step in ended.steps} <= {"PullModel", "CompileKernel"}
    assert chain.packages() == before
    with pytest.raises(UserError):
        service.report(chain.aws, arn, chain.local.state / "none")
