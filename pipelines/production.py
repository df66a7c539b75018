"""The production pipeline: deploys exactly the version that was approved, and only while it is approved.

The approval event starts it, maybe more than once for one approval, so every step is idempotent for the ARN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import deployment, sdk
from pipelines.sdk import Builder, output_uri
from pipelines.settings import Settings

if TYPE_CHECKING:
    from sagemaker.mlops.workflow.steps import ProcessingStep


def get_pipeline(settings: Settings) -> sdk.CanonicalPipeline:
    """The pipeline of an environment. Makes no AWS call."""
    build = Builder(settings, "production")
    package = verify_package(build)
    deployed = deploy_production(build, package)
    record = record_promotion(build, package, deployed)
    return build.pipeline(settings.names.production_pipeline, [package, deployed, record])


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
    """Update in steps with alarms; the service's own Endpoint step has no DeploymentConfig."""
    settings = build.settings
    return build.job(
        "DeployProduction",
        "deploy_production",
        description="Move production to the approved version, step by step",
        arguments={
            "--model-package-arn": build.p.ModelPackageArn,
            "--endpoint-name": build.p.ProductionEndpointName,
            "--instance-type": build.p.EndpointInstanceType,
            "--instance-count": build.p.EndpointInstanceCount,
            "--role-arn": settings.role_of("endpoint"),
        },
        repeated={"--deployment": deployment.parts(settings)},
        inputs={"package": output_uri(package, "package")},
        outputs=("deployment",),
        timeout_minutes=deployment.job_minutes(settings),
    )


def record_promotion(build: Builder, package: ProcessingStep, deployed: ProcessingStep) -> ProcessingStep:
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
            "deployment": output_uri(deployed, "deployment"),
        },
        outputs=("record",),
        mlflow=True,
    )
