from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.settings import CONFIG, Settings, environments


@pytest.mark.parametrize("environment", environments())
def test_every_environment_in_the_repository_loads(environment: str) -> None:
    settings = Settings.load(environment)
    assert settings.environment == environment
    assert settings.role_name == settings.role.rsplit("/", 1)[-1]


def test_an_environment_overlays_the_base_key_by_key() -> None:
    base = yaml.safe_load((CONFIG / "base.yaml").read_text())
    local = Settings.load("local")
    assert local.jobs.timeout_minutes == 15
    assert local.jobs.volume_gb == base["jobs"]["volume_gb"]
    assert local.parameters.release["Workload"] == base["parameters"]["release"]["Workload"]


def test_an_override_wins_and_settings_are_frozen() -> None:
    settings = Settings.load(
        "local", {"mlflow.tracking_uri": "http://127.0.0.1:1", "deployment.bake_seconds": 7}
    )
    assert settings.mlflow.tracking_uri == "http://127.0.0.1:1"
    assert settings.deployment.bake_seconds == 7
    with pytest.raises(Exception, match="frozen"):
        settings.deployment.bake_seconds = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mlflow.trackin_uri", "x", ["unknown key 'mlflow.trackin_uri'", "did you mean 'tracking_uri'?"]),
        ("mlflow.tracking_uri", "https://me:hunter2@host/x", ["'https://***@host/x'", "mlflow.secret_arn"]),
        ("mlflow.host", "https://dapi0123@host", ["'https://***@host'", "no place for credentials"]),
        ("mlflow.secret_arn", "dapi0123456789abcdef", ["mlflow.secret_arn = …", "never the secret itself"]),
        ("buckett", "x", ["unknown key 'buckett'", "did you mean 'bucket'?"]),
        (
            "roles.PulModel",
            "arn:aws:iam::111122223333:role/x",
            ["'roles.PulModel'", "did you mean 'PullModel'?"],
        ),
        ("environment", "x", ["unknown key 'environment'"]),
        ("deployment.bake_seconds", 9000, ["deployment.bake_seconds = 9000", "less than or equal to 3600"]),
        ("jobs.volume_gb", "many", ["jobs.volume_gb = 'many'", "valid integer"]),
        ("role", "mla-role", ["role = 'mla-role'", "arn:aws"]),
        ("names.release_pipeline", "under_score", ["names.release_pipeline = 'under_score'"]),
        ("parameters.release.KernelBacken", "cpu", ["unknown parameter", "did you mean 'KernelBackend'?"]),
        ("parameters.release.KernelBackend", "hoper", ["'hoper' is not allowed", "did you mean 'hopper'?"]),
        (
            "parameters.release.StagingEndpointName",
            "mla-production",
            ["'mla-production' is the production endpoint", "only an approval changes production"],
        ),
        ("parameters.release.MaxRelativeError", "small", ["'small' is not a number"]),
        ("parameters.release.EndpointInstanceCount", 1.5, ["1.5 is not a whole number"]),
        ("parameters.production.ModelPackageArn", "arn:x", ["ModelPackageArn takes no default"]),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_place(key: str, value: object, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Settings.load("local", {key: value})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert f"override {key}" in str(error.value)
    assert not {"hunter2", "dapi0123"} & set(re.findall(r"\w+", str(error.value)))


def test_an_account_that_neither_releases_nor_deploys_is_refused() -> None:
    group = "arn:aws:sagemaker:us-east-1:777788889999:model-package-group/x-models"
    both = {"names.model_package_group": group, "production_account": "444455559999"}
    with pytest.raises(UserError, match=r"neither releases nor deploys: override production_account"):
        Settings.load("production", both)


def test_the_error_names_the_file_that_holds_the_key(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    text = (CONFIG / "local.yaml").read_text()
    (folder / "local.yaml").write_text(text + "\nregoin: us-east-1\n")
    with pytest.raises(UserError, match=r"regoin.*local\.yaml.*did you mean 'region'"):
        Settings.load("local", folder=folder)
    (folder / "local.yaml").write_text(text.replace("bucket: mla-pipeline-local", ""))
    with pytest.raises(UserError, match=r"key 'bucket' is missing.*add it to config/local\.yaml"):
        Settings.load("local", folder=folder)


def test_a_missing_default_is_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    text = "\n".join(
        line for line in (folder / "base.yaml").read_text().splitlines() if "MinSpeedup" not in line
    )
    (folder / "base.yaml").write_text(text)
    with pytest.raises(UserError, match="no default for MinSpeedup"):
        Settings.load("local", folder=folder)


@pytest.mark.parametrize("text", [b"a: [", b"- a", b"", b"a: \xff", b"a: \0"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = _copy(tmp_path)
    (folder / "local.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"local\.yaml"):
        Settings.load("local", folder=folder)


def test_a_block_pasted_below_another_is_refused(tmp_path: Path) -> None:
    """As `bootstrap` prints them; YAML would take the last one and lose the limits of the first."""
    folder = _copy(tmp_path)
    with (folder / "local.yaml").open("a") as file:
        file.write("parameters:\n  release: {StagingEndpointName: mine}\n")
    with pytest.raises(
        UserError, match=r"local\.yaml: the key 'parameters' stands here a second time.* line 30"
    ):
        Settings.load("local", folder=folder)


def test_an_unknown_environment_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no environment 'prod'.*known: dev, local, production"):
        Settings.load("prod")


@hypothesis.settings(deadline=None, max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_no_value_escapes_as_another_exception(value: object) -> None:
    for key in ("jobs", "deployment.alarms", "parameters.release.Workload", "network", "region"):
        with suppress(UserError):
            Settings.load("local", {key: value})


def _copy(folder: Path) -> Path:
    for path in CONFIG.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text())
    return folder
