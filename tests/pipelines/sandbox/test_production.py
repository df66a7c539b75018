"""DeployProduction as the production pipeline runs it: every way an update can go, for every strategy.

The step is the rendered definition's own, with its arguments; only its input comes from the test instead of
VerifyPackage, and the served model is the toy server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines.settings import Settings
from tests.pipelines.sandbox.conftest import BUCKET, Aws
from tests.pipelines.sandbox.test_endpoints import (
    alarm,
    ask,
    create,
    model,
    settle,
    source,
    wait_for_phase,
    who,
)

GROUP = "updated-models"
INSTANCES = 4
STRATEGIES: dict[str, dict[str, Any]] = {
    "canary": {"strategy": "canary", "step_size": "25%"},
    "linear": {"strategy": "linear", "step_size": 2},
    "rolling": {"strategy": "rolling", "step_size": 2, "rollback_size": 1},
    "all_at_once": {"strategy": "all_at_once"},
}
STEPWISE = ("canary", "linear", "rolling")
OBSERVED = {
    "strategy": "all_at_once",
    "capture": {"percent": 100, "mode": "Input"},
    "scaling": {"min_instances": 2, "max_instances": 8, "invocations_per_minute": 60},
}


class Production:
    """An account with a production pipeline for each way to deploy, and versions to deploy."""

    def __init__(self, aws: Aws) -> None:
        self.aws = aws
        self._pipelines: dict[str, str] = {}
        aws.sagemaker.create_model_package_group(ModelPackageGroupName=GROUP)

    def version(self, name: str, approval: str = "Approved", **environment: str) -> str:
        """Register a version that answers with `name`; its ARN."""
        self.aws.put(f"{name}/model/answer.txt", name.encode())
        container = {
            "Image": "image:1",
            "Environment": environment,
            "ModelDataSource": {"S3DataSource": source(f"{name}/model/")},
            "AdditionalModelDataSources": [
                {"ChannelName": "kernel", "S3DataSource": source(f"{name}/model/")}
            ],
        }
        arn = self.aws.sagemaker.create_model_package(
            ModelPackageGroupName=GROUP,
            ModelApprovalStatus=approval,
            InferenceSpecification={
                "Containers": [container],
                "SupportedContentTypes": ["application/json"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
        )["ModelPackageArn"]
        self.aws.put(f"verified/{arn.rsplit('/', 1)[-1]}/package.json", {"model_package_arn": arn})
        return str(arn)

    def start(
        self,
        arn: str,
        endpoint: str,
        strategy: str = "all_at_once",
        bake_seconds: int = 0,
        machine: str = "ml.c7i.xlarge",
    ) -> str:
        """Start the pipeline of a strategy; the execution's ARN."""
        return self.aws.start(
            self._pipeline(strategy, bake_seconds),
            ModelPackageArn=arn,
            ProductionEndpointName=endpoint,
            EndpointInstanceCount=str(INSTANCES),
            EndpointInstanceType=machine,
            Verified=f"s3://{BUCKET}/verified/{arn.rsplit('/', 1)[-1]}/",
        )

    def ended(self, execution: str) -> dict[str, Any]:
        """Wait for an execution; its deployment.json, or {"failure": reason}."""
        self.aws.wait(execution, 90)
        step = self.aws.steps(execution)["DeployProduction"]
        if step["StepStatus"] != "Succeeded":
            return {"failure": step["FailureReason"]}
        key = f"mla-pipeline/executions/{execution.rsplit('/', 1)[-1]}/DeployProduction/deployment"
        return dict(json.loads(self.aws.get(f"{key}/deployment.json")))

    def deploy(self, arn: str, endpoint: str, **how: Any) -> dict[str, Any]:
        """Start and wait."""
        return self.ended(self.start(arn, endpoint, **how))

    def _pipeline(self, strategy: str, bake_seconds: int) -> str:
        from pipelines import production

        name = f"update-{strategy.replace('_', '-')}-{bake_seconds}"
        if name not in self._pipelines:
            values = {**STRATEGIES, "observed": OBSERVED}[strategy] | {
                "bake_seconds": bake_seconds,
                "alarms": [name],
            }
            overrides: dict[str, object] = {f"deployment.{key}": value for key, value in values.items()}
            overrides |= {"bucket": BUCKET, "role": self.aws.role, "prefix": "mla-pipeline"}
            overrides["parameters.production.EndpointInstanceCount"] = INSTANCES
            overrides["names.production_pipeline"] = name
            definition = json.loads(production.get_pipeline(Settings.load("local", overrides)).definition())
            (step,) = (one for one in definition["Steps"] if one["Name"] == "DeployProduction")
            step["Arguments"]["ProcessingInputs"][0]["S3Input"]["S3Uri"] = {"Get": "Parameters.Verified"}
            step.pop("DependsOn", None)
            parameters = [*definition["Parameters"], {"Name": "Verified", "Type": "String"}]
            self.aws.create(name, [step], parameters)
            alarm(self.aws, name)
            self._pipelines[name] = name
        self.ring(strategy, bake_seconds, "OK")
        return name

    def ring(self, strategy: str, bake_seconds: int, state: str = "ALARM") -> None:
        """Set the state of the pipeline's alarm, as a person can."""
        self.aws.client("cloudwatch").set_alarm_state(
            AlarmName=f"update-{strategy.replace('_', '-')}-{bake_seconds}",
            StateValue=state,
            StateReason="test",
        )


