"""DeployProduction against scripted answers; botocore validates every request and answer by its shapes."""

import json
from datetime import UTC, datetime

import boto3
import pytest
from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
from botocore.stub import ANY, Stubber

from steps import aws, deploy_production, deployed_endpoint
from steps.deployment import Deployment
from steps.job import StepError
from tests.steps.support import StepRun

ARN = "arn:aws:sagemaker:us-east-1:123456789012:model-package/mla-models/3"
ROLE = "arn:aws:iam::123456789012:role/mla-pipeline-execution"
ENDPOINT = "mla-production"
OPTIONS = {
    "model_package_arn": ARN,
    "endpoint_name": ENDPOINT,
    "instance_type": "ml.c7i.xlarge",
    "instance_count": 2,
    "role_arn": ROLE,
    "deployment": json.dumps(
        {
            "strategy": "canary",
            "step_size": "50%",
            "bake_seconds": 2,
            "timeout_seconds": 3600,
            "alarms": ["mla-5xx"],
        }
    ),
}
MODEL = deploy_production.derived_name("mla-models-v3", ARN, ROLE, "{}")
NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def service(monkeypatch):
    client = boto3.client(
        "sagemaker", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    monkeypatch.setattr(aws, "client", lambda name: client)
    monkeypatch.setattr(deployed_endpoint, "FIRST_POLL_SECONDS", 0.0)
    with Stubber(client) as stubber:
        yield Service(stubber)
        stubber.assert_no_pending_responses()


class Service:
    """What the service answers next."""

    def __init__(self, stubber: Stubber) -> None:
        self.stubber = stubber
        self.config: str | None = None

    def package(self, approval: str = "Approved") -> None:
        container = {
            "Image": "serve:1",
            "ModelDataSource": {"S3DataSource": _folder("s3://b/model/")},
            "AdditionalModelDataSources": [
                {"ChannelName": "kernel", "S3DataSource": _folder("s3://b/kernel/")}
            ],
        }
        self.stubber.add_response(
            "describe_model_package",
            {
                "ModelPackageName": "mla-models/3",
                "ModelPackageArn": ARN,
                "ModelPackageGroupName": "mla-models",
                "ModelPackageVersion": 3,
                "CreationTime": NOW,
                "ModelPackageStatus": "Completed",
                "ModelPackageStatusDetails": {"ValidationStatuses": []},
                "ModelApprovalStatus": approval,
                "InferenceSpecification": {
                    "Containers": [container],
                    "SupportedContentTypes": ["application/json"],
                    "SupportedResponseMIMETypes": ["application/json"],
                },
            },
            {"ModelPackageName": ARN},
        )

    def model_and_config(self, exist: bool = False) -> None:
        if exist:
            self.refuse("create_model", "Cannot create already existing model.")
            self.refuse("create_endpoint_config", "Cannot create already existing endpoint configuration.")
            return
        self.stubber.add_response(
            "create_model",
            {"ModelArn": "arn:aws:sagemaker:us-east-1:123456789012:model/m"},
            {"ModelName": MODEL, "ExecutionRoleArn": ROLE, "Containers": [{"ModelPackageName": ARN}]},
        )
        self.stubber.add_response(
            "create_endpoint_config",
            {"EndpointConfigArn": "arn:aws:sagemaker:us-east-1:123456789012:endpoint-config/c"},
            {"EndpointConfigName": ANY, "ProductionVariants": ANY},
        )

    def endpoint(
        self, status: str, config: str, reason: str | None = None, pending: str | None = None
    ) -> None:
        answer = {
            "EndpointName": ENDPOINT,
            "EndpointArn": f"arn:aws:sagemaker:us-east-1:123456789012:endpoint/{ENDPOINT}",
            "EndpointConfigName": config,
            "EndpointStatus": status,
            "CreationTime": NOW,
            "LastModifiedTime": NOW,
        }
        if reason:
            answer["FailureReason"] = reason
        if pending:
            answer["PendingDeploymentSummary"] = {"EndpointConfigName": pending}
        self.stubber.add_response("describe_endpoint", answer)

    def no_endpoint(self) -> None:
        self.refuse("describe_endpoint", f'Could not find endpoint "{ENDPOINT}".')

    def create_endpoint(self) -> None:
        self.stubber.add_response(
            "create_endpoint",
            {"EndpointArn": f"arn:aws:sagemaker:us-east-1:123456789012:endpoint/{ENDPOINT}"},
            {"EndpointName": ENDPOINT, "EndpointConfigName": wanted_config()},
        )

    def update_endpoint(self) -> None:
        self.stubber.add_response(
            "update_endpoint",
            {"EndpointArn": f"arn:aws:sagemaker:us-east-1:123456789012:endpoint/{ENDPOINT}"},
            {
                "EndpointName": ENDPOINT,
                "EndpointConfigName": wanted_config(),
                "DeploymentConfig": {
                    "BlueGreenUpdatePolicy": {
                        "TrafficRoutingConfiguration": {
                            "Type": "CANARY",
                            "WaitIntervalInSeconds": 2,
                            "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 50},
                        },
                        "TerminationWaitInSeconds": 0,
                        "MaximumExecutionTimeoutInSeconds": 3600,
                    },
                    "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "mla-5xx"}]},
                },
            },
        )

    def refuse(self, operation: str, message: str) -> None:
        self.stubber.add_client_error(operation, "ValidationException", message)


def _folder(uri: str) -> dict[str, str]:
    return {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}


def wanted_config() -> str:
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": MODEL,
        "InstanceType": "ml.c7i.xlarge",
        "InitialInstanceCount": 2,
        "InitialVariantWeight": 1.0,
    }
    return deploy_production.derived_name(
        "mla-models-v3", json.dumps({"ProductionVariants": [variant]}, sort_keys=True)
    )


