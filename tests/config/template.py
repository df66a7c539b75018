"""Read a CloudFormation template and resolve it for given parameters, as far as its policies need.

`Stack` evaluates conditions and intrinsic functions and gives each resource the name and ARN that AWS would
give it, so that a policy reads as IAM reads it: `arn:aws:s3:::mla-artifacts-111122223333-us-east-1/...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG = Path(__file__).resolve().parents[2] / "config"
CORE = CONFIG / "infrastructure.yaml"
ROLES = CONFIG / "infrastructure" / "roles.yaml"
NETWORK = CONFIG / "infrastructure" / "network.yaml"
WATCHING = CONFIG / "infrastructure" / "watching.yaml"
TRIGGERS = CONFIG / "infrastructure" / "triggers.yaml"

ACCOUNT, REGION = "111122223333", "us-east-1"
_NOTHING = object()  # AWS::NoValue: whatever holds it drops it


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short tags; a number of the text stays the text it was in a policy."""


def _short_tag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
        if suffix == "GetAtt":
            value = value.split(".", 1)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _short_tag)


def load(path: Path = CORE) -> dict[str, Any]:
    """The template with short tags spelled out (`!Ref X` -> `{"Ref": "X"}`)."""
    template = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    assert isinstance(template, dict)
    return template


class Stack:
    """A template with parameters, in an account and region.

    names: logical id -> physical name of a resource, where it is not what the template says.
    `resources`: logical id -> resource whose condition holds, resolved; `outputs` alike. `roles`: step or
    person -> ids of the roles or policies.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        parameters: Mapping[str, str] | None = None,
        *,
        account: str = ACCOUNT,
        region: str = REGION,
        names: Mapping[str, str] | None = None,
    ) -> None:
        declared = template.get("Parameters", {})
        if unknown := set(parameters or {}) - set(declared):
            raise KeyError(f"the template has no parameter {sorted(unknown)}")
        defaults = {name: str(one.get("Default", "")) for name, one in declared.items()}
        self.parameters = {**defaults, **(parameters or {})}
        self.template = template
        self._account, self._region = account, region
        self._pseudo = {
            "AWS::AccountId": account,
            "AWS::Partition": "aws",
            "AWS::Region": region,
            "AWS::URLSuffix": "amazonaws.com",
            "AWS::StackName": "mla",
        }
        self._names: dict[str, str] = dict(names or {})
        self.resources: dict[str, dict[str, Any]] = {}
        for name, resource in template["Resources"].items():
            if "Condition" not in resource or self.condition(resource["Condition"]):
                self.resources[name] = {
                    **resource,
                    "Properties": self.resolve(resource.get("Properties", {})),
                }
        self.outputs = {
            name: self.resolve(one["Value"])
            for name, one in template.get("Outputs", {}).items()
            if "Condition" not in one or self.condition(one["Condition"])
        }
        named = template.get("Metadata", {}).get("MlaPipeline", {}).get("Roles", {})
        self.roles = {who: one if isinstance(one, list) else [one] for who, one in named.items()}

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        """Logical id -> resolved properties of every resource of the type."""
        return {name: one["Properties"] for name, one in self.resources.items() if one["Type"] == kind}

    def condition(self, name: str) -> bool:
        """Value of a condition of the template."""
        return self._truth(self.template["Conditions"][name])

    def _truth(self, expression: Mapping[str, Any]) -> bool:
        ((function, value),) = expression.items()
        if function == "Condition":
            return self.condition(value)
        if function == "Fn::Not":
            return not self._truth(value[0])
        if function == "Fn::And":
            return all(self._truth(one) for one in value)
        if function == "Fn::Or":
            return any(self._truth(one) for one in value)
        if function == "Fn::Equals":
            left, right = (str(self.resolve(one)) for one in value)
            return left == right
        raise NotImplementedError(f"condition function {function}")

    def resolve(self, value: Any) -> Any:
        """`value` without intrinsic functions."""
        if isinstance(value, list):
            return [one for one in map(self.resolve, value) if one is not _NOTHING]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((key, argument),) = value.items()
            if key == "Ref":
                return self._reference(argument)
            if key.startswith("Fn::"):
                return self._call(key, argument)
        resolved = {key: self.resolve(one) for key, one in value.items()}
        return {key: one for key, one in resolved.items() if one is not _NOTHING}

    def _call(self, function: str, argument: Any) -> Any:
        if function == "Fn::If":
            name, yes, no = argument
            return self.resolve(yes if self.condition(name) else no)
        if function == "Fn::GetAtt":
            return self._attribute(*argument)
        if function == "Fn::Sub":
            return re.sub(r"\$\{([^}]+)\}", lambda found: str(self._dotted(found.group(1))), argument)
        if function == "Fn::Join":
            separator, parts = argument
            parts = self.resolve(parts)
            return separator.join(parts if isinstance(parts, list) else [parts])
        raise NotImplementedError(f"function {function}")

    def _dotted(self, name: str) -> Any:
        logical, _, attribute = name.partition(".")
        return self._attribute(logical, attribute) if attribute else self._reference(name)

    def _reference(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return _NOTHING
        if name in self._pseudo:
            return self._pseudo[name]
        if name in self.parameters:
            return self.parameters[name]
        kind = self.template["Resources"][name]["Type"]
        arns = ("AWS::IAM::ManagedPolicy", "AWS::SNS::Topic", "AWS::SecretsManager::Secret")
        return self._attribute(name, "Arn") if kind in arns else self._name(name)

    def _name(self, logical: str) -> str:
        """The physical name: the property that gives it, else the logical id."""
        if logical not in self._names:
            resource = self.template["Resources"][logical]
            found = [
                one
                for key, one in resource.get("Properties", {}).items()
                if key in _NAMES.get(resource["Type"], ())
            ]
            self._names[logical] = str(self.resolve(found[0])) if found else logical
        return self._names[logical]

    def _attribute(self, logical: str, attribute: str) -> str:
        kind = self.template["Resources"][logical]["Type"]
        name = self._name(logical)
        if attribute == "RepositoryUri":
            return f"{self._account}.dkr.ecr.{self._region}.amazonaws.com/{name}"
        if attribute != "Arn":
            return f"{logical}.{attribute}"
        return _ARNS[kind].format(name=name, region=self._region, account=self._account)


_NAMES = {
    "AWS::CloudWatch::Alarm": ("AlarmName",),
    "AWS::CodeBuild::Project": ("Name",),
    "AWS::ECR::Repository": ("RepositoryName",),
    "AWS::Events::Rule": ("Name",),
    "AWS::Lambda::Function": ("FunctionName",),
    "AWS::Logs::LogGroup": ("LogGroupName",),
    "AWS::S3::Bucket": ("BucketName",),
    "AWS::SNS::Topic": ("TopicName",),
    "AWS::SecretsManager::Secret": ("Name",),
}
_ARNS = {
    "AWS::CloudWatch::Alarm": "arn:aws:cloudwatch:{region}:{account}:alarm:{name}",
    "AWS::ECR::Repository": "arn:aws:ecr:{region}:{account}:repository/{name}",
    "AWS::Events::Rule": "arn:aws:events:{region}:{account}:rule/{name}",
    "AWS::IAM::ManagedPolicy": "arn:aws:iam::{account}:policy/{name}",
    "AWS::IAM::Role": "arn:aws:iam::{account}:role/{name}",
    "AWS::KMS::Key": "arn:aws:kms:{region}:{account}:key/{name}",
    "AWS::Lambda::Function": "arn:aws:lambda:{region}:{account}:function:{name}",
    "AWS::Logs::LogGroup": "arn:aws:logs:{region}:{account}:log-group:{name}:*",
    "AWS::S3::Bucket": "arn:aws:s3:::{name}",
    "AWS::SNS::Topic": "arn:aws:sns:{region}:{account}:{name}",
    "AWS::SecretsManager::Secret": "arn:aws:secretsmanager:{region}:{account}:secret:{name}-AbCdEf",
}
