"""What the service and the build engines ask of the Dockerfile, checked on its text."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

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


def test_commands_can_be_executed() -> None:
    commands = {path.name: path for path in (REPOSITORY / "container" / "bin").iterdir()}
    assert set(commands) == {"python3", "serve"}
    assert all(path.stat().st_mode & 0o111 == 0o111 for path in commands.values())


@pytest.mark.parametrize(
    ("driver", "used"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.274.02  Thu May 29 19:19:35 UTC 2025", True),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", True),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", False),
        ("NVIDIA UNIX Open Kernel Module for x86_64  1000.1.02  Release Build", False),
        (None, False),  # a machine without a GPU
    ],
)
def test_compatibility_libraries_serve_an_older_driver_only(
    tmp_path: Path, driver: str | None, used: bool
) -> None:
    compat, loaded = tmp_path / "compat", tmp_path / "version"
    compat.mkdir()
    (compat / "libcuda.so.580.95.05").touch()
    (compat / "libcuda.so.1").symlink_to("libcuda.so.580.95.05")
    if driver:
        loaded.write_text(f"NVRM version: {driver}\nGCC version: gcc version 13.3.0\n")
    script = (REPOSITORY / "container" / "bin" / "python3").read_text()
    for path, stand_in in (
        ("/usr/local/cuda/compat", compat),
        ("/proc/driver/nvidia/version", loaded),
        ("/opt/venv/bin/python3", "printenv"),
    ):
        assert path in script
        script = script.replace(path, str(stand_in))
    command = ["sh", "-c", script, "python3", "LD_LIBRARY_PATH"]
    environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/before"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == (f"{compat}:/before" if used else "/before")
