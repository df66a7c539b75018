from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipelines import lint
from pipelines.definition import walk
from pipelines.errors import UserError
from pipelines.settings import Settings, environments

Document = dict[str, Any]


def step(document: Document, name: str) -> Document:
    return next(one for one, _ in walk(document["Steps"]) if one["Name"] == name)


def problems(
    definitions: dict[str, str], change: Callable[[Document], Any], pipeline: str = "release"
) -> str:
    document = json.loads(definitions[pipeline])
    change(document)
    return "\n".join(map(str, lint.lint(json.dumps(document))))


@pytest.mark.parametrize("environment", environments())
def test_the_definitions_of_every_environment_are_clean(environment: str) -> None:
    from pipelines import upsert

    upsert.render(Settings.load(environment))  # raises when lint finds a problem


def test_a_clean_definition_has_no_problem(definitions: dict[str, str]) -> None:
    assert lint.lint(definitions["release"]) == []
    assert lint.lint(definitions["production"]) == []


def arguments(document: Document, name: str) -> Document:
    return step(document, name)["Arguments"]


def rename(document: Document) -> None:
    step(document, "SmokeTest")["Name"] = "RecordRelease"


def long_name(document: Document) -> None:
    document["Steps"][-1]["Name"] = "G" * 65


def cycle(document: Document) -> None:
    step(document, "PullModel")["DependsOn"] = ["Evaluate"]


def inside_waits_outside(document: Document) -> None:
    step(document, "Evaluate")["DependsOn"] = ["RegisterModel"]


def stranger(document: Document) -> None:
    step(document, "PullModel")["DependsOn"] = ["Nobody"]


def environment(value: Any) -> Callable[[Document], None]:
    return lambda document: arguments(document, "PullModel").update(Environment={"X": value})


def cluster(**fields: Any) -> Callable[[Document], None]:
    return lambda document: arguments(document, "PullModel")["ProcessingResources"]["ClusterConfig"].update(
        fields
    )


def default(name: str, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        next(one for one in document["Parameters"] if one["Name"] == name)["DefaultValue"] = value

    return change


def json_path_file(document: Document) -> None:
    step(document, "Evaluate")["PropertyFiles"] = []


def long_argument(document: Document) -> None:
    arguments(document, "PullModel")["AppSpecification"]["ContainerArguments"].append("x" * 257)


def long_message(document: Document) -> None:
    arguments(document, "GateFailed")["ErrorMessage"]["Std:Join"]["Values"].append("x" * 600)


def long_join(document: Document) -> None:
    join = arguments(document, "GateFailed")["ErrorMessage"]["Std:Join"]
    join["On"] = "-" * 40


def strange_type(document: Document) -> None:
    step(document, "DeployStaging")["Type"] = "Teleport"


def no_role(document: Document) -> None:
    del arguments(document, "PullModel")["RoleArn"]


def no_kernel(document: Document) -> None:
    del arguments(document, "CreateModel")["PrimaryContainer"]["AdditionalModelDataSources"]


def two_kernels(document: Document) -> None:
    container = arguments(document, "CreateModel")["PrimaryContainer"]
    container["Environment"]["MLA_KERNEL_S3_URI"] = "s3://bucket/kernel/"


def another_way(document: Document) -> None:
    two_kernels(document)
    no_kernel(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_kernel, "step CreateModel: the container has its kernel in none of"),
        (two_kernels, "step CreateModel: the container has its kernel in both of"),
        (another_way, "CreateModel MLA_KERNEL_S3_URI, RegisterModel AdditionalModelDataSources"),
        (rename, "two steps have this name"),
        (long_name, "1 to 64"),
        (cycle, "waits for itself"),
        (inside_waits_outside, "waits for itself"),
        (stranger, "step 'Nobody', which does not exist"),
        (environment({"Get": "Parameters.Nothing"}), "parameter 'Nothing', which does not exist"),
        (environment({"Get": "Execution.Nothing"}), "execution variable 'Nothing'"),
        (environment({"Get": "Nothing.Else"}), "neither Parameters, Execution nor Steps"),
        (
            environment({"Get": "Steps.Evaluate.ProcessingOutputConfig.Outputs['x'].S3Output.S3Uri"}),
            "output 'x'",
        ),
        (environment({"Get": "Parameters.EndpointInstanceCount"}), "is Integer, string is wanted"),
        (environment("x" * 257), "257 characters, 256 are allowed"),
        (environment(5), "Invalid type for parameter Environment.X"),
        (cluster(InstanceType="ml.huge"), "'ml.huge' is no ProcessingInstanceType"),
        (cluster(InstanceCount=0), "below the limit 1"),
        (
            cluster(VolumeSizeInGB={"Std:Join": {"On": "", "Values": ["1"]}}),
            "joined text where integer is wanted",
        ),
        (cluster(InstanceSize=1), "Unknown parameter"),
        (no_role, 'Missing required parameter in input: "RoleArn"'),
        (default("KernelBackend", "magic"), "default 'magic' is none of"),
        (default("StagingEndpointName", "under_score"), "does not match"),
        (json_path_file, "reads property file 'Evaluation', which Evaluate lacks"),
        (long_argument, "257 characters, 256 are allowed"),
        (long_message, "1024 are allowed"),
        (long_join, "1024 are allowed"),
        (strange_type, "Teleport is not checked"),
    ],
)
def test_each_fault_is_found(
    definitions: dict[str, str], change: Callable[[Document], Any], words: str
) -> None:
    assert words in problems(definitions, change)


def test_a_fault_stops_an_upsert_with_its_place(definitions: dict[str, str]) -> None:
    document = json.loads(definitions["release"])
    cluster(InstanceType="ml.huge", InstanceCount=0)(document)
    with pytest.raises(UserError, match=r"ml\.huge.*\d more.*pipeline mla-release, step PullModel"):
        lint.require_clean("mla-release", json.dumps(document))
