"""What the service and the build engines ask of the Dockerfile, checked on its text."""

from __future__ import annotations

import re

import pytest

from tests.container_image.buildah import DOCKERFILE, REPOSITORY, bases

TEXT = DOCKERFILE.read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"(?m)^\s*#.*\n", "", TEXT).replace("\\\n", " ").splitlines()


def of(keyword: str) -> list[str]:
    return [line.removeprefix(keyword).strip() for line in INSTRUCTIONS if line.startswith(f"{keyword} ")]


def test_bases_are_arguments_with_a_pinned_default() -> None:
    assert of("FROM") == ["${JOB_BASE} AS job", "${SERVE_BASE} AS serve"]
    for base in bases():
        assert re.search(r":\d+\.\d+\.\d+-\w+-ubuntu\d\d\.\d\d$", base)


def test_entry_points_have_the_exec_form() -> None:
    assert of("ENTRYPOINT") == ['["/usr/bin/env"]'] * 2
    assert of("CMD") == ['["serve"]']


@pytest.mark.parametrize("keyword", ["HEALTHCHECK", "USER", "VOLUME", "ADD"])
def test_what_sagemaker_does_not_want_is_absent(keyword: str) -> None:
    assert of(keyword) == []


def test_no_here_documents() -> None:
    assert "<<" not in TEXT


def test_the_context_holds_only_what_is_copied() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {part.split("/")[0] for line in of("COPY") for part in line.split()[:-1]}
    assert kept == copied


def test_serve_can_be_executed() -> None:
    assert (REPOSITORY / "container" / "serve").stat().st_mode & 0o111 == 0o111
