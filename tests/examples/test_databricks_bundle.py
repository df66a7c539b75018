"""The asset bundle of examples/databricks against the Jobs API's own types, its script and our pins."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from databricks.sdk.service.jobs import JobRunAs, JobSettings

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "examples" / "databricks"
RESOURCES = BUNDLE / "resources" / "train.job.yml"
WORKSPACE = {"workspace.current_user.short_name": "ada", "workspace.current_user.userName": "ada@example.com"}
# what a bundle adds to a target; everything else in it is a setting of the Databricks CLI
TARGETS = {"mode", "default", "workspace", "run_as", "permissions", "variables"}


def bundle() -> dict[str, Any]:
    return yaml.safe_load((BUNDLE / "databricks.yml").read_text())


def resolve(value: Any, names: dict[str, str]) -> Any:
    """`value` with each ${name} replaced; a name that nothing declares is a KeyError."""
    if isinstance(value, dict):
        return {key: resolve(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, names) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda match: names[match[1]], value)
    return value


def job(target: str) -> dict[str, Any]:
    """The job of one target as the CLI would send it, but for the paths, which stay relative."""
    config = bundle()
    values = {name: each["default"] for name, each in config["variables"].items() if "default" in each}
    values |= config["targets"][target]["variables"]
    names = {f"var.{name}": resolve(value, WORKSPACE) for name, value in values.items()}
    assert set(values) == set(config["variables"])
    return resolve(yaml.safe_load(RESOURCES.read_text())["resources"]["jobs"]["train"], WORKSPACE | names)


def command_line(definition: dict[str, Any]) -> list[str]:
    """The task's arguments with the job's own parameters in place."""
    values = {f"job.parameters.{each['name']}": each["default"] for each in definition["parameters"]}
    arguments = definition["tasks"][0]["spark_python_task"]["parameters"]
    return [re.sub(r"\{\{([\w.]+)\}\}", lambda match: values[match[1]], argument) for argument in arguments]


@pytest.mark.parametrize("target", ["dev", "prod"])
def test_the_jobs_api_knows_every_key(target: str) -> None:
    """The SDK drops what it does not know, so nothing may get lost on the way through its types."""
    definition = job(target)
    assert JobSettings.from_dict(definition).as_dict() == definition


def test_a_misspelt_key_would_be_noticed() -> None:
    definition = job("dev")
    definition["tasks"][0]["spark_python_task"]["parameter"] = []
    assert JobSettings.from_dict(definition).as_dict() != definition


def test_the_cluster_of_the_task_is_the_one_defined() -> None:
    definition = job("dev")
    (task,), (cluster,) = definition["tasks"], definition["job_clusters"]
    assert task["job_cluster_key"] == cluster["job_cluster_key"]
    variables = cluster["new_cluster"]["spark_env_vars"]
    assert variables == {"MLFLOW_TRACKING_URI": "databricks", "MLFLOW_REGISTRY_URI": "databricks-uc"}


@pytest.mark.parametrize(
    ("target", "model", "experiment"),
    [
        ("dev", "dev.ada.mla_demo", "/Users/ada@example.com/mla-demo"),
        ("prod", "main.mla.mla_demo", "/Shared/mla-demo"),
    ],
)
def test_the_script_takes_the_command_line(target: str, model: str, experiment: str) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from train_and_log import parse_arguments

    options = parse_arguments(command_line(job(target)))
    assert (options.registered_model_name, options.experiment_name) == (model, experiment)
    assert (options.alias, options.steps) == ("champion", 250)


def test_every_file_is_there_and_uploaded() -> None:
    """Paths count from the file that names them; what lies outside sync.paths is not in the workspace."""
    config, (task,) = bundle(), job("dev")["tasks"]
    assert list(BUNDLE.glob(config["include"][0])) == [RESOURCES]
    uploaded = [(BUNDLE / path).resolve() for path in config["sync"]["paths"]]
    named = [task["spark_python_task"]["python_file"], *(each["requirements"] for each in task["libraries"])]
    for path in named:
        file = (RESOURCES.parent / path).resolve()
        assert file.is_file()
        assert any(folder in file.parents for folder in uploaded)


def test_production_runs_as_a_service_principal_from_one_place() -> None:
    target = bundle()["targets"]["prod"]
    assert set(target) <= TARGETS
    assert set(JobRunAs.from_dict(target["run_as"]).as_dict()) == {"service_principal_name"}
    assert target["workspace"]["root_path"]


def test_the_job_installs_the_versions_that_the_tests_ran_with() -> None:
    pins = (line for line in (BUNDLE / "requirements.txt").read_text().splitlines() if line[:1] != "#")
    assert set(pins) <= set((ROOT / "constraints.txt").read_text().splitlines())
