"""Deploy the CloudFormation stacks in order, each as a change set that can be read before it is executed.

network (only with a VPC) -> core -> roles -> watching -> triggers (only when configured); outputs of one are
parameters of the next. Running it again changes nothing that is as the templates say. `configuration` turns
the outputs into what config/<env>.yaml holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines import stacks, triggers
from pipelines.aws import Aws
from pipelines.errors import UserError, choose
from pipelines.settings import CONFIG, ROLES, Settings
from pipelines.stacks import Stack

NETWORK_PARAMETERS = ("VpcId", "SubnetIds", "RouteTableIds")
Show = Callable[[str], None]


def deploy(
    aws: Aws,
    settings: Settings,
    given: Mapping[str, str],
    show: Show,
    dry_run: bool = False,
    seconds: float = 5.0,
    folder: Path = CONFIG,
) -> dict[str, str]:
    """Bring all stacks up to date and give their outputs together.

    given: parameters of any of the templates. show: gets each line for a person.
    dry_run: make, show and delete the change sets; stops after a new stack, whose outputs the next one takes.
    seconds: between two looks at a stack. folder: of the templates.
    Raises UserError for an unknown parameter, a stack that must be repaired by hand, or a failed deployment.
    """
    _refuse_unknown(given, folder)
    outputs: dict[str, str] = {}
    for make in (_network, _core, _roles, _watching, _triggers):
        stack = make(settings, given, outputs, folder)
        if not stack.wanted and not stacks.find(aws, stack.name):
            continue
        change = stacks.prepare(aws, stack)
        if not change.changes:
            show(f"keep   stack {stack.name}")
        else:
            show(f"{'create' if change.creates else 'update'} stack {stack.name}")
            for line in change.changes:
                show(f"       {line}")
            if dry_run:
                stacks.discard(aws, change)
                if change.creates:
                    show("       the stacks after it take its outputs; they are shown once it exists")
                    break
            else:
                for line in stacks.execute(aws, change, seconds):
                    show(f"       {line}")
        there = stacks.find(aws, stack.name)
        outputs |= stacks.pairs(there, "Output")
        # Given once, to the stack that takes them first; later stacks and later calls take them from there.
        keys = {_core: ("KmsKeyArn", "PermissionsBoundaryArn"), _roles: ("DatabricksSecretKeyArn",)}.get(
            make, ()
        )
        given = {
            **given,
            **{key: one for key, one in stacks.pairs(there, "Parameter").items() if key in keys and one},
        }
    return outputs


def prefix(settings: Settings) -> str:
    """NamePrefix of the stack that gives the configured names. Raises UserError when none does."""
    name = settings.names.production_pipeline
    if not name.endswith("-production"):
        raise UserError(
            f"names.production_pipeline = '{name}' does not end in -production",
            f"config/{settings.environment}.yaml",
            "the stack's names begin with <prefix> in <prefix>-production",
        )
    return name.removesuffix("-production")


def configuration(outputs: Mapping[str, str]) -> dict[str, Any]:
    """The part of config/<env>.yaml that the stacks decide, from their outputs."""
    roles = {name: outputs[f"{name[0].upper()}{name[1:]}RoleArn"] for name in ROLES}
    network = {
        "subnets": outputs.get("SubnetIds", "").split(","),
        "security_group_ids": [outputs.get("SecurityGroupId", "")],
    }
    return {
        "bucket": outputs["Bucket"],
        "kms_key": outputs["KmsKeyArn"],
        "role": outputs["PipelineRoleArn"],
        "roles": roles,
        **({"network": network} if "SubnetIds" in outputs else {}),
        "images": {
            "job": f"{outputs['JobRepositoryUri']}:TAG",
            "serve": f"{outputs['ServeRepositoryUri']}:TAG",
        },
        "names": {
            "release_pipeline": outputs["ReleasePipelineName"],
            "production_pipeline": outputs["ProductionPipelineName"],
            "model_package_group": outputs["ModelPackageGroupName"],
            "approval_rule": outputs["ApprovalRuleName"],
        },
        "deployment": {"alarms": outputs["RollbackAlarms"].split(",")},
        "parameters": {
            "release": {"StagingEndpointName": outputs["StagingEndpointName"]},
            "production": {"ProductionEndpointName": outputs["ProductionEndpointName"]},
        },
    }


def _network(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure" / "network.yaml"
    missing = [name for name in NETWORK_PARAMETERS if name not in given]
    if missing and "SubnetIds" in given:
        raise UserError(f"no value for {', '.join(missing)}", str(template), f"add -p {missing[0]}=…")
    parameters = {} if missing else _own(template, given)
    return Stack(f"{prefix(settings)}-network", template, parameters, wanted=not missing)


def _core(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure.yaml"
    return Stack(prefix(settings), template, _own(template, {**_common(settings), **given}))


def _common(settings: Settings) -> dict[str, str]:
    """Parameters of core and roles that the configuration decides; two accounts know each other by it."""
    derived = {"NamePrefix": prefix(settings), "ArtifactPrefix": settings.prefix}
    if not settings.deploys:
        derived["ProductionAccountId"] = str(settings.production_account)
    if not settings.releases:
        derived["ReleaseAccountId"] = settings.group_account
        derived["ReleaseNamePrefix"] = settings.group_name.removesuffix("-models")
    return derived


def _roles(settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path) -> Stack:
    template = folder / "infrastructure" / "roles.yaml"
    derived = _common(settings)
    if settings.mlflow.secret_arn:
        derived["DatabricksSecretArn"] = settings.mlflow.secret_arn
    if "SecurityGroupId" in outputs:
        derived["SecurityGroupId"] = outputs["SecurityGroupId"]
    made = {key: outputs[key] for key in ("Bucket", "KmsKeyArn")}
    return Stack(f"{prefix(settings)}-roles", template, _own(template, {**derived, **given, **made}))


def _watching(
    settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path
) -> Stack:
    template = folder / "infrastructure" / "watching.yaml"
    derived = {"NamePrefix": prefix(settings)}
    if not given.get("KmsKeyArn"):  # the policy of a key that was brought may not know CloudWatch Logs
        derived["KmsKeyArn"] = outputs["KmsKeyArn"]
    own = {key: one for key, one in given.items() if key != "KmsKeyArn"}
    return Stack(f"{prefix(settings)}-watching", template, _own(template, {**derived, **own}))


def _triggers(
    settings: Settings, given: Mapping[str, str], outputs: Mapping[str, str], folder: Path
) -> Stack:
    """Both triggers off in a stack that is there: it stays, without rule, address and secrets."""
    template, name = folder / "infrastructure" / "triggers.yaml", f"{prefix(settings)}-triggers"
    poll, webhook = settings.triggers.poll or "", settings.triggers.webhook
    derived = {
        "NamePrefix": prefix(settings),
        "PollSchedule": poll,
        "WebhookEnabled": str(webhook).lower(),
        "NotificationTopicArn": outputs.get("NotificationTopicArn", ""),
    }
    if poll or webhook:
        derived["ModelName"], derived["ModelAlias"] = triggers.alias_of(settings)
    if poll:
        derived["RegistryHost"] = triggers.host_of(settings)
        unity = settings.mlflow.registry_uri.startswith("databricks-uc")
        derived["RegistryKind"] = "unity-catalog" if unity else "mlflow"
        derived["DatabricksSecretArn"] = settings.mlflow.secret_arn or ""
    return Stack(name, template, _own(template, {**derived, **given}), wanted=bool(poll or webhook))


def _own(template: Path, values: Mapping[str, str]) -> dict[str, str]:
    return {key: one for key, one in values.items() if key in stacks.declared(template)}


def _refuse_unknown(given: Mapping[str, str], folder: Path) -> None:
    templates = [folder / "infrastructure.yaml", *sorted((folder / "infrastructure").glob("*.yaml"))]
    known = sorted(set().union(*map(stacks.declared, templates)))
    for name in given:
        if name not in known:
            raise UserError(f"no template has a parameter '{name}'", "-p", choose(name, known))
