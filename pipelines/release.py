"""The release pipeline: from an MLflow model to a measured, staged and registered version.

PullModel and CompileKernel run side by side; Evaluate measures the pair; the gate decides; what passes is
deployed to staging, tried over HTTP, registered and recorded in MLflow. One function a step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import sdk
from pipelines.gate import LIMITS
from pipelines.sdk import Builder, json_get, output_uri, text
from pipelines.settings import Settings

if TYPE_CHECKING:
    from sagemaker.mlops.workflow.condition_step import ConditionStep
    from sagemaker.mlops.workflow.endpoint_step import EndpointConfigStep, EndpointStep
    from sagemaker.mlops.workflow.fail_step import FailStep
    from sagemaker.mlops.workflow.model_step import ModelStep
    from sagemaker.mlops.workflow.steps import ProcessingStep

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
BUILD_MODULES = ("build.py", "targets.py", "flash_mla_install.py")


def get_pipeline(settings: Settings) -> sdk.CanonicalPipeline:
    """The pipeline of an environment. Makes no AWS call."""
    build = Builder(settings, "release")
    pull = pull_model(build)
    kernel = compile_kernel(build)
    evaluation = evaluate(build, pull, kernel)
    model = create_model(build, pull, kernel, evaluation)
    config = create_endpoint_config(build, model)
    endpoint = deploy_staging(build, config)
    smoke = smoke_test(build, evaluation, config, endpoint)
    package = register_model(build, pull, kernel, evaluation, smoke)
    record = record_release(build, pull, kernel, evaluation, package, endpoint)
    passed = [model, config, endpoint, smoke, package, record]
    gate = quality_gate(build, evaluation, passed, gate_failed(build, evaluation))
    return build.pipeline(settings.names.release_pipeline, [pull, kernel, evaluation, gate])


def pull_model(build: Builder) -> ProcessingStep:
    """Downloads and verifies the MLflow model. Never cached: an alias moves."""
    return build.job(
        "PullModel",
        "pull_model",
        description="Download the model from MLflow, verify every file, write its provenance",
        arguments={
            "--model-uri": build.p.ModelUri,
            "--allow-pickle": str(build.settings.mlflow.allow_pickled_weights).lower(),
            "--allow-requirement-conflicts": build.p.AllowRequirementConflicts,
        },
        outputs=("model", "provenance"),
        property_files={"Provenance": ("provenance", "provenance.json")},
        mlflow=True,
    )


def compile_kernel(build: Builder) -> ProcessingStep:
    """Builds the decode kernel where it will be measured.

    A cached step is found by its image, arguments and environment, so the machine and the sources stand in
    the environment: a kernel built for another GPU or from other sources is never taken. KernelSource counts
    by its text: a pinned version, or an archive under a name that is never used again.
    """
    return build.job(
        "CompileKernel",
        "compile_kernel",
        description="Compile the MLA decode kernel for the target",
        arguments={"--backend": build.p.KernelBackend, "--kernel-source": build.p.KernelSource},
        outputs=("kernel",),
        property_files={"KernelIndex": ("kernel", "index.json")},
        instance_type=build.p.ProcessingInstanceType,
        environment={
            "MLA_INSTANCE_TYPE": build.p.ProcessingInstanceType,
            "MLA_SOURCE_SHA256": kernel_sources_sha256(),
        },
        cache=True,
    )


def evaluate(build: Builder, pull: ProcessingStep, kernel: ProcessingStep) -> ProcessingStep:
    """Correctness, speed, the whole model, and all of it beside the version in production."""
    return build.job(
        "Evaluate",
        "evaluate",
        description="Prove the kernel correct and measure it and the model",
        arguments={
            "--backend": build.p.KernelBackend,
            "--kv-cache-dtype": build.p.KvCacheDtype,
            "--workload": build.p.Workload,
            "--production-endpoint": _production(build),
        },
        inputs={
            "model": output_uri(pull, "model"),
            "provenance": output_uri(pull, "provenance"),
            "kernel": output_uri(kernel, "kernel"),
        },
        outputs=("evaluation",),
        property_files={"Evaluation": ("evaluation", "evaluation.json")},
        instance_type=build.p.ProcessingInstanceType,
    )


def quality_gate(
    build: Builder, evaluation: ProcessingStep, passed: list[Any], failed: FailStep
) -> ConditionStep:
    """Every limit of gate.py must hold, and staging must not be the endpoint that only approvals change."""
    conditions = [
        sdk.CONDITIONS[limit.operator](
            left=_measured(evaluation, limit.field), right=_bound(build, limit.bound)
        )
        for limit in LIMITS
    ]
    conditions.append(sdk.different(build.p.StagingEndpointName, _production(build)))
    return build.gate("QualityGate", conditions, passed, [failed])


def gate_failed(build: Builder, evaluation: ProcessingStep) -> FailStep:
    """Names each limit with the measured and the allowed value; a message cannot leave out any."""
    parts: list[Any] = ["The release misses a limit and nothing was registered. Measured (allowed):"]
    for limit in LIMITS:
        bound = _bound(build, limit.bound)
        parts += [f" {limit.words} ", _measured(evaluation, limit.field), f"{limit.unit} ({limit.operator} "]
        parts += [str(bound) if isinstance(bound, int) else bound.to_string(), f"{limit.unit});"]
    parts += [" staging endpoint ", build.p.StagingEndpointName, f" (not {_production(build)})."]
    parts += [" See report.html of Evaluate; change the kernel, the model or the limit."]
    return build.fail("GateFailed", text(*parts))


def register_model(
    build: Builder,
    pull: ProcessingStep,
    kernel: ProcessingStep,
    evaluation: ProcessingStep,
    smoke: ProcessingStep,
) -> ModelStep:
    """A version of the model package group that holds exactly the measured pair of weights and kernel.

    After the smoke test: a version that staging could not serve is none that a person could approve, and
    ModelApprovalStatus=Approved deploys nothing that was not tried.
    """
    p = build.p
    statistics = text(output_uri(evaluation, "evaluation"), "evaluation.json", on="/")
    return build.register(
        "RegisterModel",
        "Register weights, kernel and figures as one version",
        depends_on=[smoke],
        containers=[_container(build, pull, kernel, evaluation)],
        content_types=["application/json"],
        response_types=["application/json"],
        inference_instances=[p.EndpointInstanceType],
        model_package_group_name=build.settings.names.model_package_group,
        model_metrics={
            "ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": statistics}}
        },
        approval_status=p.ModelApprovalStatus,
        customer_metadata_properties={
            "MlflowModelUri": json_get(pull, "Provenance", "model_uri").to_string(),
            "MlflowModelName": json_get(pull, "Provenance", "name").to_string(),
            "MlflowModelVersion": json_get(pull, "Provenance", "version").to_string(),
            "MlflowRunId": json_get(pull, "Provenance", "run_id").to_string(),
            "KernelSha256": json_get(evaluation, "Evaluation", "kernel_sha256").to_string(),
            "KernelBackend": json_get(evaluation, "Evaluation", "backend").to_string(),
            "RelativeError": _measured(evaluation, "relative_error").to_string(),
            "Speedup": _measured(evaluation, "speedup").to_string(),
            "DecodeLatencyMs": _measured(evaluation, "decode_latency_ms").to_string(),
        },
    )


def create_model(
    build: Builder, pull: ProcessingStep, kernel: ProcessingStep, evaluation: ProcessingStep
) -> ModelStep:
    """Staging names its container itself: the package waits for approval, only production deploys from it."""
    container = _container(build, pull, kernel, evaluation)
    return build.model("CreateModel", "The container, weights and kernel of staging", container)


def create_endpoint_config(build: Builder, model: ModelStep) -> EndpointConfigStep:
    """A configuration of its own for every execution: a configuration cannot be changed."""
    endpoint = build.settings.endpoint
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": model.properties.ModelName,
        "InstanceType": build.p.EndpointInstanceType,
        "InitialInstanceCount": build.p.EndpointInstanceCount,
        "InitialVariantWeight": 1.0,
        "ModelDataDownloadTimeoutInSeconds": endpoint.download_timeout_seconds,
        "ContainerStartupHealthCheckTimeoutInSeconds": endpoint.startup_timeout_seconds,
    }
    if endpoint.inference_ami:
        variant["InferenceAmiVersion"] = endpoint.inference_ami
    name = text(build.settings.names.release_pipeline, sdk.EXECUTION_ID, on="-")
    return build.endpoint_config("CreateEndpointConfig", "Machine and time limits of staging", name, variant)


def deploy_staging(build: Builder, config: EndpointConfigStep) -> EndpointStep:
    """Creates the staging endpoint, or moves it to this release."""
    name = config.properties.EndpointConfigName
    return build.endpoint("DeployStaging", "Serve the release on staging", build.p.StagingEndpointName, name)


def smoke_test(
    build: Builder, evaluation: ProcessingStep, config: EndpointConfigStep, endpoint: EndpointStep
) -> ProcessingStep:
    """Asks staging over HTTP while it serves this release; the tokens must be those that Evaluate saw."""
    return build.job(
        "SmokeTest",
        "smoke_test",
        description="Invoke staging and compare its answer with the evaluation's",
        arguments={
            "--endpoint-name": endpoint.properties.EndpointName,
            "--endpoint-config-name": config.properties.EndpointConfigName,
        },
        inputs={"evaluation": output_uri(evaluation, "evaluation")},
        outputs=("smoke",),
    )


def record_release(
    build: Builder,
    pull: ProcessingStep,
    kernel: ProcessingStep,
    evaluation: ProcessingStep,
    package: ModelStep,
    endpoint: EndpointStep,
) -> ProcessingStep:
    """Writes the package's ARN, the kernel's hash and the figures back to the MLflow version."""
    return build.job(
        "RecordRelease",
        "record_release",
        description="Record the release on the MLflow version",
        arguments={
            "--model-package-arn": package.properties.ModelPackageArn,
            "--endpoint-name": endpoint.properties.EndpointName,
            "--stage": "staging",
            "--register-accelerated": build.p.AcceleratedModelName,
        },
        inputs={
            "provenance": output_uri(pull, "provenance"),
            "evaluation": output_uri(evaluation, "evaluation"),
            "kernel": output_uri(kernel, "kernel"),
        },
        outputs=("record",),
        mlflow=True,
    )


def kernel_sources_sha256(folder: Path = KERNELS) -> str:
    """One hash over what the build reads, so that a change of any of it misses the step cache."""
    digest = hashlib.sha256()
    sources = [path for path in (folder / "csrc").rglob("*") if path.is_file()]
    readers = [path for name in BUILD_MODULES for path in folder.glob(name)]
    for path in sorted([*sources, *readers]):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _measured(evaluation: ProcessingStep, field: str) -> Any:
    return json_get(evaluation, "Evaluation", f"gate.{field}")


def _production(build: Builder) -> str:
    return str(build.settings.parameters.production["ProductionEndpointName"])


def _bound(build: Builder, bound: str | int) -> Any:
    return getattr(build.p, bound) if isinstance(bound, str) else bound


def _container(
    build: Builder, pull: ProcessingStep, kernel: ProcessingStep, evaluation: ProcessingStep
) -> dict[str, Any]:
    """Image, weights under /opt/ml/model, and the kernel: mounted beside them, or the address of it."""
    container: dict[str, Any] = {
        "Image": build.settings.images.serve,
        "ModelDataSource": {"S3DataSource": _folder(output_uri(pull, "model"))},
        "Environment": {
            "MLA_KERNEL_BACKEND": json_get(evaluation, "Evaluation", "backend").to_string(),
            "MLA_KV_CACHE_DTYPE": build.p.KvCacheDtype,
        },
    }
    endpoint = build.settings.endpoint
    if endpoint.engine != "native":
        container["Environment"] |= {
            "MLA_ENGINE": endpoint.engine,
            "MLA_TENSOR_PARALLEL": str(endpoint.tensor_parallel),
            "MLA_PIPELINE_PARALLEL": str(endpoint.pipeline_parallel),
        }
    folder = _folder(output_uri(kernel, "kernel"))
    if endpoint.kernel_delivery == "data_source":
        container["AdditionalModelDataSources"] = [{"ChannelName": "kernel", "S3DataSource": folder}]
    else:
        container["Environment"] |= {
            "MLA_KERNEL_S3_URI": folder["S3Uri"],
            "MLA_KERNEL_SHA256": json_get(evaluation, "Evaluation", "kernel_sha256").to_string(),
        }
    return container


def _folder(uri: Any) -> dict[str, Any]:
    return {"S3Uri": text(uri, "/"), "S3DataType": "S3Prefix", "CompressionType": "None"}
