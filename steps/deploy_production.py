"""DeployProduction: move the production endpoint to one approved version and prove that it got there.

    model    created from the package's ARN        name <- ARN, role, network
    config   one variant on that model             name <- model, instances, variant settings, key
    endpoint created the first time, else UpdateEndpoint in steps (deployment.py) with rollback alarms
    proof    the live EndpointConfigName is the one asked for
    scaling  of the instances, when configured: off before an update, on after it

Names are derived from what they name, so the step is idempotent: AWS sends several events for one approval,
and the second run finds everything in place. The proof is needed because a rolled-back update ends InService,
which reads as success (hashicorp/terraform-provider-aws issue 48997).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from steps import aws, deploy_scaling, model_package
from steps.deployed_endpoint import Endpoint, wait_until_settled
from steps.deployment import Deployment
from steps.job import Job, StepError, log, run

VARIANT = "AllTraffic"
GRACE_SECONDS = 900  # the service ends an update at its own time limit; rolling back then takes a while
# GPU families whose disk is in the instance, encrypted by its hardware: a key is refused there.
LOCAL_DISK = ("g4dn", "g5", "g6", "g6e", "gr6", "p3dn", "p4d", "p4de", "p5", "p5e", "p5en", "p6-b200")
RACES = 5  # AWS delivers one approval several times; each delivery starts an execution


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-package-arn", required=True)
    parser.add_argument("--endpoint-name", required=True)
    parser.add_argument("--instance-type", required=True)
    parser.add_argument("--instance-count", type=int, required=True)
    parser.add_argument("--role-arn", required=True, help="execution role of the model")
    parser.add_argument(
        "--deployment", action="append", default=[], help="JSON object; may be repeated; see deployment.py"
    )


def main(job: Job) -> None:
    """Deploy an approved model package to the production endpoint and write deployment/deployment.json."""
    args = job.args
    arn: str = args.model_package_arn
    deployment = Deployment.parse(args.deployment)
    verified = job.read_json("package", "package.json")["model_package_arn"]
    if verified != arn:
        raise StepError(
            f"VerifyPackage verified {verified}, this step was asked to deploy {arn}.",
            "Pass the same ModelPackageArn to both steps.",
        )
    started = time.monotonic()
    sagemaker = aws.client("sagemaker")
    model_package.describe(sagemaker, arn).require_approved()
    model = ensure_model(sagemaker, arn, args.role_arn, deployment)
    config = ensure_endpoint_config(sagemaker, model, args.instance_type, args.instance_count, deployment)
    try:
        action, previous = move_endpoint(sagemaker, args.endpoint_name, config, arn, deployment)
        live = verify_live(sagemaker, args.endpoint_name, config)
    except StepError:
        scale_again(args.endpoint_name, deployment)
        raise
    if deployment.scaling:
        deploy_scaling.start(live.name, VARIANT, deployment.scaling)
    log.info("%s serves %s (%s) through %s", live.name, arn, action, config)
    job.write_json(
        "deployment",
        "deployment.json",
        {
            "schema_version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model_package_arn": arn,
            "endpoint_name": live.name,
            "endpoint_arn": live.arn,
            "endpoint_config_name": config,
            "previous_endpoint_config_name": previous,
            "model_name": model,
            "action": action,
            "instance_type": args.instance_type,
            "instance_count": args.instance_count,
            "deployment_config": deployment.config(),
            "seconds": round(time.monotonic() - started, 1),
        },
    )


def ensure_model(sagemaker: Any, arn: str, role_arn: str, deployment: Deployment) -> str:
    """Create the model of the package `arn` unless it is there. Returns its name."""
    _, group, version = arn.rsplit("/", 2)
    vpc = deployment.vpc()
    name = derived_name(f"{group}-v{version}", arn, role_arn, json.dumps(vpc, sort_keys=True))
    _create(
        sagemaker.create_model,
        f"model {name}",
        ModelName=name,
        ExecutionRoleArn=role_arn,
        Containers=[{"ModelPackageName": arn}],
        **vpc,
    )
    return name


def ensure_endpoint_config(
    sagemaker: Any, model: str, instance_type: str, instance_count: int, deployment: Deployment
) -> str:
    """Create the endpoint configuration with one variant on `model` unless it is there. Returns its name."""
    variant = {
        **deployment.variant(),
        "VariantName": VARIANT,
        "ModelName": model,
        "InstanceType": instance_type,
        "InitialInstanceCount": instance_count,
        "InitialVariantWeight": 1.0,
    }
    own_disk = instance_type.split(".")[1] in LOCAL_DISK
    if deployment.kms_key and own_disk:
        log.info("the disk of %s is encrypted by the instance itself: no key is asked for", instance_type)
    encryption = {"KmsKeyId": deployment.kms_key} if deployment.kms_key and not own_disk else {}
    request = {"ProductionVariants": [variant], **deployment.data_capture(), **encryption}
    name = derived_name(model.rpartition("-")[0], json.dumps(request, sort_keys=True))
    _create(
        sagemaker.create_endpoint_config,
        f"endpoint configuration {name}",
        EndpointConfigName=name,
        **request,
    )
    return name


def move_endpoint(
    sagemaker: Any, name: str, config: str, arn: str, deployment: Deployment
) -> tuple[str, str | None]:
    """Bring endpoint `name` to `config` and wait until it settled.

    Returns:
        what was done ("created", "updated", "unchanged") and the configuration that was live before.
    Raises:
        StepError: the endpoint cannot take an update, or did not settle in time.
    """
    timeout = deployment.timeout_seconds + GRACE_SECONDS
    for _ in range(RACES):
        endpoint = Endpoint.find(sagemaker, name)
        if endpoint and endpoint.moving:
            log.info("%s is %s already: waiting for that to end first", name, endpoint.status)
            ours, endpoint = endpoint.pending == config, wait_until_settled(sagemaker, name, timeout)
            if ours and endpoint and not endpoint.serves(config):
                # A duplicate event, or this job before it was killed, asked for this: once is enough.
                return "updated", endpoint.config
        if endpoint:
            endpoint.require_updatable()
            if endpoint.serves(config):
                log.info("%s serves %s already: nothing to update", name, config)
                return "unchanged", config
        # Waiting took time, and a person may have taken the approval back.
        model_package.describe(sagemaker, arn).require_approved()
        try:
            if endpoint:
                log.info("updating %s from %s to %s: %s", name, endpoint.config, config, deployment)
                if deployment.scaling:
                    deploy_scaling.stop(name, VARIANT)
                sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=config, **deployment.update())
            else:
                log.info("creating endpoint %s with %s", name, config)
                sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=config)
        except ClientError as error:
            if not lost_race(error):
                verb = "Updating" if endpoint else "Creating"
                raise StepError(
                    f"{verb} endpoint '{name}' failed: {error}", "Check the job's role and --deployment."
                ) from error
            log.info("another execution changes %s at this moment", name)
            continue
        wait_until_settled(sagemaker, name, timeout)
        return ("updated", endpoint.config) if endpoint else ("created", None)
    raise StepError(
        f"Other executions changed endpoint '{name}' {RACES} times while this one waited for its turn.",
        "Stop the other executions, then start the pipeline again.",
    )


def lost_race(error: ClientError) -> bool:
    """Whether an update or creation was refused because another one has just begun."""
    message = error.response.get("Error", {}).get("Message", "").lower()
    return aws.already_exists(error) or "in-progress" in message or "in progress" in message


def verify_live(sagemaker: Any, name: str, config: str) -> Endpoint:
    """The endpoint, proven to be in service with `config`. Raises StepError, also for a silent rollback."""
    live = Endpoint.find(sagemaker, name)
    if live and live.serves(config):
        return live
    if not live:
        raise StepError(f"Endpoint '{name}' is gone.", "Somebody deleted it: start the pipeline again.")
    reason = live.failure or "the service gave no reason"
    if live.status == "InService":
        raise StepError(
            f"Endpoint '{name}' was rolled back: it serves {live.config}, not {config}: {reason}.",
            f"Read the rollback alarms and the log group /aws/sagemaker/Endpoints/{name}.",
        )
    if live.status == "UpdateRollbackFailed":
        raise StepError(
            f"Endpoint '{name}' serves with instances of two versions: the update to {config} failed, and so "
            f"did the way back: {reason}.",
            "Start the pipeline with the version that is to serve: "
            "mla-pipeline start production -p ModelPackageArn=ARN.",
        )
    raise StepError(
        f"Endpoint '{name}' is {live.status} after its deployment: {reason}.",
        f"Read the log group /aws/sagemaker/Endpoints/{name}.",
    )


def scale_again(name: str, deployment: Deployment) -> None:
    """After a failed update the old version serves on and scales; its failure must not be hidden by ours."""
    if deployment.scaling:
        try:
            deploy_scaling.start(name, VARIANT, deployment.scaling)
        except StepError as error:
            log.warning("%s does not scale: %s", name, error)


def derived_name(prefix: str, *content: str) -> str:
    """`prefix` and 10 hexadecimal digits of the content's SHA-256, within SageMaker's 63 characters."""
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:10]
    return f"{prefix[:52].rstrip('-')}-{digest}"


def _create(create: Any, what: str, **request: Any) -> None:
    try:
        create(**request)
        log.info("created %s", what)
    except ClientError as error:
        if not aws.already_exists(error):
            raise StepError(
                f"Creating {what} failed: {error}", "Check the job's role and the instance type."
            ) from error
        log.info("%s is there already", what)  # its name is derived from its content, so it is the same


if __name__ == "__main__":
    run(main, arguments)
