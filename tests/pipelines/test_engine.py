"""endpoint.engine: what it may be, and what the registered container is told of it."""

import json
from typing import Any

import pytest

from pipelines import lint, production, release
from pipelines.errors import UserError
from pipelines.settings import Settings

VLLM = {"endpoint.engine": "vllm", "endpoint.tensor_parallel": 4, "endpoint.pipeline_parallel": 2}


def environment(definition: str) -> dict[str, Any]:
    """Of the container that is registered, which is the one that staging runs."""
    steps = {step["Name"]: step for step, _ in lint.walk(json.loads(definition)["Steps"])}
    registered = steps["RegisterModel"]["Arguments"]["InferenceSpecification"]["Containers"][0]
    assert registered == steps["CreateModel"]["Arguments"]["PrimaryContainer"]
    return registered["Environment"]


def test_vllm_and_its_gpus_reach_the_container() -> None:
    definition = release.get_pipeline(Settings.load("local", VLLM)).definition()
    assert lint.lint(definition) == []
    told = environment(definition)
    assert told["MLA_ENGINE"] == "vllm"
    assert (told["MLA_TENSOR_PARALLEL"], told["MLA_PIPELINE_PARALLEL"]) == ("4", "2")


def test_the_native_engine_is_the_default_and_says_nothing() -> None:
    told = environment(release.get_pipeline(Settings.load("local")).definition())
    assert not any(name.startswith("MLA_ENGINE") or name.endswith("PARALLEL") for name in told)


def test_production_takes_the_registered_containers_engine() -> None:
    native, vllm = Settings.load("local"), Settings.load("local", VLLM)
    assert production.get_pipeline(vllm).definition() == production.get_pipeline(native).definition()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"endpoint.engine": "sglang"}, "endpoint.engine = 'sglang'"),
        ({"endpoint.tensor_parallel": 0}, "endpoint.tensor_parallel = 0"),
        ({"endpoint.tensor_parallel": 2}, "set endpoint.engine: vllm"),
        ({"endpoint.pipeline_parallel": 2}, "set endpoint.engine: vllm"),
    ],
)
def test_what_no_engine_can_do_is_refused(overrides: dict[str, object], part: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings.load("local", overrides)
    assert part in str(caught.value)
