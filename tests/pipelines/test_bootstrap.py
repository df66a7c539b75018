"""Deploying stacks: change sets against moto's CloudFormation, which makes buckets but few of our resources.

So the mechanics run with small templates of the same names, parameters and outputs, and of the real ones the
change set is made but not executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import bootstrap
from pipelines.aws import Aws
from pipelines.errors import UserError
from pipelines.local import CREDENTIALS
from pipelines.settings import CONFIG, Settings
from tests.config.template import CORE, NETWORK, ROLES, TRIGGERS, WATCHING, Stack, load

REGION = "us-east-1"
ALWAYS = (CORE, ROLES, WATCHING)  # the templates that every account gets
OUTPUTS = {
    key: one for path in ALWAYS for key, one in Stack(load(path), {"NamePrefix": "mla-dev"}).outputs.items()
}
VPC = {"VpcId": "vpc-1", "SubnetIds": "subnet-1,subnet-2", "RouteTableIds": "rtb-1"}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    from moto import mock_aws
    from moto.cloudformation.models import ChangeSet
    from moto.cloudformation.models import Stack as MotoStack
    from moto.cloudformation.responses import CloudFormationResponse

    apply = ChangeSet.apply

    def apply_with_outputs(change: ChangeSet) -> None:
        apply(change)
        change.stack.template_dict = change.template_dict
        change.stack.output_map = change.stack._create_output_map()

    def same(stack: MotoStack, parameters: dict[str, str]) -> bool:
        return {**stack.stack_parameters, **parameters} == stack.stack_parameters

    # Three gaps of moto: a stack made by a change set has no outputs, defaults count as changed parameters, a
    # change set without changes is an error at once instead of one that fails with its reason.
    monkeypatch.setattr(CloudFormationResponse, "_validate_different_update", lambda *arguments: None)
    monkeypatch.setattr(ChangeSet, "apply", apply_with_outputs)
    monkeypatch.setattr(MotoStack, "has_parameters", same)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield Aws(REGION)


@pytest.fixture
def settings() -> Settings:
    return Settings.load("dev")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Templates of one bucket each, with the parameters of the real ones and their outputs."""
    for path in (*ALWAYS, NETWORK, TRIGGERS):
        template = load(path)
        small = {
            "AWSTemplateFormatVersion": "2010-09-09",
            "Parameters": {
                name: {"Type": "String", "Default": str(one.get("Default", "none"))}
                for name, one in template["Parameters"].items()
            },
            "Resources": {
                "Only": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": f"only-{path.stem}"}}
            },
            "Outputs": {name: {"Value": value} for name, value in _outputs(path).items()},
        }
        target = tmp_path / path.relative_to(CONFIG)
        target.parent.mkdir(exist_ok=True)
        target.write_text(yaml.safe_dump(small, sort_keys=False))
    return tmp_path


def _outputs(path: Path) -> dict[str, str]:
    if path == NETWORK:
        return {"SubnetIds": VPC["SubnetIds"], "SecurityGroupId": "sg-made"}
    return Stack(load(path), {"NamePrefix": "mla-dev"}).outputs


def parameters(aws: Aws, stack: str) -> dict[str, str]:
    found = aws.cloudformation.describe_stacks(StackName=stack)["Stacks"][0]["Parameters"]
    return {one["ParameterKey"]: one["ParameterValue"] for one in found}


def stacks(aws: Aws) -> list[str]:
    return sorted(one["StackName"] for one in aws.cloudformation.describe_stacks()["Stacks"])


def deploy(aws: Aws, settings: Settings, folder: Path, **given: str) -> tuple[dict[str, str], list[str]]:
    shown: list[str] = []
    return bootstrap.deploy(aws, settings, given, shown.append, seconds=0.01, folder=folder), shown


def test_stacks_come_up_in_order_with_events_and_the_outputs_of_the_one_before(
    aws: Aws, settings: Settings, folder: Path
) -> None:
    outputs, shown = deploy(aws, settings, folder, AlarmEmail="a@example.com")
    assert [line for line in shown if "stack" in line] == [
        "create stack mla-dev",
        "create stack mla-dev-roles",
        "create stack mla-dev-watching",
    ]
    assert "       add Only (AWS::S3::Bucket)" in shown
    assert any("CREATE_COMPLETE" in line for line in shown)
    assert outputs == OUTPUTS
    core = parameters(aws, "mla-dev")
    assert (core["NamePrefix"], core["ArtifactPrefix"]) == ("mla-dev", settings.prefix)
    roles = parameters(aws, "mla-dev-roles")
    assert roles["DatabricksSecretArn"] == settings.mlflow.secret_arn
    assert (roles["Bucket"], roles["KmsKeyArn"]) == (OUTPUTS["Bucket"], OUTPUTS["KmsKeyArn"])
    watching = parameters(aws, "mla-dev-watching")
    assert (watching["AlarmEmail"], watching["KmsKeyArn"]) == ("a@example.com", OUTPUTS["KmsKeyArn"])


