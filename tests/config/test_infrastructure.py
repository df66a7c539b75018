"""The CloudFormation templates: valid, narrow, and named as config/*.yaml expects."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config import policy_checks
from tests.config.template import (
    ACCOUNT,
    CONFIG,
    CORE,
    NETWORK,
    REGION,
    ROLES,
    TRIGGERS,
    WATCHING,
    Stack,
    load,
)

TEMPLATES = {path.stem: path for path in (CORE, ROLES, NETWORK, WATCHING, TRIGGERS)}
OTHER = "444455556666"
KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/reused"
SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:mla/databricks-AbCdEf"
BOUNDARY = f"arn:aws:iam::{ACCOUNT}:policy/boundary"
# Every condition of the template is true in one of these and false in another.
MADE = {"Bucket": f"mla-artifacts-{ACCOUNT}-{REGION}", "KmsKeyArn": KEY}  # by the core, for the roles
VARIANTS: dict[str, tuple[Path, dict[str, str]]] = {
    "core": (CORE, {}),
    "core, reused key, boundary": (CORE, {"KmsKeyArn": KEY, "PermissionsBoundaryArn": BOUNDARY}),
    "core of a releasing account": (CORE, {"ProductionAccountId": OTHER}),
    "core of a deploying account": (CORE, {"ReleaseAccountId": OTHER}),
    "images from a private repository": (
        CORE,
        {
            "SourceRepository": "https://github.com/example/mla-pipeline",
            "SourceConnectionArn": f"arn:aws:codeconnections:{REGION}:{ACCOUNT}:connection/1",
        },
    ),
    "roles": (ROLES, MADE),
    "roles with boundary and secret": (
        ROLES,
        {
            **MADE,
            "PermissionsBoundaryArn": BOUNDARY,
            "DatabricksSecretArn": SECRET,
            "DatabricksSecretKeyArn": KEY,
        },
    ),
    "roles in a network": (ROLES, {**MADE, "VpcId": "vpc-1", "SecurityGroupId": "sg-1"}),
    "roles of a deploying account": (
        ROLES,
        {
            **MADE,
            "ReleaseAccountId": OTHER,
            "ReleaseKmsKeyArn": f"arn:aws:kms:{REGION}:{OTHER}:key/release",
        },
    ),
}


@pytest.fixture(scope="module")
def core() -> dict[str, Any]:
    return load(CORE)


@pytest.fixture(scope="module")
def roles() -> dict[str, Any]:
    return load(ROLES)


def test_cfn_lint_finds_nothing() -> None:
    cfn_lint = Path(sys.executable).with_name("cfn-lint")
    paths = [str(path) for path in TEMPLATES.values()]
    result = subprocess.run([cfn_lint, "--", *paths], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_can_be_sent_without_a_bucket(name: str) -> None:
    """CreateStack takes 51,200 bytes of text; a longer one would need a bucket before the stack makes it."""
    assert len(TEMPLATES[name].read_bytes()) <= 51_200


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_uses_the_yaml_that_cloudformation_documents(name: str) -> None:
    """Aliases and merge keys are outside of it."""
    events = yaml.parse(TEMPLATES[name].read_text(encoding="utf-8"))
    assert not [one for one in events if isinstance(one, yaml.AliasEvent) or getattr(one, "anchor", None)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_policies_are_narrow(variant: str) -> None:
    path, parameters = VARIANTS[variant]
    assert policy_checks.findings(Stack(load(path), parameters)) == []


def test_policies_of_the_other_templates_are_narrow() -> None:
    for path in (NETWORK, WATCHING, TRIGGERS):
        assert policy_checks.findings(Stack(load(path))) == []
    everything = {"PollSchedule": "rate(1 hour)", "WebhookEnabled": "true"}
    everything |= {
        "PermissionsBoundaryArn": BOUNDARY,
        "DatabricksSecretArn": SECRET,
        "DatabricksSecretKeyArn": KEY,
    }
    assert policy_checks.findings(Stack(load(TRIGGERS), everything)) == []


@pytest.mark.parametrize("template", [CORE, ROLES], ids=lambda path: path.stem)
def test_every_condition_is_tried_both_ways(template: Path) -> None:
    stacks = [Stack(load(path), parameters) for path, parameters in VARIANTS.values() if path == template]
    for name in stacks[0].template["Conditions"]:
        assert {stack.condition(name) for stack in stacks} == {True, False}, name


BAD = {
    "no_wildcard_action": {"Action": "s3:Get*"},
    "no_wildcard_resource": {"Resource": "*"},
    "account_and_region_are_named": {"Resource": "arn:aws:sagemaker:*:*:endpoint/x"},
    "no_negations": {"NotResource": "arn:aws:s3:::x"},
    "statements_have_names": {"Sid": ""},
    "roles_are_passed_by_name": {"Action": "iam:PassRole", "Resource": f"arn:aws:iam::{ACCOUNT}:role/*"},
    "actions_take_the_resource": {
        "Action": "sagemaker:DescribePipeline",
        "Resource": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/x",
    },
    "policies_fit": {"Resource": [f"arn:aws:s3:::{'x' * 60}{number}" for number in range(200)]},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_statement_is_found(roles: dict[str, Any], name: str) -> None:
    stack = Stack(copy.deepcopy(roles), MADE)
    good = {"Sid": "New", "Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::x"}
    document = stack.resources["EvaluateRole"]["Properties"]["Policies"][0]["PolicyDocument"]
    document["Statement"].append({**good, **BAD[name]})
    assert any(found.startswith(f"{name}: EvaluateRole") for found in policy_checks.findings(stack))


def test_a_bad_role_or_resource_policy_is_found(core: dict[str, Any]) -> None:
    stack = Stack(copy.deepcopy(core), {"PermissionsBoundaryArn": BOUNDARY})
    role = stack.resources["CodeBuildRole"]["Properties"]
    del role["PermissionsBoundary"], role["AssumeRolePolicyDocument"]["Statement"][0]["Condition"]
    stack.resources["ArtifactBucketPolicy"]["Properties"]["PolicyDocument"]["Statement"] = [
        {"Sid": "Public", "Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": "x"},
        {
            "Sid": "Open",
            "Effect": "Allow",
            "Principal": {"Service": "x.amazonaws.com"},
            "Action": "s3:GetObject",
        },
    ]
    found = {one.split(":")[0] for one in policy_checks.findings(stack)}
    assert found == {
        "roles_honour_the_boundary",
        "trust_names_the_source",
        "services_name_the_source",
        "nobody_is_everybody",
    }


@pytest.mark.parametrize("template", [CORE, ROLES], ids=lambda path: path.stem)
def test_every_role_is_mapped_and_given_out(template: Path) -> None:
    stack = Stack(load(template), {"ProductionAccountId": OTHER} if template == CORE else MADE)
    mapped = {one for ids in stack.roles.values() for one in ids}
    roles = set(stack.of_type("AWS::IAM::Role"))
    assert mapped - set(stack.of_type("AWS::IAM::ManagedPolicy")) == roles
    inner = {"ForwardRole", "CodeBuildRole"}  # used inside the stack only
    assert {f"{name}Arn" for name in mapped - inner} == {
        key for key in stack.outputs if key.endswith(("RoleArn", "PolicyArn"))
    }


def test_bucket_is_private_encrypted_and_versioned(core: dict[str, Any]) -> None:
    bucket = Stack(core).of_type("AWS::S3::Bucket")["ArtifactBucket"]
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    rules = {one["Id"]: one for one in bucket["LifecycleConfiguration"]["Rules"]}
    # an approved version lives there
    assert "ExpirationInDays" not in rules["ExecutionsGetCheaper"]
    assert not rules["CapturedDataExpires"]["Prefix"].startswith(rules["ExecutionsGetCheaper"]["Prefix"])


def test_bucket_refuses_plain_http_and_old_tls(core: dict[str, Any]) -> None:
    policy = Stack(core).of_type("AWS::S3::BucketPolicy")["ArtifactBucketPolicy"]
    denied = {one["Sid"]: one for one in policy["PolicyDocument"]["Statement"] if one["Effect"] == "Deny"}
    assert denied["TlsOnly"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert denied["ModernTlsOnly"]["Condition"] == {"NumericLessThan": {"s3:TlsVersion": "1.2"}}
    assert len(denied["TlsOnly"]["Resource"]) == 2  # the bucket and what is in it


def test_images_cannot_be_replaced_and_are_scanned(core: dict[str, Any]) -> None:
    repositories = Stack(core).of_type("AWS::ECR::Repository")
    assert {one["RepositoryName"] for one in repositories.values()} == {"mla-job", "mla-serve"}
    for one in repositories.values():
        assert one["ImageTagMutability"] == "IMMUTABLE"
        assert one["ImageScanningConfiguration"] == {"ScanOnPush": True}


def test_names_are_those_of_the_configuration(core: dict[str, Any]) -> None:
    """With NamePrefix as written in a file, config/<env>.yaml needs no other names than the stack makes."""
    for environment, prefix in {"dev": "mla-dev", "production": "mla"}.items():
        base = yaml.safe_load((CONFIG / "base.yaml").read_text(encoding="utf-8"))
        overlay = yaml.safe_load((CONFIG / f"{environment}.yaml").read_text(encoding="utf-8"))
        names = {**base["names"], **overlay.get("names", {})}
        release = {**base["parameters"]["release"], **overlay["parameters"].get("release", {})}
        outputs = Stack(core, {"NamePrefix": prefix}).outputs
        assert names == {
            "release_pipeline": outputs["ReleasePipelineName"],
            "production_pipeline": outputs["ProductionPipelineName"],
            "model_package_group": outputs["ModelPackageGroupName"],
            "approval_rule": outputs["ApprovalRuleName"],
        }
        assert release["StagingEndpointName"] == outputs["StagingEndpointName"]


def test_alarms_of_the_production_configuration_exist() -> None:
    stack = Stack(load(WATCHING), {"MinTokensPerSecond": "1"})
    alarms = {one["AlarmName"] for one in stack.of_type("AWS::CloudWatch::Alarm").values()}
    assert alarms == {f"mla-production-{name}" for name in ("5xx", "latency", "gpu-memory", "tokens")}
    production = yaml.safe_load((CONFIG / "production.yaml").read_text(encoding="utf-8"))
    assert set(production["deployment"]["alarms"]) <= alarms
    assert set(stack.outputs["RollbackAlarms"].split(",")) <= alarms


def test_the_metric_of_tokens_is_one_that_the_server_logs() -> None:
    """Alarm, dashboard and `status` read it; a filter of a field that no line has is silent for ever."""
    from container.serving.metrics import Metrics
    from pipelines import endpoint

    (found,) = Stack(load(WATCHING)).of_type("AWS::Logs::MetricFilter").values()
    (made,) = found["MetricTransformations"]
    field = made["MetricValue"].removeprefix("$.")
    assert found["FilterPattern"] == f"{{ $.{field} = * }}"
    metrics = Metrics()
    assert field not in json.loads(metrics.embedded("m"))  # an idle server is not a slow one
    metrics.output_tokens += 30
    metrics.step_time.observe(0.5)
    assert json.loads(metrics.embedded("m"))[field] == 60
    assert field not in json.loads(metrics.embedded("m"))
    read = json.dumps(load(WATCHING)["Resources"]["Dashboard"])
    assert made["MetricName"] in read
    assert made["MetricName"] == endpoint.THROUGHPUT
    assert made["MetricNamespace"] == endpoint.THROUGHPUT_NAMESPACE.format("mla-production")


def test_dashboard_is_json() -> None:
    (dashboard,) = Stack(load(WATCHING)).of_type("AWS::CloudWatch::Dashboard").values()
    titles = [one["properties"]["title"] for one in json.loads(dashboard["DashboardBody"])["widgets"]]
    assert len(titles) == len(set(titles)) == 6


def test_an_approval_reaches_only_the_production_account(core: dict[str, Any]) -> None:
    assert "ForwardApprovalsRule" not in Stack(core).resources
    rule = Stack(core, {"ProductionAccountId": OTHER}).of_type("AWS::Events::Rule")["ForwardApprovalsRule"]
    assert rule["EventPattern"]["detail"] == {
        "ModelPackageGroupName": ["mla-models"],
        "ModelApprovalStatus": ["Approved"],
    }
    assert [target["Arn"] for target in rule["Targets"]] == [
        f"arn:aws:events:{REGION}:{OTHER}:event-bus/default"
    ]


def test_every_offered_instance_type_is_priced_or_said_not_to_be() -> None:
    from pipelines.parameters import ENDPOINT_INSTANCES, PROCESSING_INSTANCES

    prices = yaml.safe_load((CONFIG / "prices" / f"{REGION}.yaml").read_text(encoding="utf-8"))
    assert set(ENDPOINT_INSTANCES) | set(PROCESSING_INSTANCES) <= set(prices["instance_hour"]) | set(
        prices["unpriced"]
    )
    assert all(0 < price < 200 for price in prices["instance_hour"].values())
