"""The production pipeline: deploys exactly the version that was approved, and only while it is approved.

The approval event starts it, maybe more than once for one approval, so every step is idempotent for the ARN.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipelines import sdk
from pipelines.sdk import Builder, output_uri
from pipelines.settings import Settings

if TYPE_CHECKING:
    from sagemaker.mlops.workflow.steps import ProcessingStep


def get_pipeline(settings: Settings) -> sdk.CanonicalPipeline:
    """The pipeline of an environment. Makes no AWS call."""
    build = Builder(settings, "production")
    package = verify_package(build)
    deployment = deploy_production(build, package)
    record = record_promotion(build, package, deployment)
    return build.pipeline(settings.names.production_pipeline, [package, deployment, record])


def verify_package(build: Builder) -> ProcessingStep:
    """Reads the status again: an event may be late, and the approval withdrawn."""
    return build.job(
        "VerifyPackage",
        "verify_package",
        description="Check that the version is of the group and approved",
        arguments={
            "--model-package-arn": build.p.ModelPackageArn,
            "--model-package-group": build.settings.names.model_package_group,
        },
        outputs=("package",),
    )


def deploy_production(build: Builder, package: ProcessingStep) -> ProcessingStep:
    """Canary update with alarms; the service's own Endpoint step has no DeploymentConfig."""
    settings = build.settings
    return build.job(
        "DeployProduction",
        "deploy_production",
        description="Move production to the approved version, canary first",
        arguments={
            "--model-package-arn": build.p.ModelPackageArn,
            "--endpoint-name": build.p.ProductionEndpointName,
            "--instance-type": build.p.EndpointInstanceType,
            "--instance-count": build.p.EndpointInstanceCount,
            "--role-arn": settings.role_of("endpoint"),
        },
        repeated={"--deployment": deployment_parts(settings)},
        inputs={"package": output_uri(package, "package")},
        outputs=("deployment",),
    )


def deployment_parts(settings: Settings) -> list[str]:
    """The values of --deployment: JSON objects, in parts because one argument holds 256 characters."""
    parts = [
        settings.deployment.model_dump(exclude_none=True),
        settings.endpoint.model_dump(exclude_none=True, exclude={"kernel_delivery"}),
    ]
    if settings.network:
        parts.append({"network": settings.network.model_dump(include={"subnets", "security_group_ids"})})
    if settings.kms_key:
        parts.append({"kms_key": settings.kms_key})
    return [json.dumps(part, separators=(",", ":")) for part in parts]


def record_promotion(build: Builder, package: ProcessingStep, deployment: ProcessingStep) -> ProcessingStep:
    """Sets the alias `production` on the MLflow version that is live now."""
    return build.job(
        "RecordPromotion",
        "record_release",
        description="Record the promotion on the MLflow version",
        arguments={
            "--model-package-arn": build.p.ModelPackageArn,
            "--endpoint-name": build.p.ProductionEndpointName,
            "--stage": "production",
        },
        inputs={
            "package": output_uri(package, "package"),
            "deployment": output_uri(deployment, "deployment"),
        },
        outputs=("record",),
        mlflow=True,
    )
