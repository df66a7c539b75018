"""VerifyPackage, DeployProduction and SmokeTest against the sandbox, which runs the real serving process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from container.serving.engine import Engine, Options
from kernels.build import build
from kernels.package import KernelIndex, file_sha256
from kernels.workloads import parse_workload
from steps import deploy_production, smoke_test, verify_package
from steps.evaluation.operator import Sizes
from steps.evaluation.production import Candidate, compare_with_production, worst_regression
from steps.evaluation.schema import Production
from steps.job import StepError
from tests.steps.support import StepRun
from tests.steps.tiny_model import write_model

BUCKET, GROUP, ENDPOINT = "mla-artifacts", "mla-models", "mla-production"
# Moto's state belongs to a process, and other tests have a sandbox too: this one gets its own process.
SERVE = """
import sys
from pathlib import Path
from pipelines.sandbox import Sandbox
from pipelines.sandbox.account import prepare_account
with Sandbox(Path(sys.argv[1]), job_environment={"OMP_NUM_THREADS": "1"}) as sandbox:
    role = prepare_account(sandbox.endpoint_url, bucket=sys.argv[2], role_name="runner", region="us-east-1")
    print(sandbox.endpoint_url, role, flush=True)
    sys.stdin.read()
"""


class Account:
    """The registry's side: uploads a release and registers it."""

    def __init__(self, role: str, kernel: Path) -> None:
        self.role, self.kernel = role, kernel
        self.s3, self.sagemaker = boto3.client("s3"), boto3.client("sagemaker")
        self.sagemaker.create_model_package_group(ModelPackageGroupName=GROUP)

    def upload(self, folder: Path, prefix: str) -> dict[str, str]:
        for path in folder.rglob("*"):
            if path.is_file():
                self.s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        return {"S3Uri": f"s3://{BUCKET}/{prefix}/", "S3DataType": "S3Prefix", "CompressionType": "None"}

    def register(self, model: Path, name: str, status: str = "Approved") -> str:
        container = {
            "Image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/mla-serve:local",
            "Environment": {"MLA_KERNEL_BACKEND": "cpu"},
            "ModelDataSource": {"S3DataSource": self.upload(model, f"{name}/model")},
            "AdditionalModelDataSources": [
                {"ChannelName": "kernel", "S3DataSource": self.upload(self.kernel, f"{name}/kernel")}
            ],
        }
        index = json.loads((self.kernel / "index.json").read_text())
        return self.sagemaker.create_model_package(
            ModelPackageGroupName=GROUP,
            ModelApprovalStatus=status,
            CustomerMetadataProperties={"KernelSha256": index["sha256"], "MlflowModelName": name},
            InferenceSpecification={
                "Containers": [container],
                "SupportedContentTypes": ["application/json"],
                "SupportedResponseMIMETypes": ["application/json"],
                "SupportedRealtimeInferenceInstanceTypes": ["ml.c7i.xlarge"],
            },
        )["ModelPackageArn"]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    build("cpu", folder)
    return folder


@pytest.fixture(scope="module")
def account(tmp_path_factory, kernel) -> Iterator[Account]:
    command = [sys.executable, "-c", SERVE, str(tmp_path_factory.mktemp("sandbox")), BUCKET]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        url, role = process.stdout.readline().split()
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", url)
            patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patched.setenv("AWS_ACCESS_KEY_ID", "sandbox")
            patched.setenv("AWS_SECRET_ACCESS_KEY", "sandbox")
            yield Account(role, kernel)
        process.stdin.close()
        process.wait(30)


def promote(account: Account, arn: str, root: Path) -> dict:
    """The production pipeline's first two steps, chained as the pipeline chains them."""
    verify = StepRun(verify_package, root / "verify").start(model_package_arn=arn, model_package_group=GROUP)
    deploy = StepRun(deploy_production, root / "deploy").give(
        "package", "package.json", verify.json("package", "package.json")
    )
    deploy.start(
        model_package_arn=arn,
        endpoint_name=ENDPOINT,
        instance_type="ml.c7i.xlarge",
        instance_count=1,
        role_arn=account.role,
        deployment=json.dumps(
            {
                "strategy": "canary",
                "step_size": "50%",
                "bake_seconds": 0,
                "timeout_seconds": 600,
                "startup_timeout_seconds": 60,
            }
        ),
    )
    return deploy.json("deployment", "deployment.json")


def smoke(token_ids: list[int], deployed: dict, root: Path) -> dict:
    expected = {"prompt": "The assert", "max_tokens": 6, "token_ids": token_ids, "text": ""}
    run = StepRun(smoke_test, root).give("evaluation", "evaluation.json", {"model": {"smoke": expected}})
    config = deployed["endpoint_config_name"]
    return run.start(endpoint_name=ENDPOINT, endpoint_config_name=config).json("smoke", "smoke.json")


