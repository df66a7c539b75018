"""CreatePipeline and StartPipelineExecution refuse what the service refuses, and say what is wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.pipelines.sandbox.conftest import BUCKET, Aws


def definition(steps: list[Any], **more: Any) -> str:
    return json.dumps({"Version": "2020-12-01", "Parameters": [], "Steps": steps} | more)


def refused(aws: Aws, text: str) -> str:
    with pytest.raises(ClientError) as error:
        aws.sagemaker.create_pipeline(PipelineName="refused", PipelineDefinition=text, RoleArn=aws.role)
    assert not aws.sagemaker.list_pipelines(PipelineNamePrefix="refused")["PipelineSummaries"]
    return f"{error.value.response['Error']['Code']}: {error.value.response['Error']['Message']}"


def condition(**arguments: Any) -> dict[str, Any]:
    return {"Name": "If", "Type": "Condition", "Arguments": {"IfSteps": [], "ElseSteps": [], **arguments}}


EQUAL = {"Type": "Equals", "LeftValue": 1, "RightValue": 1}


def cases(aws: Aws) -> dict[str, tuple[str, str]]:
    ok = aws.script("A", "1")
    wrong = copy.deepcopy(ok)
    wrong["Arguments"]["Colour"] = "red"
    no_role = copy.deepcopy(ok)
    del no_role["Arguments"]["RoleArn"]
    instance = copy.deepcopy(ok)
    instance["Arguments"]["ProcessingResources"]["ClusterConfig"]["InstanceType"] = "ml.huge"
    get = {"Get": "Parameters.Nothing"}
    file = {
        "Std:JsonGet": {"PropertyFile": {"Get": "Steps.A.PropertyFiles.F"}, "Path": "x"},
    }
    return {
        "not JSON": ("{", "It is not JSON"),
        "no object": ("[]", "Expecting start of Json Object"),
        "version": (definition([ok], Version="1"), "Version must be '2020-12-01'"),
        "no steps": (definition([]), "Steps must be a non-empty array"),
        "same name": (definition([ok, ok]), "Step names must be unique. Duplicate step name: 'A'"),
        "long name": (definition([ok | {"Name": "x" * 65}]), "1 to 64 characters"),
        "bad name": (definition([ok | {"Name": "a b"}]), "1 to 64 characters"),
        "unknown type": (definition([ok | {"Type": "Training"}]), "pipeline steps of type 'Training'"),
        "unknown upstream": (
            definition([ok | {"DependsOn": ["B"]}]),
            "depends on step 'B', which is undefined",
        ),
        "cycle": (
            definition([ok | {"DependsOn": ["B"]}, aws.script("B", "1", DependsOn=["A"])]),
            "cycle: A -> B -> A",
        ),
        "unknown parameter": (definition([aws.script("A", "1", get)]), "there is no such parameter"),
        "unknown property file": (
            definition([ok, condition(Conditions=[EQUAL | {"LeftValue": file}])]),
            "has the property files []",
        ),
        "unknown argument": (definition([wrong]), "Unknown Argument member 'Colour'"),
        "missing argument": (
            definition([no_role]),
            "'roleArn' failed to satisfy constraint: Member must not be null",
        ),
        "instance type": (definition([instance]), "Member must satisfy enum value set"),
        "unknown condition": (
            definition([condition(Conditions=[{"Type": "Similar"}])]),
            "condition of unknown type 'Similar'",
        ),
        "in a branch": (
            definition([condition(Conditions=[EQUAL], IfSteps=[ok | {"DependsOn": ["Z"]}])]),
            "'Z', which is undefined",
        ),
        "parameter type": (
            definition([ok], Parameters=[{"Name": "P", "Type": "Date"}]),
            "types: String, Integer, Float, Boolean",
        ),
        "default": (
            definition([ok], Parameters=[{"Name": "P", "Type": "Integer", "DefaultValue": "x"}]),
            "Default of parameter 'P'",
        ),
    }


def test_bad_definitions_are_refused_with_the_reason(aws: Aws) -> None:
    for what, (text, reason) in cases(aws).items():
        assert reason in refused(aws, text), what


def test_names_roles_and_duplicates(aws: Aws, name: str) -> None:
    text = definition([aws.script("A", "1")])
    with pytest.raises(ClientError, match="does not exist"):
        aws.sagemaker.create_pipeline(
            PipelineName=name, PipelineDefinition=text, RoleArn="arn:aws:iam::123456789012:role/nobody"
        )
    aws.create(name, [aws.script("A", "1")])
    with pytest.raises(ClientError, match="already exists"):
        aws.create(name, [aws.script("A", "1")])
    for call in ("describe_pipeline", "start_pipeline_execution", "delete_pipeline"):
        with pytest.raises(ClientError) as error:
            getattr(aws.sagemaker, call)(PipelineName="nothing")
        assert error.value.response["Error"]["Code"] == "ResourceNotFound"


def test_definition_from_s3_and_versions(aws: Aws, name: str) -> None:
    text = definition([aws.script("A", "1")])
    place = {"Bucket": BUCKET, "ObjectKey": f"{name}.json"}
    with pytest.raises(ClientError, match="does not exist"):
        aws.sagemaker.create_pipeline(PipelineName=name, PipelineDefinitionS3Location=place, RoleArn=aws.role)
    aws.put(f"{name}.json", text.encode())
    aws.sagemaker.create_pipeline(PipelineName=name, PipelineDefinitionS3Location=place, RoleArn=aws.role)
    assert aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineDefinition"] == text
    newer = definition([aws.script("B", "1")])
    answer = aws.sagemaker.update_pipeline(PipelineName=name, PipelineDefinition=newer)
    assert answer["PipelineVersionId"] == 2
    older = aws.sagemaker.describe_pipeline(PipelineName=name, PipelineVersionId=1)["PipelineDefinition"]
    assert older == text
    with pytest.raises(ClientError, match="Unable to parse"):
        aws.sagemaker.update_pipeline(PipelineName=name, PipelineDefinition="{}")
    assert aws.sagemaker.describe_pipeline(PipelineName=name)["PipelineDefinition"] == newer


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (
            {"Nothing": "1"},
            r'not allowed by the schema: \["Nothing"\].*parameters are: Kind, Count, Flag, Must',
        ),
        ({"Must": "m", "Kind": "c"}, r'\'Kind\'.*\("c"\) not found in enum \(possible values: \["a","b"\]\)'),
        ({"Must": "m", "Count": "1.5"}, r"'Count'.*allowed: \[\"integer\"\]"),
        ({"Must": "m", "Flag": "maybe"}, r"'Flag'.*allowed: \[\"boolean\"\]"),
        ({"Must": ""}, r"'Must'.*too short"),
        ({}, r'missing required properties \(\["Must"\]\)'),
    ],
)
def test_bad_parameters_are_refused_with_the_reason(
    aws: Aws, name: str, parameters: dict[str, str], reason: str
) -> None:
    declared = [
        {"Name": "Kind", "Type": "String", "DefaultValue": "a", "EnumValues": ["a", "b"]},
        {"Name": "Count", "Type": "Integer", "DefaultValue": 1},
        {"Name": "Flag", "Type": "Boolean", "DefaultValue": True},
        {"Name": "Must", "Type": "String"},
    ]
    aws.create(name, [aws.script("A", "1")], declared)
    with pytest.raises(ClientError, match=reason) as error:
        aws.start(name, **parameters)
    assert error.value.response["Error"]["Code"] == "ValidationException"
    assert aws.sagemaker.list_pipeline_executions(PipelineName=name)["PipelineExecutionSummaries"] == []


def test_a_mistyped_value_fails_its_step_with_the_call_that_refused_it(aws: Aws, name: str) -> None:
    step = aws.script("A", "1", {"Get": "Parameters.Count"})
    aws.create(name, [step], [{"Name": "Count", "Type": "Integer", "DefaultValue": 1}])
    _, steps = aws.run(name)
    reason = steps["A"]["FailureReason"]
    assert reason.startswith("ClientError: Failed to invoke sagemaker:CreateProcessingJob. Error Details: ")
    assert "is not a string" in reason
