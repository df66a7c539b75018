"""The plan: what changes step by step, which caches that busts, what it costs, which quotas it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st

from pipelines import difference, plan, upsert
from pipelines.aws import Aws
from pipelines.definition import walk
from pipelines.difference import compare
from pipelines.errors import UserError
from pipelines.prices import Cost, Prices, per_million_tokens
from pipelines.settings import Settings

Document = dict[str, Any]
MISSING: Any = {"Error": {"Code": "ResourceNotFound", "Message": "no such pipeline"}}
KEYS = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}


@pytest.fixture(scope="module")
def deployed(definitions: dict[str, str]) -> str:
    """The release definition with CompileKernel cached."""
    document = json.loads(definitions["release"])
    step(document, "CompileKernel")["CacheConfig"] = {"Enabled": True, "ExpireAfter": "P30D"}
    return json.dumps(document)


def step(document: Document, name: str) -> Document:
    return next(one for one, _ in walk(document["Steps"]) if one["Name"] == name)


def parameter(document: Document, name: str) -> Document:
    return next(one for one in document["Parameters"] if one["Name"] == name)


def said(before: str, change: Callable[[Document], Any]) -> str:
    document = json.loads(before)
    change(document)
    return "\n".join(plan.describe(compare(before, json.dumps(document))))


def test_an_equal_definition_differs_in_nothing(deployed: str) -> None:
    assert not compare(deployed, deployed)
    reordered = json.dumps(json.loads(deployed), sort_keys=True)
    assert not compare(deployed, reordered)


def test_against_nothing_everything_is_added(deployed: str) -> None:
    found = compare("", deployed)
    assert {one.kind for one in (*found.steps, *found.parameters)} == {"added"}
    assert "QualityGate" in {one.name for one in found.steps}
    assert "RegisterModel" in {one.name for one in found.steps}  # inside the gate's branch


GROUP = "arn:aws:sagemaker:us-east-1:777788889999:model-package-group/mla-models"


@pytest.mark.parametrize(
    ("changes", "made", "endpoints"),
    [
        ({}, {"mla-release", "mla-production"}, ["mla-staging", "mla-production"]),
        ({"production_account": "444455556666"}, {"mla-release"}, ["mla-staging"]),
        ({"names.model_package_group": GROUP}, {"mla-production"}, ["mla-production"]),
    ],
    ids=["one account", "releasing", "deploying"],
)
def test_an_account_gets_the_pipelines_that_belong_to_it(
    changes: dict[str, object], made: set[str], endpoints: list[str]
) -> None:
    settings = Settings.load("local", changes)
    rendered = upsert.render(settings)
    assert set(rendered) == made
    costs = plan.costs(Mock(), settings, Prices.load(settings.region), None)
    assert [one.what for one in costs if one.unit == "an hour"] == [f"endpoint {name}" for name in endpoints]
    quotas = plan.needed_instances(settings)
    machine = str(settings.parameters.release["ProcessingInstanceType"])
    assert (plan.PROCESSING_QUOTA.format(machine) in quotas) is settings.releases


def test_quotas_count_the_largest_fleets_and_one_update() -> None:
    scaling = {"min_instances": 2, "max_instances": 8, "invocations_per_minute": 60}
    rolling = {"deployment.strategy": "rolling", "deployment.step_size": 1, "deployment.rollback_size": "25%"}
    settings = Settings.load("production", {**rolling, "deployment.scaling": scaling})
    quota = plan.ENDPOINT_QUOTA.format("ml.p5.4xlarge")
    assert plan.needed_instances(settings)[quota] == 1 + 8 + 2  # staging, production, a batch of the way back
    (basis,) = (
        one.basis
        for one in plan.costs(Mock(), settings, Prices.load(settings.region), None)
        if one.what == "endpoint mla-production" and one.unit == "an hour"
    )
    assert basis == "2 x ml.p5.4xlarge; 1 more while it is updated; 2 to 8 as it scales"


def test_approvals_of_the_other_account_start_production() -> None:
    settings = Settings.load("local", {"names.model_package_group": GROUP})
    pattern = upsert.event_pattern(settings)
    assert pattern["account"] == ["777788889999"]
    assert pattern["detail"]["ModelPackageGroupName"] == ["mla-models"]


CASES: dict[str, tuple[Callable[[Document], Any], list[str]]] = {
    "image": (
        lambda d: step(d, "CompileKernel")["Arguments"]["AppSpecification"].update(ImageUri="new:1"),
        [
            "step CompileKernel changed; its cache misses: AppSpecification.ImageUri changed",
            "mla-job:local -> new:1",
        ],
    ),
    "sources": (
        lambda d: step(d, "CompileKernel")["Arguments"]["Environment"].update(MLA_SOURCE_SHA256="0"),
        ["its cache misses: Environment.MLA_SOURCE_SHA256 changed"],
    ),
    "volume": (
        lambda d: step(d, "CompileKernel")["Arguments"]["ProcessingResources"]["ClusterConfig"].update(
            VolumeSizeInGB=7
        ),
        ["step CompileKernel changed; its cached results stay valid", "VolumeSizeInGB: 100 -> 7"],
    ),
    "default that the key uses": (
        lambda d: parameter(d, "KernelBackend").update(DefaultValue="cpu"),
        [
            "parameter KernelBackend changed: DefaultValue: auto -> cpu",
            "step CompileKernel as before; its cache misses: the default of KernelBackend changed",
        ],
    ),
    "default that the key does not use": (
        lambda d: parameter(d, "MinSpeedup").update(DefaultValue=2.0),
        ["parameter MinSpeedup changed: DefaultValue: 1.0 -> 2.0"],
    ),
    "cache given up": (
        lambda d: step(d, "CompileKernel").pop("CacheConfig"),
        ["step CompileKernel changed; its cache is given up"],
    ),
    "step inside the gate": (
        lambda d: step(d, "SmokeTest").update(Description="other"),
        ["step SmokeTest changed", "Description: Invoke staging"],
    ),
    "parameter dropped": (
        lambda d: d["Parameters"].remove(parameter(d, "MinSpeedup")),
        ["parameter MinSpeedup dropped: a start that sets it will be refused"],
    ),
    "parameter added": (
        lambda d: d["Parameters"].append({"Name": "New", "Type": "String", "DefaultValue": "x"}),
        ["parameter New added: a start may set it"],
    ),
    "step dropped": (
        lambda d: step(d, "QualityGate")["Arguments"]["IfSteps"].pop(),
        ["step RecordRelease dropped"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_change_is_said_with_what_it_does_to_caches(deployed: str, case: str) -> None:
    change, words = CASES[case]
    text = said(deployed, change)
    assert [one for one in words if one not in text] == [], text
    if case == "default that the key does not use":
        assert "CompileKernel" not in text


def test_steps_that_change_alike_are_said_together(deployed: str) -> None:
    def move(document: Document) -> None:
        for name in ("PullModel", "SmokeTest", "RecordRelease"):
            step(document, name)["Arguments"]["AppSpecification"]["ImageUri"] = "new:1"

    text = said(deployed, move)
    assert text.splitlines()[0] == "steps PullModel, SmokeTest, RecordRelease changed"
    assert text.count("new:1") == 1


JSON = st.recursive(
    st.integers(0, 3) | st.sampled_from("ab"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_edits_are_found_exactly_when_two_values_differ(one: Any, other: Any) -> None:
    edits = list(difference._edits({"v": one}, {"v": other}, ""))
    assert bool(edits) == (one != other)
    assert all(edit.before != edit.after for edit in edits)


def prices(tmp_path: Path) -> Prices:
    (tmp_path / "us-east-1.yaml").write_text(
        "read: 2026-01-02\ninstance_hour:\n  ml.c7i.xlarge: 2.0\n  ml.t3.xlarge: 1.0\n"
    )
    return Prices.load("us-east-1", tmp_path)


def by_name(found: list[Cost]) -> dict[str, Cost]:
    return {f"{one.what} {one.unit}": one for one in found}


class NoExecutions:
    """A SageMaker in which nothing has run."""

    def list_pipeline_executions(self, **request: Any) -> Document:
        return {"PipelineExecutionSummaries": []}


def offline(**clients: Any) -> Aws:
    aws = Aws("us-east-1")
    vars(aws).update(clients)
    return aws


def test_costs_are_instances_times_hours(
    settings: Settings, definitions: dict[str, str], tmp_path: Path
) -> None:
    document = json.loads(definitions["release"])
    found = by_name(list(plan.costs(offline(sagemaker=NoExecutions()), settings, prices(tmp_path), document)))
    # 15 minutes each: CompileKernel and Evaluate at 2 USD an hour, PullModel, SmokeTest, RecordRelease at 1
    assert found["release a run"].dollars == pytest.approx((2 * 2.0 + 3 * 1.0) / 4)
    assert "assumed" in found["release a run"].basis
    assert found["endpoint mla-staging an hour"].dollars == 2.0
    assert found["endpoint mla-production a month"].dollars == 2.0 * 730


def test_the_last_complete_execution_replaces_the_assumption(
    settings: Settings, definitions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime, timedelta

    from pipelines import service

    began = datetime(2026, 1, 1, tzinfo=UTC)
    names = ("PullModel", "CompileKernel", "Evaluate", "SmokeTest", "RecordRelease")
    steps = tuple(
        service.Step(name, "Succeeded", began, began + timedelta(hours=1), "", "") for name in names
    )
    runs = {
        "arn/partial": service.Execution("arn/partial", "p", "Succeeded", began, None, "", steps[:2]),
        "arn/whole": service.Execution("arn/whole", "p", "Succeeded", began, None, "", steps),
    }

    class Ran:
        def list_pipeline_executions(self, **request: Any) -> Document:
            summaries = [
                {"PipelineExecutionArn": arn, "PipelineExecutionStatus": "Succeeded"} for arn in runs
            ]
            return {"PipelineExecutionSummaries": summaries}

    monkeypatch.setattr(service, "status", lambda aws, arn: runs[arn])
    document = json.loads(definitions["release"])
    found = by_name(list(plan.costs(offline(sagemaker=Ran()), settings, prices(tmp_path), document)))
    assert found["release a run"].dollars == pytest.approx(2 * 2.0 + 3 * 1.0)
    assert found["release a run"].basis == "as long as execution whole"


def test_a_missing_price_is_said_and_not_guessed(tmp_path: Path) -> None:
    assert prices(tmp_path).of("ml.p5en.48xlarge", 1) is None
    assert "unpriced" in str(Cost("x", None, "an hour", "y"))
    assert "add config/prices/eu-west-9.yaml" in Prices.load("eu-west-9").source()
    assert "table of 2026-" in Prices.load("us-east-1").source()


def test_dollars_per_million_tokens() -> None:
    assert per_million_tokens(3.6, 1000.0) == pytest.approx(1.0)


def test_quotas_are_compared_with_what_both_endpoints_and_an_update_need() -> None:
    needed = plan.needed_instances(Settings.load("production"))
    assert needed["ml.p5.4xlarge for processing job usage"] == 1
    assert needed["ml.p5.4xlarge for endpoint usage"] == 1 + 2 + 2  # staging, production, its new fleet
    client = boto3.client("service-quotas", **KEYS)
    listed = [
        {"QuotaName": "ml.p5.4xlarge for endpoint usage", "Value": 2.0},
        {"QuotaName": "ml.p5.4xlarge for processing job usage", "Value": 1.0},
    ]
    with Stubber(client) as stub:
        stub.add_response("list_service_quotas", {"Quotas": listed}, {"ServiceCode": "sagemaker"})
        found = {one.name: one for one in plan.quotas(offline(quotas=client), needed)}
    assert found["ml.p5.4xlarge for endpoint usage"].enough is False
    assert "TOO FEW" in str(found["ml.p5.4xlarge for endpoint usage"])
    assert found["ml.p5.4xlarge for processing job usage"].enough is True
    assert found["ml.t3.xlarge for processing job usage"].allowed is None


def test_who_may_not_read_quotas_is_told_where_to_look() -> None:
    client = boto3.client("service-quotas", **KEYS)
    with Stubber(client) as stub:
        stub.add_client_error("list_service_quotas", "AccessDeniedException")
        (found,) = plan.quotas(offline(quotas=client), {"ml.p5.4xlarge for endpoint usage": 3})
    assert found.enough is None
    assert "3 needed, allowed unknown (AccessDeniedException: look at Service Quotas" in str(found)


def test_a_refused_data_source_names_the_setting_that_helps() -> None:
    """The words of the service, from aws/sagemaker-python-sdk issue 4994."""
    words = (
        "Unable to parse pipeline definition. Unknown Argument member 'AdditionalModelDataSources'",
        "Unable to parse pipeline definition. Unknown Argument member 'Another'",
    )
    for message, expected in zip(words, (UserError, ClientError), strict=True):
        refusal = ClientError(
            {"Error": {"Code": "ValidationException", "Message": message}}, "CreatePipeline"
        )
        pipeline = Mock(upsert=Mock(side_effect=refusal))
        sagemaker = Mock(describe_pipeline=Mock(side_effect=ClientError(MISSING, "DescribePipeline")))
        pipeline.name, pipeline.definition.return_value = "mla-release", "{}"
        change = upsert._plan_pipeline(Mock(sagemaker=sagemaker), Settings.load("dev"), pipeline)
        with pytest.raises(expected, match="Unknown Argument member") as caught:
            change.apply()
        helped = "endpoint.kernel_delivery: download in config/dev.yaml" in str(caught.value)
        assert helped == (expected is UserError)