def deploy(tmp_path) -> dict:
    run = StepRun(deploy_production, tmp_path).give("package", "package.json", {"model_package_arn": ARN})
    return run.start(**OPTIONS).json("deployment", "deployment.json")


def test_the_first_deployment_creates_the_endpoint(service, tmp_path):
    service.package()
    service.model_and_config()
    service.no_endpoint()
    service.package()
    service.create_endpoint()
    service.endpoint("Creating", wanted_config())
    service.endpoint("InService", wanted_config())
    service.endpoint("InService", wanted_config())
    document = deploy(tmp_path)
    assert document["action"] == "created"
    assert document["endpoint_config_name"] == wanted_config()
    assert document["model_name"] == MODEL


def test_an_update_follows_the_policy_and_names_what_was_live_before(service, tmp_path):
    service.package()
    service.model_and_config()
    service.endpoint("InService", "old-config")
    service.package()
    service.update_endpoint()
    service.endpoint("Updating", "old-config")
    service.endpoint("InService", wanted_config())
    service.endpoint("InService", wanted_config())
    document = deploy(tmp_path)
    assert (document["action"], document["previous_endpoint_config_name"]) == ("updated", "old-config")


def test_a_second_event_for_the_same_approval_changes_nothing(service, tmp_path):
    service.package()
    service.model_and_config(exist=True)
    service.endpoint("InService", wanted_config())
    service.endpoint("InService", wanted_config())
    assert deploy(tmp_path)["action"] == "unchanged"


def test_an_update_in_progress_is_awaited_first(service, tmp_path):
    service.package()
    service.model_and_config(exist=True)
    service.endpoint("Updating", "old-config")
    service.endpoint("Updating", "old-config")
    service.endpoint("InService", wanted_config())  # the other execution had the same ARN
    service.endpoint("InService", wanted_config())
    assert deploy(tmp_path)["action"] == "unchanged"


def test_a_lost_race_waits_for_the_winner(service, tmp_path):
    service.package()
    service.model_and_config(exist=True)
    service.no_endpoint()
    service.package()
    service.refuse("create_endpoint", "Cannot create already existing endpoint.")
    service.endpoint("Creating", wanted_config())
    service.endpoint("InService", wanted_config())
    service.endpoint("InService", wanted_config())
    assert deploy(tmp_path)["action"] == "unchanged"


def test_a_silent_rollback_is_a_failure_with_the_services_reason(service, tmp_path):
    service.package()
    service.model_and_config()
    service.endpoint("InService", "old-config")
    service.package()
    service.update_endpoint()
    service.endpoint("RollingBack", "old-config")
    service.endpoint("InService", "old-config", reason="alarm mla-5xx went off")
    service.endpoint("InService", "old-config", reason="alarm mla-5xx went off")
    with pytest.raises(StepError, match=r"rolled back: it serves old-config.*alarm mla-5xx went off"):
        deploy(tmp_path)


def test_a_rollback_of_the_same_update_by_another_execution_is_not_repeated(service, tmp_path):
    """A duplicate event waits for the first one's update; an alarm undid it, and would again."""
    service.package()
    service.model_and_config(exist=True)
    service.endpoint("Updating", "old-config", pending=wanted_config())
    service.endpoint("RollingBack", "old-config", pending=wanted_config())
    service.endpoint("InService", "old-config", reason="alarm mla-5xx went off")
    service.endpoint("InService", "old-config", reason="alarm mla-5xx went off")
    with pytest.raises(StepError, match=r"rolled back: it serves old-config"):
        deploy(tmp_path)