def test_the_second_time_nothing_changes_and_given_values_stay(
    aws: Aws, settings: Settings, folder: Path
) -> None:
    deploy(aws, settings, folder, AlarmEmail="a@example.com")
    outputs, shown = deploy(aws, settings, folder)
    assert shown == [f"keep   stack mla-dev{name}" for name in ("", "-roles", "-watching")]
    assert outputs == OUTPUTS
    assert parameters(aws, "mla-dev-watching")["AlarmEmail"] == "a@example.com"


def test_a_changed_template_updates_its_stack_only(aws: Aws, settings: Settings, folder: Path) -> None:
    deploy(aws, settings, folder)
    path = folder / "infrastructure.yaml"
    path.write_text(path.read_text().replace("only-infrastructure", "another"))
    _, shown = deploy(aws, settings, folder)
    assert shown[0] == "update stack mla-dev"
    assert shown[-1] == "keep   stack mla-dev-watching"


def test_a_network_comes_first_and_its_group_reaches_the_roles(
    aws: Aws, settings: Settings, folder: Path
) -> None:
    outputs, _ = deploy(aws, settings, folder, **VPC)
    assert stacks(aws) == ["mla-dev", "mla-dev-network", "mla-dev-roles", "mla-dev-watching"]
    roles = parameters(aws, "mla-dev-roles")
    assert (roles["VpcId"], roles["SecurityGroupId"]) == ("vpc-1", "sg-made")
    assert bootstrap.configuration(outputs)["network"] == {
        "subnets": ["subnet-1", "subnet-2"],
        "security_group_ids": ["sg-made"],
    }


def test_triggers_come_last_when_configured_and_go_quiet_when_not(
    aws: Aws, settings: Settings, folder: Path
) -> None:
    boundary = "arn:aws:iam::111122223333:policy/boundary"
    deploy(aws, settings, folder, PermissionsBoundaryArn=boundary, DatabricksSecretKeyArn="key")
    assert stacks(aws) == ["mla-dev", "mla-dev-roles", "mla-dev-watching"]
    polling = Settings.load("dev", {"triggers.poll": "rate(15 minutes)"})
    deploy(aws, polling, folder)
    made = parameters(aws, "mla-dev-triggers")
    # given long ago, to other stacks
    assert (made["PermissionsBoundaryArn"], made["DatabricksSecretKeyArn"]) == (boundary, "key")
    wanted = {
        "PollSchedule": "rate(15 minutes)",
        "WebhookEnabled": "false",
        "ModelName": "main.mla.deepseek",
        "ModelAlias": "champion",
        "RegistryHost": "https://dev.cloud.databricks.com",
        "RegistryKind": "unity-catalog",
        "DatabricksSecretArn": settings.mlflow.secret_arn,
        "NotificationTopicArn": OUTPUTS["NotificationTopicArn"],
    }
    assert wanted.items() <= made.items()
    asked: dict[str, dict[str, str]] = {}

    def note(params: dict[str, Any], **_: Any) -> None:
        asked[params["StackName"]] = {
            one["ParameterKey"]: one.get("ParameterValue", "as before") for one in params["Parameters"]
        }

    aws.cloudformation.meta.events.register("before-parameter-build.cloudformation.CreateChangeSet", note)
    deploy(aws, settings, folder)
    off = asked["mla-dev-triggers"]
    assert (off["PollSchedule"], off["WebhookEnabled"], off["ModelName"]) == ("", "false", "as before")


def test_a_trigger_needs_an_alias_that_can_move(aws: Aws, folder: Path) -> None:
    fixed = {"triggers.webhook": True, "parameters.release.ModelUri": "models:/main.mla.deepseek/3"}
    with pytest.raises(UserError, match="has no alias that could move"):
        deploy(aws, Settings.load("dev", fixed), folder)


def test_a_key_that_was_brought_does_not_reach_the_logs(aws: Aws, settings: Settings, folder: Path) -> None:
    key = "arn:aws:kms:us-east-1:111122223333:key/brought"
    deploy(aws, settings, folder, KmsKeyArn=key)
    assert parameters(aws, "mla-dev")["KmsKeyArn"] == key
    deploy(aws, settings, folder)
    assert parameters(aws, "mla-dev-watching")["KmsKeyArn"] != key


