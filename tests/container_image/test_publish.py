"""container/publish.sh against stand-ins for docker, aws and cyclonedx-py that write down their calls."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from container.requirements import requirements
from tests.container_image.buildah import DOCKERFILE, REPOSITORY

REGISTRY = "111122223333.dkr.ecr.us-east-1.amazonaws.com"
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
    *describe-images*) [ -n "$PRESENT" ] ;;
    *"pip list"*) echo "torch==2.13.0" ;;
esac
"""


def publish(folder: Path, *, present: bool = False, **changes: str) -> tuple[list[str], str]:
    """Run the script; the calls it made and what it printed."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("docker", "aws", "cyclonedx-py"):
        (tools / tool).write_text(STAND_IN)
        (tools / tool).chmod(0o755)
    context = folder / "context"
    if not context.exists():
        for name in ("container", "kernels", "steps"):
            (context / name).mkdir(parents=True)
            (context / name / "code.py").write_text(name)
        for name in ("pyproject.toml", "constraints.txt"):
            (context / name).write_text(name)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "PRESENT": "1" if present else "",
        "AWS_REGION": "us-east-1",
        "JOB_REPOSITORY": f"{REGISTRY}/mla-job",
        "SERVE_REPOSITORY": f"{REGISTRY}/mla-serve",
        "JOB_BASE": "base-devel",
        "SERVE_BASE": "base",
        "SBOM_URI": "s3://bucket/sbom",
        **changes,
    }
    (folder / "calls").write_text("")
    result = subprocess.run(
        ["bash", str(REPOSITORY / "container" / "publish.sh")],
        cwd=context,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return (folder / "calls").read_text().splitlines(), result.stdout


def test_both_images_are_described_before_they_are_pushed(tmp_path: Path) -> None:
    calls, printed = publish(tmp_path)
    for target in ("job", "serve"):
        (build,) = (
            at
            for at, call in enumerate(calls)
            if call.startswith("docker build") and f"target {target}" in call
        )
        (sbom,) = (at for at, call in enumerate(calls) if "s3 cp" in call and f"sbom/{target} " in call)
        (push,) = (
            at for at, call in enumerate(calls) if call.startswith(f"docker push {REGISTRY}/mla-{target}:")
        )
        assert build < sbom < push
    assert printed.startswith("images:\n")
    assert f"  job: {REGISTRY}/mla-job:" in printed


def test_a_tag_stands_for_its_content(tmp_path: Path) -> None:
    _, first = publish(tmp_path)
    _, again = publish(tmp_path)
    _, other_base = publish(tmp_path, SERVE_BASE="base@sha256:1")
    (tmp_path / "context" / "kernels" / "code.py").write_text("changed")
    _, changed = publish(tmp_path)
    _, vllm = publish(tmp_path, SERVE_ENGINE="vllm")
    assert first == again
    assert len({first, other_base, changed, vllm}) == 4


def test_the_serving_image_is_built_for_the_engine(tmp_path: Path) -> None:
    for variables, engine in (({}, "native"), ({"SERVE_ENGINE": "vllm"}, "vllm")):
        calls, _ = publish(tmp_path, **variables)
        (build,) = (call for call in calls if call.startswith("docker build") and "target serve" in call)
        assert f"--build-arg ENGINE={engine} " in build


def test_an_image_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    calls, printed = publish(tmp_path, present=True, IMAGE_TAG="1.0")
    assert not [call for call in calls if call.startswith(("docker build", "docker push"))]
    assert f"  serve: {REGISTRY}/mla-serve:1.0" in printed


def test_requirements_are_those_of_the_extras() -> None:
    found = requirements(["serve", "job"], REPOSITORY / "pyproject.toml")
    assert found == sorted(set(found))
    assert {line.split(">")[0] for line in found} >= {"starlette", "mlflow", "torch"}
    assert not [line for line in found if line.startswith("sagemaker")]


def test_the_dockerfile_asks_for_extras_that_are_there() -> None:
    asked = re.findall(r"requirements\.py ([a-z -]+) >", DOCKERFILE.read_text())
    assert len(asked) >= 2
    for extras in asked:
        requirements(extras.split(), REPOSITORY / "pyproject.toml")


def test_an_unknown_extra_is_named() -> None:
    with pytest.raises(SystemExit, match="no extra 'nothing': choose from dev, job"):
        requirements(["nothing"], REPOSITORY / "pyproject.toml")
