from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import lint, parameters
from pipelines.definition import gets, walk
from pipelines.gate import LIMITS
from pipelines.release import kernel_sources_sha256
from pipelines.settings import ROLES, Settings

RENDER = """
from pipelines import release
from pipelines.settings import Settings
print(release.get_pipeline(Settings.load("local")).definition(), end="")
"""


def steps(definition: str) -> dict[str, dict[str, Any]]:
    return {step["Name"]: step for step, _ in walk(json.loads(definition)["Steps"])}


def test_the_steps_are_those_of_the_design(definitions: dict[str, str]) -> None:
    assert list(steps(definitions["release"])) == [
        "PullModel", "CompileKernel", "Evaluate", "QualityGate", "CreateModel", "CreateEndpointConfig",
        "DeployStaging", "SmokeTest", "RegisterModel", "RecordRelease", "GateFailed",
    ]  # fmt: skip
    assert list(steps(definitions["production"])) == ["VerifyPackage", "DeployProduction", "RecordPromotion"]


def test_pull_and_compile_do_not_wait_for_each_other(definitions: dict[str, str]) -> None:
    parsed = lint.Definition(definitions["release"])
    assert parsed.needs(parsed.steps["PullModel"]) == set()
    assert parsed.needs(parsed.steps["CompileKernel"]) == set()
    assert parsed.needs(parsed.steps["Evaluate"]) == {"PullModel", "CompileKernel"}


def test_nothing_is_registered_before_the_smoke_test(definitions: dict[str, str]) -> None:
    parsed = lint.Definition(definitions["release"])
    assert "RegisterModel" in parsed.needs(parsed.steps["RecordRelease"])
    assert "SmokeTest" in parsed.needs(parsed.steps["RegisterModel"])
    assert "DeployStaging" in parsed.needs(parsed.steps["SmokeTest"])


def test_no_start_makes_staging_of_production(definitions: dict[str, str], settings: Settings) -> None:
    """By the definition itself, because the console asks nobody else."""
    production = settings.parameters.production["ProductionEndpointName"]
    staging = {"Get": "Parameters.StagingEndpointName"}
    same = {"Type": "Equals", "LeftValue": staging, "RightValue": production}
    gate = steps(definitions["release"])["QualityGate"]
    assert {"Type": "Not", "Condition": same} in gate["Arguments"]["Conditions"]


def test_parameters_are_the_table(definitions: dict[str, str], settings: Settings) -> None:
    for pipeline, table in parameters.PIPELINES.items():
        rendered = {one["Name"]: one for one in json.loads(definitions[pipeline])["Parameters"]}
        assert list(rendered) == [one.name for one in table]
        for one in table:
            assert rendered[one.name]["Type"] == one.type
            assert tuple(rendered[one.name].get("EnumValues", ())) == one.enum
            default = getattr(settings.parameters, pipeline).get(one.name)
            assert rendered[one.name].get("DefaultValue") == default
            assert one.required == (default is None)


def test_every_parameter_is_used(definitions: dict[str, str]) -> None:
    for definition in definitions.values():
        document = json.loads(definition)
        used = set(gets(document["Steps"]))
        assert {f"Parameters.{one['Name']}" for one in document["Parameters"]} <= used


def test_the_gate_is_the_table_of_limits(definitions: dict[str, str]) -> None:
    names = {"==": "Equals", "<=": "LessThanOrEqualTo", ">=": "GreaterThanOrEqualTo"}
    gate = steps(definitions["release"])["QualityGate"]
    found = [
        (one["Type"], one["LeftValue"]["Std:JsonGet"]["Path"], one["RightValue"])
        for one in gate["Arguments"]["Conditions"]
        if "LeftValue" in one
    ]
    assert found == [
        (
            names[limit.operator],
            f"gate.{limit.field}",
            {"Get": f"Parameters.{limit.bound}"} if isinstance(limit.bound, str) else limit.bound,
        )
        for limit in LIMITS
    ]
    message = json.dumps(steps(definitions["release"])["GateFailed"])
    assert all(f"gate.{limit.field}" in message and limit.words in message for limit in LIMITS)


def test_the_package_and_staging_hold_the_same_container(definitions: dict[str, str]) -> None:
    found = steps(definitions["release"])
    package = found["RegisterModel"]["Arguments"]["InferenceSpecification"]["Containers"][0]
    assert package == found["CreateModel"]["Arguments"]["PrimaryContainer"]
    assert package["AdditionalModelDataSources"][0]["ChannelName"] == "kernel"
    for source in (package["ModelDataSource"], package["AdditionalModelDataSources"][0]):
        assert source["S3DataSource"]["S3Uri"]["Std:Join"]["Values"][-1] == "/"  # S3Prefix must end so


def test_download_gives_the_kernels_address_instead_of_mounting_it(definitions: dict[str, str]) -> None:
    from pipelines import production, release

    settings = Settings.load("local", {"endpoint.kernel_delivery": "download"})
    definition = release.get_pipeline(settings).definition()
    assert lint.lint(definition) == []
    found = steps(definition)
    package = found["RegisterModel"]["Arguments"]["InferenceSpecification"]["Containers"][0]
    assert package == found["CreateModel"]["Arguments"]["PrimaryContainer"]
    mounted = steps(definitions["release"])["CreateModel"]["Arguments"]["PrimaryContainer"]
    folder = mounted["AdditionalModelDataSources"][0]["S3DataSource"]["S3Uri"]
    assert package["Environment"]["MLA_KERNEL_S3_URI"] == folder
    assert '"Path": "kernel_sha256"' in json.dumps(package["Environment"]["MLA_KERNEL_SHA256"])
    assert "AdditionalModelDataSources" not in definition
    assert "MLA_KERNEL_S3_URI" not in definitions["release"]
    assert production.get_pipeline(settings).definition() == definitions["production"]


