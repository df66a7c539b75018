"""The chain of a release, from a real MLflow server and a sandbox account, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from pipelines.sandbox import Sandbox
from pipelines.sandbox.account import prepare_account
from steps.job import StepError
from steps.registry import chain
from tests.databricks.mlflow_server import server_url

BUCKET, REGION, KERNEL = "releases", "us-east-1", "ab" * 32


class Account:
    """A sandbox account with one bucket, and the release that a test makes in it."""

    def __init__(self, sandbox: Sandbox) -> None:
        options: dict[str, Any] = {"endpoint_url": sandbox.endpoint_url, "region_name": REGION}
        self.endpoint_url = sandbox.endpoint_url
        self.role = prepare_account(sandbox.endpoint_url, bucket=BUCKET, role_name="r", region=REGION)
        self.sagemaker, self.s3 = boto3.client("sagemaker", **options), boto3.client("s3", **options)

    def put(self, key: str, document: object) -> str:
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(document).encode())
        return f"s3://{BUCKET}/{key}"

    def register(self, name: str, version: str, run_id: str) -> str:
        """A model package of `name` as the release pipeline registers it. Returns its ARN."""
        self.put(f"{name}/model/MLmodel", "")
        self.put(f"{name}/kernel/index.json", {"sha256": KERNEL, "packages": {"cpu": {"sha256": "1"}}})
        statistics = self.put(f"{name}/evaluation.json", {"backend": "cpu", "gate": {"correct": 1}})
        self.sagemaker.create_model_package_group(ModelPackageGroupName=name)

        def source(key: str) -> dict[str, Any]:
            uri = f"s3://{BUCKET}/{name}/{key}/"
            return {"S3DataSource": {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}}

        container = {
            "Image": "image:1",
            "ModelDataSource": source("model"),
            "AdditionalModelDataSources": [{"ChannelName": "kernel", **source("kernel")}],
        }
        return self.sagemaker.create_model_package(
            ModelPackageGroupName=name,
            InferenceSpecification={
                "Containers": [container],
                "SupportedContentTypes": ["application/json"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
            ModelMetrics={
                "ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": statistics}}
            },
            CustomerMetadataProperties={
                "MlflowModelUri": f"models:/{name}/{version}",
                "MlflowModelName": name,
                "MlflowModelVersion": version,
                "MlflowRunId": run_id,
                "KernelSha256": KERNEL,
                "KernelBackend": "cpu",
                "RelativeError": "0.001",
                "Speedup": "2.5",
                "DecodeLatencyMs": "3.5",
            },
        )["ModelPackageArn"]

    def deploy(self, name: str, container: dict[str, Any]) -> None:
        self.sagemaker.create_model(ModelName=name, ExecutionRoleArn=self.role, Containers=[container])
        variant = {
            "VariantName": "all",
            "ModelName": name,
            "InstanceType": "ml.c7i.4xlarge",
            "InitialInstanceCount": 1,
        }
        self.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
        self.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with pytest.MonkeyPatch.context() as patch, Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield Account(sandbox)


@pytest.fixture
def environment(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", account.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_url())
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


@pytest.fixture(scope="module")
def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=server_url(), registry_uri=server_url())


@pytest.fixture
def version(client: mlflow.MlflowClient, request: pytest.FixtureRequest):
    """A registered version whose run has a parameter and a metric; named like the test."""
    name = request.node.name.replace("_", "-")
    run = client.create_run("0")
    client.log_param(run.info.run_id, "layers", 4)
    client.log_metric(run.info.run_id, "loss", 1.25)
    client.set_terminated(run.info.run_id)
    client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/model"
    return client.create_model_version(name, source, run.info.run_id)


def record(client: mlflow.MlflowClient, version, arn: str) -> None:
    for key, value in {"model_package_arn": arn, "kernel_sha256": KERNEL, "kernel_backend": "cpu"}.items():
        client.set_model_version_tag(version.name, version.version, f"mla.{key}", value)
    client.set_registered_model_alias(version.name, "staging", version.version)


def test_both_ends_give_the_same_chain(environment, account: Account, client, version) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    record(client, version, arn)
    account.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    account.deploy(f"{version.name}-p", {"ModelPackageName": arn})
    weights = account.sagemaker.describe_model_package(ModelPackageName=arn)["InferenceSpecification"]
    staging = weights["Containers"][0]["ModelDataSource"]
    account.deploy(f"{version.name}-s", {"Image": "image:1", "ModelDataSource": staging})

    found = chain.trace(arn)
    assert [(link.what, link.identity) for link in found.links[:5]] == [
        ("training run", version.run_id),
        ("model version", f"{version.name}/{version.version}"),
        ("kernel", KERNEL),
        ("evaluation", f"s3://{BUCKET}/{version.name}/evaluation.json"),
        ("model package", arn),
    ]
    assert {link.identity for link in found.links[5:]} == {f"{version.name}-p", f"{version.name}-s"}
    assert found.links[0].facts["parameters"] == {"layers": "4"}
    assert found.links[1].facts["aliases"] == ["staging"]
    assert found.links[2].facts["targets"] == ["cpu"]
    assert found.contradictions == []
    by_uri = chain.trace(f"models:/{version.name}@staging")
    assert [(a.what, a.identity) for a in by_uri.links] == [(b.what, b.identity) for b in found.links]


def test_what_was_changed_is_a_contradiction(environment, account: Account, client, version, capsys) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    record(client, version, arn)
    account.put(f"{version.name}/kernel/index.json", {"sha256": "cd" * 32})
    client.set_model_version_tag(version.name, version.version, "mla.kernel_backend", "hopper")
    assert chain.main([arn]) == 1
    out = capsys.readouterr().out
    assert f"holds {'cd' * 32}, the package says {KERNEL}" in out
    assert "kernel_backend: MLflow says hopper, the package cpu" in out


def test_a_version_that_was_not_released(environment, version, capsys) -> None:
    assert chain.main([f"models:/{version.name}/{version.version}"]) == 0
    out = capsys.readouterr().out
    assert f"training run: {version.run_id}" in out
    assert "note: not released" in out


def test_without_mlflow_the_package_tells_it(environment, account: Account, version, monkeypatch) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    found = chain.trace(arn)
    assert [link.what for link in found.links[:2]] == ["training run", "model version"]
    assert "MLFLOW_TRACKING_URI" in found.notes[0]


def test_a_version_that_is_gone_is_told_by_the_package(
    environment, account: Account, client, version, capsys
) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    client.delete_registered_model(version.name)
    assert chain.main([arn]) == 0
    out = capsys.readouterr().out
    assert f"model version: {version.name}/{version.version}" in out
    assert "told from the package alone" in out
    assert "does not exist" in out


def test_a_package_that_is_gone_is_noted(environment, client, version, capsys) -> None:
    arn = f"arn:aws:sagemaker:{REGION}:123456789012:model-package/deleted/1"
    record(client, version, arn)
    assert chain.main([f"models:/{version.name}/{version.version}"]) == 0
    out = capsys.readouterr().out
    assert f"training run: {version.run_id}" in out
    assert f"note: Reading model package {arn} failed" in out


def test_an_mlflow_that_does_not_answer(environment, account: Account, version, monkeypatch) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = chain.trace(arn)
    assert [link.what for link in found.links[:2]] == ["training run", "model version"]
    assert "No answer from the MLflow registry" in found.notes[0]


def test_a_package_that_does_not_exist(environment, capsys) -> None:
    arn = f"arn:aws:sagemaker:{REGION}:123456789012:model-package/absent/1"
    with pytest.raises(StepError, match="absent"):
        chain.trace(arn)
    assert chain.main([arn]) == 2


def test_json(environment, account: Account, client, version, capsys, tmp_path: Path) -> None:
    arn = account.register(version.name, version.version, version.run_id)
    record(client, version, arn)
    capsys.readouterr()
    assert chain.main([arn, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["links"][0]["identity"] == version.run_id
