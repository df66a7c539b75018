"""Rollback and an endpoint's status against endpoints that the production step really moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from pipelines import endpoint, rollback, service, versions
from pipelines.aws import Aws as Clients
from pipelines.errors import UserError
from pipelines.settings import Settings
from tests.pipelines.sandbox.conftest import BUCKET, REGION, Aws

NAME = "operated"  # of the production pipeline, its endpoint and the group
DEPLOY = """
import sys
from steps import aws
from steps.deploy_production import ensure_endpoint_config, ensure_model, move_endpoint
from steps.deployment import Deployment

arn, name, role = sys.argv[1:4]
sagemaker, how = aws.client("sagemaker"), Deployment.parse(sys.argv[4:])
model = ensure_model(sagemaker, arn, role, how)
config = ensure_endpoint_config(sagemaker, model, "ml.c7i.xlarge", 1, how)
move_endpoint(sagemaker, name, config, arn, how)
"""


MEASURED = {"model": {"tokens_per_s": 100.0}}
AT_ONCE = '{"strategy": "all_at_once", "bake_seconds": 0, "timeout_seconds": 600}'


@dataclass
class World:
    """An account in which versions 1 to 3 are registered and 1, then 2, were deployed."""

    aws: Aws
    clients: Clients
    settings: Settings
    versions: list[str]

    def deploy(self, arn: str) -> None:
        """Approve a version and run the production pipeline with it."""
        versions.decide(self.clients, arn, "Approved", "")
        self.follow(service.start(self.clients, NAME, {"ModelPackageArn": arn}))

    def follow(self, execution: str) -> None:
        """Wait; it must succeed."""
        ended = service.wait(self.clients, execution, 0.1, 90)
        assert ended.status == "Succeeded", service.reason(ended)

    def live(self) -> str:
        """ARN of the version that production serves."""
        return endpoint.live(self.clients, self.settings, NAME).package


@pytest.fixture(scope="module")
def world(aws: Aws) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
            patch.setenv(f"AWS_{key}", value)
        patch.setenv("AWS_ENDPOINT_URL", aws.sandbox.endpoint_url)
        settings = Settings.load(
            "local",
            {
                "bucket": BUCKET,
                "names.production_pipeline": NAME,
                "names.release_pipeline": f"{NAME}-release",
                "names.model_package_group": NAME,
                "parameters.production.ProductionEndpointName": NAME,
                "deployment.alarms": [f"{NAME}-5xx", f"{NAME}-gone"],
            },
        )
        aws.sagemaker.create_model_package_group(ModelPackageGroupName=NAME)
        evaluation = aws.put(f"{NAME}/evaluation.json", MEASURED)
        made = World(aws, Clients(REGION), settings, register(aws, NAME, evaluation))
        step = aws.script("Deploy", DEPLOY, {"Get": "Parameters.ModelPackageArn"}, NAME, aws.role, AT_ONCE)
        aws.create(NAME, [step], [{"Name": "ModelPackageArn", "Type": "String"}])
        aws.client("cloudwatch").put_metric_alarm(
            AlarmName=f"{NAME}-5xx",
            MetricName="m",
            Namespace="n",
            Statistic="Sum",
            Period=60,
            EvaluationPeriods=1,
            Threshold=1.0,
            ComparisonOperator="GreaterThanThreshold",
        )
        for arn in made.versions[:2]:
            made.deploy(arn)
        yield made


def register(aws: Aws, group: str, evaluation: str) -> list[str]:
    """Three versions, waiting for approval, each with the evaluation at this URI."""
    weights = aws.put(f"{group}/model/answer.txt", b"x").removesuffix("answer.txt")
    source = {"S3Uri": weights, "S3DataType": "S3Prefix", "CompressionType": "None"}
    statistics = {"ContentType": "application/json", "S3Uri": evaluation}
    return [
        aws.sagemaker.create_model_package(
            ModelPackageGroupName=group,
            ModelApprovalStatus="PendingManualApproval",
            InferenceSpecification={
                "Containers": [
                    {
                        "Image": "image:1",
                        "ModelDataSource": {"S3DataSource": source},
                        "AdditionalModelDataSources": [{"ChannelName": "kernel", "S3DataSource": source}],
                    }
                ],
                "SupportedContentTypes": ["application/json"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
            ModelMetrics={"ModelQuality": {"Statistics": statistics}},
            CustomerMetadataProperties={"MlflowModelName": "demo", "MlflowModelVersion": str(number)},
        )["ModelPackageArn"]
        for number in (1, 2, 3)
    ]


def test_status_of_an_endpoint_whose_model_and_configuration_were_deleted(world: World) -> None:
    """A clean-up that goes too far does not stop the endpoint; its health must stay visible."""
    sagemaker, name = world.aws.sagemaker, f"{NAME}-bare"
    evaluated = sagemaker.describe_model_package(ModelPackageName=world.versions[0])
    container = evaluated["InferenceSpecification"]["Containers"][0]
    sagemaker.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=world.aws.role)
    variant = {
        "VariantName": "v",
        "ModelName": name,
        "InstanceType": "ml.m5.large",
        "InitialInstanceCount": 1,
    }
    sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig={"Delay": 1})
    sagemaker.delete_model(ModelName=name)
    assert endpoint.status(world.clients, world.settings, name).served.instance_type == "ml.m5.large"
    sagemaker.delete_endpoint_config(EndpointConfigName=name)
    found = endpoint.status(world.clients, world.settings, name)
    sagemaker.delete_endpoint(EndpointName=name)
    assert (found.health, found.package) == ("InService", None)
    assert "cost        1 x unknown, unpriced" in list(found.lines())


def test_status_shows_what_production_serves_and_how_it_got_there(world: World) -> None:
    found = endpoint.status(world.clients, world.settings, NAME)
    assert (found.health, found.package and found.package.version) == ("InService", 2)
    assert [(one.side, one.instances) for one in found.variants] == [("live", 1)]
    assert dict(found.alarms) == {f"{NAME}-5xx": "OK", f"{NAME}-gone": "missing"}
    assert [one.version for one in found.deployments] == [world.versions[1], world.versions[0]]
    assert {one.status for one in found.deployments} == {"Succeeded"}
    text = "\n".join(found.lines())
    assert "version     2 (Approved)" in text
    assert "model       demo 2" in text
    # 0.214 USD an hour over 360,000 tokens
    cost = "1 x ml.c7i.xlarge, 0.21 USD an hour, 0.59 USD per million tokens at 100 tokens a second"
    assert f"{cost} an instance, measured by the evaluation" in text


def test_status_counts_with_what_production_served_once_it_has(world: World) -> None:
    then = datetime.now(UTC) - timedelta(hours=1)
    world.aws.client("cloudwatch").put_metric_data(
        Namespace=f"MlaPipeline/{NAME}",
        MetricData=[
            {"MetricName": "TokensPerSecond", "Value": value, "Timestamp": then} for value in (150.0, 250.0)
        ],
    )
    text = "\n".join(endpoint.status(world.clients, world.settings, NAME).lines())
    assert "0.30 USD per million tokens at 200 tokens a second an instance, served while busy" in text


def test_status_of_nothing_names_the_endpoint(world: World) -> None:
    with pytest.raises(UserError, match="no endpoint 'nothing'"):
        endpoint.status(world.clients, world.settings, "nothing")


def test_rollback_says_what_it_does_and_returns_to_the_version_before(world: World) -> None:
    chosen = rollback.plan(world.clients, world.settings)
    assert (chosen.live.arn, chosen.target.arn) == (world.versions[1], world.versions[0])
    text = "\n".join(chosen.lines())
    assert f"{NAME} serves version 2 (Approved)" in text
    assert f"it goes back to version 1, demo 1: {world.versions[0]}" in text
    assert "mla-pipeline reject 2" in text
    assert world.live() == world.versions[1]  # a plan changes nothing
    world.follow(rollback.start(world.clients, chosen))
    assert world.live() == world.versions[0]


def test_there_is_nothing_before_the_first_version(world: World) -> None:
    world.deploy(world.versions[0])
    with pytest.raises(UserError, match=r"no version before 1 to go back to: .*; older: none"):
        rollback.plan(world.clients, world.settings)


def test_only_versions_that_served_and_are_still_approved_come_into_question(world: World) -> None:
    versions.decide(world.clients, world.versions[1], "Rejected", "")
    world.deploy(world.versions[2])
    chosen = rollback.plan(world.clients, world.settings)
    assert chosen.target.arn == world.versions[0]  # 2 served as well, but was rejected
    versions.decide(world.clients, world.versions[0], "Rejected", "")
    with pytest.raises(UserError, match=r"older: 2 \(Rejected\), 1 \(Rejected\)"):
        rollback.plan(world.clients, world.settings)
    versions.decide(world.clients, world.versions[0], "Approved", "")


@pytest.mark.parametrize(
    ("version", "words"),
    [("3", "version 3 is live already"), ("2", "version 2 is Rejected"), ("9", "no version 9")],
)
def test_a_version_can_be_named_but_not_any(world: World, version: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rollback.plan(world.clients, world.settings, version)


def test_staging_is_traced_to_its_version_by_its_release(world: World) -> None:
    """Staging's configuration is named <pipeline>-<execution>, and that execution registered the version."""
    known = world.aws.sagemaker.describe_model_package(ModelPackageName=world.versions[0])
    register = {
        "Name": "RegisterModel",
        "Type": "RegisterModel",
        "Arguments": {
            "ModelPackageGroupName": NAME,
            "InferenceSpecification": known["InferenceSpecification"],
        },
    }
    pipeline = world.settings.names.release_pipeline
    world.aws.create(pipeline, [register])
    execution = world.aws.start(pipeline)
    world.aws.wait(execution)
    config = f"{pipeline}-{execution.rsplit('/', 1)[-1]}"
    model = world.aws.sagemaker.list_models(NameContains=NAME)["Models"][0]["ModelName"]
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": model,
        "InstanceType": "ml.c7i.xlarge",
        "InitialInstanceCount": 1,
    }
    world.aws.sagemaker.create_endpoint_config(EndpointConfigName=config, ProductionVariants=[variant])
    staged = endpoint._staged(world.clients, world.settings, config)
    assert versions.package(world.clients, staged).version == 4