@pytest.mark.slow
def test_approved_versions_reach_production_and_a_broken_one_is_rolled_back(account, kernel, tmp_path):
    models = [write_model(tmp_path / f"model-{seed}", seed) for seed in (1, 2)]
    tokens = []
    for model in models:
        engine = Engine.load(model, kernel, backend="cpu", options=Options(max_batch=1, cache_tokens=512))
        tokens.append(engine.generate(["The assert"], max_tokens=6)[0].token_ids)
    assert tokens[0] != tokens[1]

    first = account.register(models[0], "one")
    created = promote(account, first, tmp_path / "a")
    assert created["action"] == "created"
    smoke(tokens[0], created, tmp_path / "a-smoke")
    with pytest.raises(StepError, match=r"other tokens than were evaluated"):
        smoke(tokens[1], created, tmp_path / "a-wrong")

    assert promote(account, first, tmp_path / "b")["action"] == "unchanged"

    updated = promote(account, account.register(models[1], "two"), tmp_path / "c")
    assert updated["action"] == "updated"
    assert updated["previous_endpoint_config_name"] == created["endpoint_config_name"]
    smoke(tokens[1], updated, tmp_path / "c-smoke")
    with pytest.raises(StepError, match=r"this release deployed mla-models-v1-"):
        smoke(tokens[1], created, tmp_path / "c-other")

    weights = models[0] / "artifacts" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StepError, match=r"rolled back: it serves .*, not "):
        promote(account, account.register(models[0], "broken"), tmp_path / "d")
    smoke(tokens[1], updated, tmp_path / "d-smoke")  # the old version still answers


def test_a_pending_version_stops_at_verification(account, tmp_path):
    model = write_model(tmp_path / "model")
    arn = account.register(model, "pending", status="PendingManualApproval")
    with pytest.raises(StepError, match="is PendingManualApproval, not Approved"):
        promote(account, arn, tmp_path)


def scaled_head(folder: Path, factor: float) -> Path:
    """The model of seed 1 with the logits multiplied: 0 gives the perplexity of guessing, 3 a worse one."""
    path = write_model(folder, 1) / "artifacts" / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def beside_production(model: Path, kernel: Path, scratch: Path, endpoint: str = ENDPOINT) -> Production:
    candidate = Candidate(model, kernel, KernelIndex.load(kernel), "cpu", "bfloat16", {})
    sizes = Sizes(4, 512, 64, torch.float32, torch.bfloat16, 0.1)
    cases = parse_workload("1x64")
    return compare_with_production(endpoint, candidate, sizes, cases, torch.device("cpu"), scratch)


@pytest.mark.slow
def test_a_release_is_measured_beside_the_version_in_production(account, kernel, tmp_path):
    live = write_model(tmp_path / "live", 1)
    nothing = beside_production(live, kernel, tmp_path, "no-such-endpoint")
    assert nothing.model_package_arn is None
    assert "no endpoint 'no-such-endpoint'" in nothing.reason
    assert worst_regression(nothing) == 0

    weights = live / "artifacts" / "checkpoint" / "model.safetensors"
    listed = {"path": str(weights.relative_to(live)), "sha256": file_sha256(weights)}
    arn = account.register(live, "live")
    provenance = {"Bucket": BUCKET, "Key": "live/provenance/provenance.json"}
    account.s3.put_object(**provenance, Body=json.dumps({"files": [listed]}))
    promote(account, arn, tmp_path / "promotion")

    same = beside_production(live, kernel, tmp_path)
    assert (same.model_package_arn, same.reason, same.interleaved) == (arn, None, True)
    assert same.operator_regression_percent == 0  # the same library
    assert (same.quality_regression_percent, same.choices_equal_percent) == (0, 100)
    better = beside_production(scaled_head(tmp_path / "better", 0.0), kernel, tmp_path)
    assert better.candidate_perplexity == pytest.approx(256, rel=1e-3)
    assert better.quality_regression_percent < -10
    worse = beside_production(scaled_head(tmp_path / "worse", 3.0), kernel, tmp_path)
    assert worst_regression(worse) >= worse.quality_regression_percent > 10
    assert not list(tmp_path.glob("production-*"))  # the live version's files are gone again

    account.s3.put_object(**provenance, Body=json.dumps({"files": [listed | {"sha256": "0" * 64}]}))
    with pytest.raises(StepError, match=r"live in production, is not what was released"):
        beside_production(live, kernel, tmp_path)
