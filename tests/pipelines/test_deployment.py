"""The settings of an update: refused with the key and the remedy, and carried to DeployProduction whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipelines import deployment
from pipelines.errors import UserError
from pipelines.settings import Settings
from steps.deployment import Deployment as Received

SCALING = {"min_instances": 2, "max_instances": 8, "invocations_per_minute": 60}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "linear", "step_size": "50%"},
        {"strategy": "linear", "step_size": 1},
        {"strategy": "rolling", "step_size": "5%", "bake_seconds": 60},
        {"strategy": "rolling", "step_size": "1", "rollback_size": "100%"},
        {"strategy": "all_at_once", "step_size": "100%"},
        {"scaling": SCALING},
        {"capture": {"percent": 100, "mode": "Input"}},
    ],
    ids=str,
)
def test_what_the_service_takes_is_taken(changes: dict[str, Any]) -> None:
    loaded = load(changes)
    received = Received.parse(deployment.parts(loaded))
    assert received.strategy == loaded.deployment.strategy
    assert received.config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": "green"}, ["deployment.strategy = 'green'", "'rolling'"]),
        ({"step_size": "60%"}, ["deployment.step_size = '60%'", "strategy canary is 1% to 50%"]),
        ({"strategy": "linear", "step_size": "5%"}, ["strategy linear is 10% to 50%"]),
        ({"strategy": "rolling", "step_size": "4%"}, ["strategy rolling is 5% to 50%"]),
        ({"step_size": "half"}, ["deployment.step_size = 'half'", "or a number of instances"]),
        ({"step_size": 0}, ["deployment.step_size = 0"]),
        ({"step_size": 2}, ["deployment.step_size = '2'", "more than half of EndpointInstanceCount, 2"]),
        ({"rollback_size": "50%"}, ["deployment.rollback_size = '50%'", "only strategy rolling"]),
        ({"strategy": "rolling", "rollback_size": "101%"}, ["at most 100%"]),
        (
            {"strategy": "linear", "step_size": "10%", "bake_seconds": 360},
            ["deployment.timeout_seconds = 3600", "10 x bake_seconds", "take 3720 s", "fewer steps"],
        ),
        ({"timeout_seconds": 300}, ["deployment.timeout_seconds = 300"]),
        ({"scaling": {**SCALING, "max_instances": 1}}, ["max_instances = 1", "at least min_instances, 2"]),
        ({"scaling": {**SCALING, "min_instances": 3}}, ["min_instances = 3", "EndpointInstanceCount is 2"]),
        ({"scaling": {**SCALING, "min_instance": 3}}, ["unknown key 'deployment.scaling.min_instance'"]),
        ({"capture": {"percent": 0}}, ["deployment.capture.percent = 0"]),
        ({"alarms": ["a"] * 11}, ["deployment.alarms", "at most 10"]),
    ],
    ids=str,
)
def test_what_it_would_refuse_is_refused_here_with_the_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(changes)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "override deployment." in str(error.value) or "base.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "size", "instances", "steps"),
    [
        ("canary", "10%", 4, 2),
        ("all_at_once", "10%", 4, 1),
        ("linear", "30%", 4, 4),
        ("linear", "2", 4, 2),
        ("rolling", "3", 10, 4),
    ],
)
def test_steps_are_counted_as_the_service_takes_them(
    strategy: str, size: str, instances: int, steps: int
) -> None:
    settings = Settings.load("production").deployment
    assert settings.model_copy(update={"strategy": strategy, "step_size": size}).steps(instances) == steps


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"strategy": "canary"}, 10),
        ({"strategy": "rolling", "step_size": "25%", "rollback_size": "1"}, 3),
        ({"strategy": "rolling", "step_size": "2", "rollback_size": "50%"}, 5),
        ({"strategy": "rolling", "step_size": "2"}, 10),  # all old instances come back at once
    ],
    ids=str,
)
def test_an_update_needs_a_second_fleet_or_a_batch(changes: dict[str, Any], extra: int) -> None:
    settings = Settings.load("production").deployment
    assert settings.model_copy(update=changes).extra(10) == extra


def test_the_job_outlives_the_longest_update() -> None:
    settings = load({"timeout_seconds": 28800})
    assert deployment.job_minutes(settings) * 60 > 2 * 28800


names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=200)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    alarms=st.lists(names, max_size=10),
    subnets=st.lists(names, min_size=1, max_size=16),
    groups=st.lists(names, min_size=1, max_size=5),
)
def test_however_long_the_lists_are_no_argument_exceeds_the_limit_and_all_arrive(
    alarms: list[str], subnets: list[str], groups: list[str]
) -> None:
    network = {"subnets": subnets, "security_group_ids": groups}
    loaded = Settings.load("production", {"deployment.alarms": alarms, "network": network})
    parts = deployment.parts(loaded)
    assert max(map(len, parts)) <= deployment.ARGUMENT_LIMIT
    assert 2 * len(parts) + 10 <= 100  # entries of ContainerArguments
    received = Received.parse(parts)
    assert received.alarms == tuple(alarms)
    assert (received.subnets, received.security_group_ids) == (tuple(subnets), tuple(groups))
    assert received.kms_key == loaded.kms_key


def test_every_setting_arrives_in_the_rendered_definition() -> None:
    import json

    from pipelines import lint, production

    capture = {"percent": 5}
    changes = {"strategy": "rolling", "step_size": 1, "rollback_size": "50%", "scaling": SCALING}
    loaded = load({**changes, "capture": capture})
    definition = production.get_pipeline(loaded).definition()
    assert lint.lint(definition) == []
    (step,) = (one for one in json.loads(definition)["Steps"] if one["Name"] == "DeployProduction")
    arguments = step["Arguments"]["AppSpecification"]["ContainerArguments"]
    parts = [value for option, value in itertools.pairwise(arguments) if option == "--deployment"]
    received = Received.parse(parts)
    assert received.config()["RollingUpdatePolicy"]["RollbackMaximumBatchSize"]["Value"] == 50
    assert received.scaling
    assert received.scaling.max_instances == 8
    assert received.capture
    assert received.capture.uri == f"s3://{loaded.bucket}/{loaded.prefix}/data-capture"
    assert received.variant().keys() == {
        "ModelDataDownloadTimeoutInSeconds",
        "ContainerStartupHealthCheckTimeoutInSeconds",
        "InferenceAmiVersion",
    }
    limit = step["Arguments"]["StoppingCondition"]["MaxRuntimeInSeconds"]
    assert limit == 60 * deployment.job_minutes(loaded)


def load(changes: dict[str, Any]) -> Settings:
    return Settings.load("production", {f"deployment.{key}": value for key, value in changes.items()})