def test_the_service_names_jobs_and_models(definitions: dict[str, str]) -> None:
    text = json.dumps(definitions)
    for word in ("ProcessingJobName", '\\"ModelName\\": \\"', "SAGEMAKER_PROGRAM", "CertifyForMarketplace"):
        assert word not in text


def test_no_secret_and_no_experiment_is_in_a_definition() -> None:
    from pipelines import release

    document = json.loads(release.get_pipeline(Settings.load("dev")).definition())
    environment = steps(json.dumps(document))["PullModel"]["Arguments"]["Environment"]
    assert environment["MLA_DATABRICKS_SECRET_ARN"].startswith("arn:aws:secretsmanager:")
    assert document["PipelineExperimentConfig"] is None
    assert not any("TOKEN" in name or name.endswith("SECRET") for name in environment)


def test_network_keys_and_cache_reach_the_steps() -> None:
    from pipelines import production, release

    settings = Settings.load("production")
    assert settings.network
    found = steps(release.get_pipeline(settings).definition())
    found |= steps(production.get_pipeline(settings).definition())
    for step in found.values():
        if step["Type"] == "Processing":
            cluster = step["Arguments"]["ProcessingResources"]["ClusterConfig"]
            assert step["Arguments"]["NetworkConfig"]["VpcConfig"]["Subnets"] == list(
                settings.network.subnets
            )
            assert step["Arguments"]["ProcessingOutputConfig"]["KmsKeyId"] == settings.kms_key
            chosen_by_a_rerun = isinstance(cluster["InstanceType"], dict)  # maybe one with disks of its own
            assert cluster.get("VolumeKmsKeyId") == (None if chosen_by_a_rerun else settings.kms_key)
            assert ("CacheConfig" in step) == (step["Name"] == "CompileKernel")
    assert found["CreateModel"]["Arguments"]["VpcConfig"]["SecurityGroupIds"]
    source = found["CompileKernel"]["Arguments"]["AppSpecification"]["ContainerArguments"][2:]
    assert source == ["--kernel-source", {"Get": "Parameters.KernelSource"}]
    environment = found["CompileKernel"]["Arguments"]["Environment"]
    assert environment["MLA_INSTANCE_TYPE"] == {"Get": "Parameters.ProcessingInstanceType"}
    assert environment["MLA_SOURCE_SHA256"] == kernel_sources_sha256()


def test_network_and_key_reach_the_production_endpoint() -> None:
    from pipelines import production
    from steps.deployment import Deployment

    settings = Settings.load("production")
    assert settings.network
    step = steps(production.get_pipeline(settings).definition())["DeployProduction"]
    arguments = step["Arguments"]["AppSpecification"]["ContainerArguments"]
    parts = [value for option, value in itertools.pairwise(arguments) if option == "--deployment"]
    assert all(len(part) <= 256 for part in parts)
    deployment = Deployment.parse(parts)
    assert deployment.subnets == settings.network.subnets
    assert deployment.security_group_ids == settings.network.security_group_ids
    assert deployment.kms_key == settings.kms_key
    assert deployment.alarms == settings.deployment.alarms


def test_each_step_can_have_a_role_of_its_own(settings: Settings) -> None:
    from pipelines import production, release

    def arn(name: str) -> str:
        return f"arn:aws:iam::111122223333:role/{name}"

    names = ["PullModel", "Evaluate", "DeployProduction", "endpoint"]
    own = Settings.load("local", {f"roles.{name}": arn(name) for name in names})
    found = steps(release.get_pipeline(own).definition()) | steps(production.get_pipeline(own).definition())
    for name, step in found.items():
        if step["Type"] == "Processing":
            assert step["Arguments"]["RoleArn"] == (arn(name) if name in names else settings.role)
    assert found["CreateModel"]["Arguments"]["ExecutionRoleArn"] == arn("endpoint")
    assert arn("endpoint") in found["DeployProduction"]["Arguments"]["AppSpecification"]["ContainerArguments"]


def test_the_roles_that_settings_know_are_the_jobs(definitions: dict[str, str]) -> None:
    found = steps(definitions["release"]) | steps(definitions["production"])
    jobs = {name for name, step in found.items() if step["Type"] == "Processing"}
    assert jobs == set(ROLES) - {"endpoint", "events"}


def test_a_change_of_a_kernel_source_changes_the_cache_key(tmp_path: Path) -> None:
    source = tmp_path / "csrc" / "a.cpp"
    source.parent.mkdir()
    source.write_text("int a;")
    before = kernel_sources_sha256(tmp_path)
    source.write_text("int b;")
    assert kernel_sources_sha256(tmp_path) != before


def test_another_process_renders_the_same_bytes(definitions: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    ended = subprocess.run(
        [sys.executable, "-c", RENDER],
        env={**environment, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == definitions["release"]


def test_rendering_is_fast_and_calls_no_aws(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.endpoint

    from pipelines import release

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("an AWS call")

    monkeypatch.setattr(botocore.endpoint.Endpoint, "make_request", refuse)
    started = time.process_time()
    release.get_pipeline(settings).definition()
    assert time.process_time() - started < 3