@pytest.fixture(scope="module")
def production(aws: Aws) -> Production:
    return Production(aws)


@pytest.fixture
def live(production: Production, name: str) -> str:
    """An endpoint of this test's own, of four instances that answer with `<name>-old`."""
    sagemaker = production.aws.sagemaker
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": model(production.aws, f"{name}-old"),
        "InstanceType": "ml.c7i.xlarge",
        "InitialInstanceCount": INSTANCES,
    }
    sagemaker.create_endpoint_config(EndpointConfigName=f"{name}-first", ProductionVariants=[variant])
    create(production.aws, name, f"{name}-first")
    return name


def config_of(aws: Aws, endpoint: str) -> str:
    return str(aws.sagemaker.describe_endpoint(EndpointName=endpoint)["EndpointConfigName"])


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def test_the_first_deployment_creates_the_endpoint(production: Production, name: str) -> None:
    aws = production.aws
    done = production.deploy(production.version(name), name, strategy="rolling", bake_seconds=1)
    assert (done["action"], done["previous_endpoint_config_name"]) == ("created", None)
    assert who(aws, name) == name
    config = aws.sagemaker.describe_endpoint_config(EndpointConfigName=config_of(aws, name))
    (variant,) = config["ProductionVariants"]
    assert variant["InitialInstanceCount"] == INSTANCES
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 120  # config/local.yaml's