def test_a_dry_run_of_the_real_template_leaves_nothing(aws: Aws, settings: Settings) -> None:
    shown: list[str] = []
    bootstrap.deploy(aws, settings, {}, shown.append, dry_run=True, seconds=0.01)
    assert shown[0] == "create stack mla-dev"
    assert "       add ArtifactBucket (AWS::S3::Bucket)" in shown
    assert stacks(aws) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"NamePrefx": "x"}, "no template has a parameter 'NamePrefx': -p; did you mean 'NamePrefix'?"),
        ({"SubnetIds": "subnet-1"}, "no value for VpcId, RouteTableIds"),
    ],
)
def test_wrong_parameters_deploy_nothing(
    aws: Aws, settings: Settings, given: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        bootstrap.deploy(aws, settings, given, print)
    assert words in str(error.value)
    assert stacks(aws) == []


def test_a_releasing_account_knows_the_deploying_one_by_its_configuration(aws: Aws, folder: Path) -> None:
    releasing = Settings.load("dev", {"production_account": "444455556666"})
    deploy(aws, releasing, folder)
    core = parameters(aws, "mla-dev")
    assert (core["ProductionAccountId"], core["ReleaseAccountId"]) == ("444455556666", "")


def test_a_deploying_account_knows_the_releasing_one_by_its_group(aws: Aws, folder: Path) -> None:
    group = "arn:aws:sagemaker:us-east-1:777788889999:model-package-group/mla-first-models"
    deploying = Settings.load("production", {"names.model_package_group": group})
    deploy(aws, deploying, folder)
    for stack in ("mla", "mla-roles"):
        made = parameters(aws, stack)
        assert (made["ReleaseAccountId"], made["ReleaseNamePrefix"]) == ("777788889999", "mla-first")
    assert parameters(aws, "mla")["ProductionAccountId"] == ""


def test_a_deploying_account_is_given_the_group_of_the_other_one() -> None:
    other = {"ReleaseAccountId": "777788889999", "ReleaseNamePrefix": "mla-first"}
    outputs = Stack(load(CORE), other).outputs
    group = "arn:aws:sagemaker:us-east-1:777788889999:model-package-group/mla-first-models"
    assert outputs["ModelPackageGroupName"] == group
    assert Settings.load("production", {"names.model_package_group": group}).group_name == "mla-first-models"


def test_names_that_no_stack_gives_are_refused(aws: Aws) -> None:
    odd = Settings.load("dev", {"names.production_pipeline": "moves"})
    with pytest.raises(UserError, match=r"does not end in -production: config/dev.yaml"):
        bootstrap.deploy(aws, odd, {}, print)


@pytest.mark.parametrize("environment", ["dev", "production"])
def test_the_configuration_in_the_repository_is_what_the_stack_prints(environment: str) -> None:
    """But for the account, generated names, images' tags, and the network, which a person chooses."""
    written = yaml.safe_load((CONFIG / f"{environment}.yaml").read_text())
    prefix = bootstrap.prefix(Settings.load(environment))
    account = written["role"].split(":")[4]
    outputs = {
        key: one
        for path in ALWAYS
        for key, one in Stack(load(path), {"NamePrefix": prefix}, account=account).outputs.items()
    }
    printed = bootstrap.configuration(outputs)
    for key in ("bucket", "names", "deployment"):
        assert written[key] == printed[key]
    assert set(written["roles"]) == set(printed["roles"])
    for image in ("job", "serve"):
        assert written["images"][image].split(":")[0] == printed["images"][image].split(":")[0]
    for pipeline, values in printed["parameters"].items():
        assert values.items() <= written["parameters"][pipeline].items()
    for name, arn in {"Pipeline": written["role"], **written["roles"]}.items():
        logical = f"{name[0].upper()}{name[1:]}Role"
        assert arn.split("/")[1].startswith(f"{prefix}-roles-{logical}-")


def test_a_stack_that_failed_says_what_to_do(
    aws: Aws, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"StackName": "mla-dev", "StackStatus": "ROLLBACK_COMPLETE"}
    monkeypatch.setattr("pipelines.stacks.find", lambda aws, name: broken if name == "mla-dev" else {})
    with pytest.raises(UserError, match=r"ROLLBACK_COMPLETE: stack mla-dev; .*delete the stack"):
        deploy(aws, settings, folder)
