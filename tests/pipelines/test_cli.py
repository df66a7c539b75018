from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.local import Lock, free_port

COMMANDS = [
    "run",
    "sandbox",
    "render",
    "upsert",
    "start",
    "status",
    "logs",
    "approve",
    "reject",
    "invoke",
    "report",
    "bootstrap",
    "plan",
    "rollback",
    "doctor",
    "provenance",
    "image",
]
SLOW = ("sagemaker", "moto", "mlflow", "torch", "boto3", "botocore")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return CliRunner()


def refused(runner: CliRunner, *arguments: str) -> str:
    """The one line of a failing command."""
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 1, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_help_names_every_command(runner: CliRunner) -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, runner: CliRunner) -> None:
    import typer

    group = typer.main.get_command(app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    assert group.commands[command].help  # type: ignore[attr-defined]
    assert [one.name for one in parameters if not getattr(one, "help", None)] == []
    assert runner.invoke(app, [command, "--help"]).exit_code == 0


def test_the_command_line_imports_nothing_slow() -> None:
    code = f"import sys, pipelines.cli; print([name for name in {SLOW} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_commands_that_need_no_sdk_do_not_import_it() -> None:
    code = (
        "import sys, pipelines.service, pipelines.aws, pipelines.local, pipelines.display;"
        "pipelines.aws.Aws('us-east-1').sagemaker;"
        "print([name for name in ('sagemaker', 'moto', 'mlflow', 'torch', 'pandas') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_it_starts_within_half_a_second() -> None:
    """Processor time, because other tests share the machine; nothing waits for disk or network here."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "pipelines.cli", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["render", "--env", "prod"], "no environment 'prod'"),
        (["start", "--env", "prod"], "known: dev, local, production"),
        (["render", "releas"], "no pipeline 'releas'"),
        (["status"], "no sandbox is running: --env local; run `mla-pipeline sandbox`"),
        (["approve"], "no sandbox is running"),
        (["run", "-p", "ModelUri"], "'ModelUri' has no '='"),
        (["run", "-p", "Foo=1"], "unknown parameter 'Foo'"),  # before servers start and a model is trained
        (["run", "-p", "KernelBackend=cpuu"], "did you mean 'cpu'?"),
        (["run", "-p", "StagingEndpointName=MLA-Production"], "only an approval changes production"),
        (["run", "-p", "MinSpeedup=1", "-p", "MinSpeedup=2"], "MinSpeedup is given twice"),
        (["run", "-p", "ModelUri=\udcff"], "is no UTF-8: --parameter"),
        (["run", "--state", "/proc/none"], "No such file or directory: /proc/none"),
        (["run", "--state", "/dev/null/x"], "Not a directory: /dev/null/x; give a path that you may"),
    ],
)
def test_an_error_is_one_line(runner: CliRunner, arguments: list[str], words: str) -> None:
    assert words in refused(runner, *arguments)


def test_debug_shows_the_traceback(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_DEBUG", "1")
    result = runner.invoke(app, ["render", "--env", "prod"])
    assert result.exit_code == 1
    assert isinstance(result.exception, Exception)


def test_a_second_run_at_once_is_refused(runner: CliRunner, tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".mla")
    line = refused(runner, "run", "--approve")
    assert f"process {os.getpid()}" in line
    assert "--state" in line
    lock.release()
    Lock(tmp_path / ".mla").release()  # free again


@pytest.mark.parametrize("option", ["--port", "--mlflow-port"])
def test_a_taken_port_is_named(runner: CliRunner, option: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in refused(runner, "run", option, str(port))


def test_a_port_that_cannot_be_is_refused_with_the_range(runner: CliRunner) -> None:
    result = runner.invoke(app, ["run", "--port", "70000"])
    assert result.exit_code == 2
    assert "65535" in result.output


def test_a_terminal_without_the_marks_is_no_reason_to_fail() -> None:
    code = "from pipelines import cli, display; cli.main(); display.Display().note('✓ done')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.strip()) == (0, "? done"), ended.stderr


def test_a_port_that_is_free_is_given() -> None:
    assert free_port(free_port()) > 0


def test_render_prints_json_and_check_finds_nothing(runner: CliRunner) -> None:
    import json

    result = runner.invoke(app, ["render", "production"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["Version"] == "2020-12-01"
    result = runner.invoke(app, ["render", "--check", "--env", "dev"])
    assert result.stdout.strip() == "release, production: no problem found"