def test_an_endpoint_that_was_never_healthy_says_so_and_has_to_be_deleted(
    production: Production, name: str
) -> None:
    broken = production.version(name, TOY_MODE="exit")
    failure = production.deploy(broken, name)["failure"]
    assert "is Failed after its deployment" in failure
    assert "exited with code 7" in failure
    assert "Delete it" in production.deploy(broken, name)["failure"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_healthy_version_takes_all_traffic(production: Production, live: str, strategy: str) -> None:
    before = config_of(production.aws, live)
    done = production.deploy(production.version(f"{live}-new"), live, strategy=strategy, bake_seconds=1)
    assert (done["action"], done["previous_endpoint_config_name"]) == ("updated", before)
    assert {who(production.aws, live) for _ in range(4)} == {f"{live}-new"}
    found = production.aws.sagemaker.describe_endpoint(EndpointName=live)
    assert found["ProductionVariants"][0]["CurrentInstanceCount"] == INSTANCES
    policy = "RollingUpdatePolicy" if strategy == "rolling" else "BlueGreenUpdatePolicy"
    assert policy in found["LastDeploymentConfig"]


@pytest.mark.parametrize("strategy", STEPWISE)
def test_an_alarm_while_it_bakes_brings_the_old_version_back(
    production: Production, live: str, strategy: str
) -> None:
    before = config_of(production.aws, live)
    execution = production.start(production.version(f"{live}-new"), live, strategy, 30)
    wait_for_phase(production.aws, live, "Baking")
    production.ring(strategy, 30)
    failure = production.ended(execution)["failure"]  # the endpoint is InService: a silent rollback
    assert f"was rolled back: it serves {before}" in failure
    assert f"Alarms in state ALARM during the deployment: update-{strategy}-30" in failure
    found = production.aws.sagemaker.describe_endpoint(EndpointName=live)
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", before)
    assert found["ProductionVariants"][0]["CurrentInstanceCount"] == INSTANCES
    assert {who(production.aws, live) for _ in range(4)} == {f"{live}-old"}


@pytest.mark.parametrize("strategy", ["canary", "rolling"])
def test_a_version_that_is_never_healthy_leaves_the_old_one(
    production: Production, live: str, strategy: str
) -> None:
    broken = production.version(f"{live}-new", TOY_MODE="exit")
    failure = production.deploy(broken, live, strategy=strategy, bake_seconds=1)["failure"]
    assert "was rolled back" in failure
    assert "exited with code 7" in failure
    assert who(production.aws, live) == f"{live}-old"


def test_an_alarm_that_rings_already_stops_the_update_before_it_begins(
    production: Production, live: str
) -> None:
    version = production.version(f"{live}-new")
    execution = production.start(version, live, "canary", 30)
    production.ring("canary", 30)
    assert "was rolled back" in production.ended(execution)["failure"]
    assert who(production.aws, live) == f"{live}-old"


def test_two_events_for_one_approval_make_one_update(production: Production, live: str) -> None:
    version = production.version(f"{live}-new")
    executions = [production.start(version, live, "rolling", 1) for _ in range(2)]
    actions = sorted(production.ended(one)["action"] for one in executions)
    assert actions == ["unchanged", "updated"]
    assert who(production.aws, live) == f"{live}-new"


def test_a_rolled_back_update_is_not_repeated_by_the_second_event(production: Production, live: str) -> None:
    version = production.version(f"{live}-new")
    executions = [production.start(version, live, "linear", 30) for _ in range(2)]
    wait_for_phase(production.aws, live, "Baking")
    eventually(lambda: all(waits(production.aws, one) for one in executions), "both jobs wait")
    production.ring("linear", 30)
    for execution in executions:
        assert "was rolled back" in production.ended(execution)["failure"]
    assert who(production.aws, live) == f"{live}-old"


def waits(aws: Aws, execution: str) -> bool:
    """Whether the execution's DeployProduction job has logged that it follows an update."""
    metadata = aws.steps(execution).get("DeployProduction", {}).get("Metadata")
    if not metadata:
        return False
    job = metadata["ProcessingJob"]["Arn"].rsplit("/", 1)[-1]
    try:
        events = aws.client("logs").filter_log_events(
            logGroupName="/aws/sagemaker/ProcessingJobs", logStreamNamePrefix=f"{job}/"
        )["events"]
    except ClientError:
        return False
    return any("Updating | live" in event["message"] for event in events)


def test_an_update_in_progress_is_awaited(production: Production, live: str) -> None:
    aws, other = production.aws, model(production.aws, f"{live}-other")
    begin_another_update(aws, live, other, 3)
    done = production.deploy(production.version(f"{live}-new"), live, strategy="linear", bake_seconds=1)
    assert (done["action"], done["previous_endpoint_config_name"]) == ("updated", other)
    assert who(aws, live) == f"{live}-new"


def test_a_version_rejected_while_it_waited_is_not_deployed(production: Production, live: str) -> None:
    aws, version = production.aws, production.version(f"{live}-new")
    alarm(aws, live)  # ends the other update when the test says so
    begin_another_update(aws, live, model(aws, f"{live}-other"), 3600, live)
    execution = production.start(version, live, "rolling", 1)
    eventually(lambda: waits(aws, execution), "the job waits")
    aws.sagemaker.update_model_package(ModelPackageArn=version, ModelApprovalStatus="Rejected")
    aws.client("cloudwatch").set_alarm_state(AlarmName=live, StateValue="ALARM", StateReason="test")
    assert "is Rejected, not Approved" in production.ended(execution)["failure"]
    assert settle(aws, live)["EndpointConfigName"] == f"{live}-first"


def test_a_rejected_version_is_not_deployed(production: Production, live: str) -> None:
    version = production.version(f"{live}-new", approval="Rejected")
    assert "is Rejected, not Approved" in production.deploy(version, live)["failure"]


def begin_another_update(aws: Aws, endpoint: str, config: str, wait: int, *alarms: str) -> None:
    """As a person's UpdateEndpoint; it bakes for `wait` seconds."""
    routing = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": wait}
    how: dict[str, Any] = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing}}
    if alarms:
        how["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": name} for name in alarms]}
    aws.sagemaker.update_endpoint(EndpointName=endpoint, EndpointConfigName=config, DeploymentConfig=how)


@pytest.mark.parametrize("strategy", STEPWISE)
def test_a_job_killed_in_the_middle_is_resumed_by_the_next_one(
    production: Production, live: str, strategy: str
) -> None:
    aws, version = production.aws, production.version(f"{live}-new")
    execution = production.start(version, live, strategy, 3)
    wait_for_phase(aws, live, "Baking")
    for process in processes_of(execution):
        with contextlib.suppress(ProcessLookupError):  # one of them ends with another
            os.kill(process, signal.SIGKILL)
    assert "AlgorithmError" in production.ended(execution)["failure"]
    assert production.deploy(version, live, strategy=strategy, bake_seconds=3)["action"] == "unchanged"
    assert who(aws, live) == f"{live}-new"