def test_a_failed_creation_gives_the_services_reason(service, tmp_path):
    service.package()
    service.model_and_config()
    service.no_endpoint()
    service.package()
    service.create_endpoint()
    service.endpoint("Failed", wanted_config(), reason="the container did not pass its ping health check")
    service.endpoint("Failed", wanted_config(), reason="the container did not pass its ping health check")
    with pytest.raises(StepError, match="is Failed after its deployment: the container did not pass"):
        deploy(tmp_path)


def test_two_versions_at_once_after_a_failed_way_back_say_so(service, tmp_path):
    service.package()
    service.model_and_config()
    service.endpoint("InService", "old-config")
    service.package()
    service.update_endpoint()
    service.endpoint("UpdateRollbackFailed", "old-config", reason="no capacity")
    service.endpoint("UpdateRollbackFailed", "old-config", reason="no capacity")
    with pytest.raises(StepError, match=r"instances of two versions.*no capacity.*start production"):
        deploy(tmp_path)


@pytest.mark.parametrize("config", ["old-config", None])
def test_an_endpoint_with_two_versions_is_brought_to_one(service, tmp_path, config):
    service.package()
    service.model_and_config(exist=True)
    service.endpoint("UpdateRollbackFailed", config or wanted_config())
    service.package()
    service.update_endpoint()
    service.endpoint("InService", wanted_config())
    service.endpoint("InService", wanted_config())
    assert deploy(tmp_path)["action"] == "updated"


def test_a_failed_endpoint_takes_no_update(service, tmp_path):
    service.package()
    service.model_and_config()
    service.endpoint("Failed", "old-config", reason="no capacity")
    with pytest.raises(StepError, match=r"takes no update: no capacity.*Delete it"):
        deploy(tmp_path)


@pytest.mark.parametrize("approval", ["Rejected", "PendingManualApproval"])
def test_only_an_approved_version_is_deployed(service, tmp_path, approval):
    service.package(approval)
    with pytest.raises(StepError, match=f"is {approval}, not Approved"):
        deploy(tmp_path)
    assert not (tmp_path / "processing/output/deployment").exists()


def test_an_approval_withdrawn_while_waiting_stops_the_deployment(service, tmp_path):
    service.package()
    service.model_and_config()
    service.endpoint("InService", "old-config")
    service.package("Rejected")
    with pytest.raises(StepError, match="is Rejected"):
        deploy(tmp_path)


def test_another_package_than_the_verified_one_is_refused(service, tmp_path):
    run = StepRun(deploy_production, tmp_path).give("package", "package.json", {"model_package_arn": "other"})
    with pytest.raises(StepError, match="VerifyPackage verified other"):
        run.start(**OPTIONS)


def test_derived_names_depend_on_all_content_and_fit():
    names = {
        deploy_production.derived_name("m" * 80, "a", "b"),
        deploy_production.derived_name("m" * 80, "ab", ""),
    }
    assert len(names) == 2
    assert all(len(name) <= 63 for name in names)


@pytest.mark.parametrize(("instance", "asked"), [("ml.c7i.xlarge", True), ("ml.p5.4xlarge", False)])
def test_a_key_is_asked_for_only_where_the_service_takes_one(service, instance, asked):
    policy = Deployment(
        strategy="all_at_once",
        bake_seconds=0,
        timeout_seconds=600,
        kms_key="arn:aws:kms:us-east-1:123456789012:key/k",
    )
    request = {"EndpointConfigName": ANY, "ProductionVariants": ANY}
    service.stubber.add_response(
        "create_endpoint_config",
        {"EndpointConfigArn": "arn:aws:sagemaker:us-east-1:123456789012:endpoint-config/c"},
        request | ({"KmsKeyId": policy.kms_key} if asked else {}),
    )
    deploy_production.ensure_endpoint_config(aws.client("sagemaker"), MODEL, instance, 1, policy)


def test_a_lost_connection_does_not_end_the_watch(monkeypatch):
    """The update goes on without us; ending the step would leave production moved and nothing recorded."""
    found = [
        ConnectionClosedError(endpoint_url="https://x"),
        ReadTimeoutError(endpoint_url="https://x"),
        None,
    ]

    def find(sagemaker, name):
        one = found.pop(0)
        if one:
            raise one

    monkeypatch.setattr(deployed_endpoint, "FIRST_POLL_SECONDS", 0.0)
    monkeypatch.setattr(deployed_endpoint.Endpoint, "find", find)
    assert deployed_endpoint.wait_until_settled(None, ENDPOINT, 10) is None
    found[:] = [ConnectionClosedError(endpoint_url="https://x")] * 2
    with pytest.raises(StepError, match="still not to be asked after 0 s"):
        deployed_endpoint.wait_until_settled(None, ENDPOINT, 0)
