"""VerifyPackage: S3 is moto's; the package comes from scripted answers, since moto drops its metadata."""

import hashlib
import json
from datetime import UTC, datetime

import boto3
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from kernels.package import combined_sha256
from steps import aws, verify_package
from steps.job import StepError
from tests.steps.support import StepRun

ARN = "arn:aws:sagemaker:us-east-1:123456789012:model-package/mla-models/3"
LIBRARY = b"\x7fELF library"
LIBRARY_SHA = hashlib.sha256(LIBRARY).hexdigest()
KERNEL_SHA = combined_sha256({"cpu": LIBRARY_SHA})
INDEX = {
    "schema_version": 1,
    "requested": "auto",
    "packages": {"cpu": {"sha256": LIBRARY_SHA}},
    "sha256": KERNEL_SHA,
}


@pytest.fixture
def account(monkeypatch):
    """A bucket with weights and kernel, and a function that sets what the registry answers."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        s3, sagemaker = boto3.client("s3"), boto3.client("sagemaker")
        s3.create_bucket(Bucket="models")
        s3.put_object(Bucket="models", Key="model/artifacts/checkpoint/model.safetensors", Body=b"weights")
        s3.put_object(Bucket="models", Key="model/MLmodel", Body=b"x")
        s3.put_object(Bucket="models", Key="kernel/index.json", Body=json.dumps(INDEX).encode())
        s3.put_object(Bucket="models", Key="kernel/cpu/libmla_decode.so", Body=LIBRARY)
        monkeypatch.setattr(aws, "client", lambda name: {"s3": s3, "sagemaker": sagemaker}[name])
        with Stubber(sagemaker) as stubber:
            yield s3, lambda **changes: stubber.add_response("describe_model_package", package(**changes))


def package(metadata=None, channel="kernel", kernel_uri=None, weights="s3://models/model/", **changes):
    def source(uri):
        return {"S3DataSource": {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}}

    container = {
        "Image": "serve:1",
        "Environment": {"MLA_KERNEL_BACKEND": "cpu"},
        "ModelDataSource": source(weights),
        "AdditionalModelDataSources": [{"ChannelName": channel, **source("s3://models/kernel/")}],
    }
    if kernel_uri:  # endpoint.kernel_delivery: download
        del container["AdditionalModelDataSources"]
        container["Environment"] |= {"MLA_KERNEL_S3_URI": kernel_uri}
    return {
        "ModelPackageName": "mla-models/3",
        "ModelPackageArn": ARN,
        "ModelPackageGroupName": "mla-models",
        "ModelPackageVersion": 3,
        "CreationTime": datetime(2026, 11, 24, tzinfo=UTC),
        "ModelPackageStatus": "Completed",
        "ModelPackageStatusDetails": {"ValidationStatuses": []},
        "ModelApprovalStatus": "Approved",
        "CustomerMetadataProperties": metadata or {"KernelSha256": KERNEL_SHA, "MlflowModelName": "mla-demo"},
        "InferenceSpecification": {
            "Containers": [container],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
    } | changes


def verify(tmp_path, group="mla-models"):
    run = StepRun(verify_package, tmp_path).start(model_package_arn=ARN, model_package_group=group)
    return run.json("package", "package.json")


def test_an_approved_version_is_described_for_the_next_steps(account, tmp_path):
    account[1]()
    document = verify(tmp_path)
    assert document["model_package_arn"] == ARN
    assert document["approval_status"] == "Approved"
    assert document["customer_metadata"]["MlflowModelName"] == "mla-demo"
    assert document["weights"] == {"uri": "s3://models/model/", "objects": 2, "bytes": 8}
    assert document["kernel"] == {"uri": "s3://models/kernel/", "sha256": KERNEL_SHA, "targets": ["cpu"]}


def test_a_kernel_that_the_server_downloads_is_verified_as_well(account, tmp_path):
    s3, registry = account
    registry(kernel_uri="s3://models/kernel/")
    kernel = verify(tmp_path)["kernel"]
    assert kernel == {"uri": "s3://models/kernel/", "sha256": KERNEL_SHA, "targets": ["cpu"]}
    registry(kernel_uri="s3://models/kernel/")
    s3.put_object(Bucket="models", Key="kernel/cpu/libmla_decode.so", Body=b"\x7fELF evil")
    with pytest.raises(StepError, match=r"cpu/libmla_decode\.so .* has SHA-256"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ModelApprovalStatus": "Rejected", "ApprovalDescription": "too slow"}, r"is Rejected \(too slow\)"),
        ({"ModelApprovalStatus": "PendingManualApproval"}, "is PendingManualApproval"),
        ({"ModelPackageStatus": "Failed"}, "status Failed"),
        ({"ModelPackageGroupName": "others"}, "is of group 'others'"),
        ({"channel": "adapter"}, "hold adapter, not 'kernel'"),
        ({"weights": "s3://models/nothing/"}, "No .safetensors object below s3://models/nothing/"),
        ({"metadata": {"KernelSha256": "0" * 64}}, f"says {KERNEL_SHA}.*registered with 0000"),
        ({"metadata": {"Other": "x"}}, "registered with none"),
    ],
)
def test_what_does_not_agree_is_named(account, tmp_path, changes, message):
    account[1](**changes)
    with pytest.raises(StepError, match=message):
        verify(tmp_path)


def test_a_changed_library_is_found_although_the_index_agrees(account, tmp_path):
    s3, registry = account
    registry()
    s3.put_object(Bucket="models", Key="kernel/cpu/libmla_decode.so", Body=b"\x7fELF evil")
    with pytest.raises(StepError, match=r"cpu/libmla_decode\.so .* has SHA-256"):
        verify(tmp_path)


def test_an_index_whose_packages_were_swapped_is_found(account, tmp_path):
    s3, registry = account
    registry()
    evil = b"\x7fELF evil"
    index = INDEX | {"packages": {"cpu": {"sha256": hashlib.sha256(evil).hexdigest()}}}
    s3.put_object(Bucket="models", Key="kernel/cpu/libmla_decode.so", Body=evil)
    s3.put_object(Bucket="models", Key="kernel/index.json", Body=json.dumps(index).encode())
    with pytest.raises(StepError, match="Kernel hash differs"):
        verify(tmp_path)


@pytest.mark.parametrize("key", ["kernel/index.json", "kernel/cpu/libmla_decode.so"])
def test_a_missing_object_is_named(account, tmp_path, key):
    s3, registry = account
    registry()
    s3.delete_object(Bucket="models", Key=key)
    with pytest.raises(StepError, match=f"{key.rpartition('/')[2]} is missing"):
        verify(tmp_path)


def test_an_empty_weight_file_is_named(account, tmp_path):
    s3, registry = account
    registry()
    s3.put_object(Bucket="models", Key="model/artifacts/checkpoint/model.safetensors", Body=b"")
    with pytest.raises(StepError, match=r"Empty weight files .*model\.safetensors"):
        verify(tmp_path)


@pytest.mark.parametrize("change", [None, "edited", "added", "manifest"])
def test_every_file_of_an_installed_package_is_verified(account, tmp_path, change):
    s3, registry = account
    body = b"def flash_mla_with_kvcache(): ..."
    files = {"flash_mla/__init__.py": hashlib.sha256(body).hexdigest()}
    sha = combined_sha256(files)
    whole = combined_sha256({"flash_mla": sha})
    index = INDEX | {"packages": {"flash_mla": {"sha256": sha}}, "sha256": whole}
    objects = {
        "index.json": json.dumps(index).encode(),
        "flash_mla/manifest.json": json.dumps({"files": files}).encode(),
        "flash_mla/site/flash_mla/__init__.py": body,
    }
    if change == "edited":
        objects["flash_mla/site/flash_mla/__init__.py"] = b"evil"
    elif change == "added":
        objects["flash_mla/site/torch.py"] = b"evil"
    elif change == "manifest":
        objects["flash_mla/manifest.json"] = json.dumps({"files": {}}).encode()
    for key, value in objects.items():
        s3.put_object(Bucket="models", Key=f"kernel/{key}", Body=value)
    registry(metadata={"KernelSha256": whole})
    if change is None:
        assert verify(tmp_path)["kernel"]["targets"] == ["flash_mla"]
    else:
        with pytest.raises(StepError, match=r"__init__\.py .* has SHA-256|is not what its index says"):
            verify(tmp_path)