def processes_of(execution: str) -> list[int]:
    """Processes of the execution's DeployProduction job: their access key id is the job's name."""
    mark = f"AWS_ACCESS_KEY_ID=pipelines-{execution.rsplit('/', 1)[-1]}-DeployProduction".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    assert found
    return found


def test_rolling_moves_instances_with_the_traffic(production: Production, live: str) -> None:
    aws = production.aws
    execution = production.start(production.version(f"{live}-new"), live, "rolling", 3)
    wait_for_phase(aws, live, "Baking")
    found = aws.sagemaker.describe_endpoint(EndpointName=live)
    old, new = found["ProductionVariants"][0], found["PendingDeploymentSummary"]["ProductionVariants"][0]
    assert (old["CurrentInstanceCount"], new["CurrentInstanceCount"]) == (2, 2)
    answers = [who(aws, live) for _ in range(8)]
    assert answers.count(f"{live}-new") == 4
    assert production.ended(execution)["action"] == "updated"


def test_production_is_captured_and_scales_and_an_update_keeps_its_instances(
    production: Production, live: str
) -> None:
    aws, scaling = production.aws, production.aws.client("application-autoscaling")
    first = production.version(f"{live}-new")
    assert production.deploy(first, live, strategy="observed")["action"] == "updated"
    ask(aws, live, '{"prompt": "x"}', ContentType="application/json")
    folder = f"mla-pipeline/data-capture/{live}/AllTraffic/"
    (captured,) = aws.s3.list_objects_v2(Bucket=BUCKET, Prefix=folder)["Contents"]
    data = json.loads(aws.get(captured["Key"]))["captureData"]
    assert data["endpointInput"]["data"] == '{"prompt": "x"}'
    assert "endpointOutput" not in data

    resource = f"endpoint/{live}/variant/AllTraffic"
    found = scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[resource])
    (target,) = found["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 8)
    grown = [{"VariantName": "AllTraffic", "DesiredInstanceCount": 6}]  # what scaling would do
    aws.sagemaker.update_endpoint_weights_and_capacities(EndpointName=live, DesiredWeightsAndCapacities=grown)
    second = production.version(f"{live}-newer")
    assert production.deploy(second, live, strategy="observed")["action"] == "updated"
    endpoint = aws.sagemaker.describe_endpoint(EndpointName=live)
    assert endpoint["ProductionVariants"][0]["CurrentInstanceCount"] == 6
    assert scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[resource])[
        "ScalableTargets"
    ]


def test_a_scaled_endpoint_moves_to_another_machine(production: Production, live: str) -> None:
    """Refused while the variant is a scalable target: the step takes the target away and gives it back."""
    aws = production.aws
    version = production.version(f"{live}-new")
    assert production.deploy(version, live, strategy="observed")["action"] == "updated"
    other = model(aws, f"{live}-other")  # on ml.m5.large
    with pytest.raises(ClientError, match="is a scalable target: deregister it"):
        aws.sagemaker.update_endpoint(EndpointName=live, EndpointConfigName=other)
    moved = production.deploy(version, live, strategy="observed", machine="ml.c7i.4xlarge")
    assert (moved["action"], moved["instance_type"]) == ("updated", "ml.c7i.4xlarge")
    targets = aws.client("application-autoscaling").describe_scalable_targets(
        ServiceNamespace="sagemaker", ResourceIds=[f"endpoint/{live}/variant/AllTraffic"]
    )
    assert len(targets["ScalableTargets"]) == 1


def test_a_failed_update_goes_on_scaling(production: Production, live: str) -> None:
    scaling = production.aws.client("application-autoscaling")
    broken = production.version(f"{live}-new", TOY_MODE="exit")
    assert "was rolled back" in production.deploy(broken, live, strategy="observed")["failure"]
    found = scaling.describe_scalable_targets(
        ServiceNamespace="sagemaker", ResourceIds=[f"endpoint/{live}/variant/AllTraffic"]
    )
    assert len(found["ScalableTargets"]) == 1


def test_managed_instance_scaling_is_refused_as_the_service_refuses_it(aws: Aws, name: str) -> None:
    variant = {
        "VariantName": "v",
        "ModelName": model(aws, name),
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
        "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 2},
    }
    with pytest.raises(ClientError, match="only supported for inference component endpoints"):
        aws.sagemaker.create_endpoint_config(EndpointConfigName=f"{name}-m", ProductionVariants=[variant])
