"""What the commands of the command line share: options, the way to an environment, errors in one line."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.aws import Aws
    from pipelines.settings import Settings

Env = Annotated[
    str,
    typer.Option(
        "--env", "-e", envvar="MLA_ENV", help="Environment: config/<name>.yaml over config/base.yaml."
    ),
]
Values = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Pipeline parameter; repeatable."),
]
State = Annotated[
    Path,
    typer.Option("--state", envvar="MLA_STATE", help="Folder of the local MLflow store, caches and reports."),
]
Port = typer.Option(min=0, max=65535, help="Port of the AWS sandbox; 0 takes a free one.")
MlflowPort = typer.Option(min=0, max=65535, help="Port of the MLflow server; 0 takes a free one.")
Which = Annotated[str, typer.Argument(help="release or production")]
ExecutionId = Annotated[
    str | None, typer.Option("--execution", "-x", help="Execution id or ARN; the latest by default.")
]
VersionOf = Annotated[
    str | None, typer.Argument(help="Version number or package ARN; by default the newest that waits.")
]
Note = Annotated[str, typer.Option("--note", help="Why; kept with the version.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the execution; exit 1 unless it succeeds.")]
RELEASE = "release"
PIPELINES = (RELEASE, "production")


def settings_of(env: str) -> Settings:
    from pipelines.local import Connection
    from pipelines.settings import Settings

    connection = Connection.read() if env == "local" else None
    return connection.settings() if connection else Settings.load(env)


def connect(env: str) -> tuple[Settings, Aws]:
    """Settings and clients; with --env local, of the sandbox that runs here."""
    from pipelines.aws import Aws
    from pipelines.local import Connection

    if env == "local":
        if connection := Connection.read():
            connection.use()
        elif "AWS_ENDPOINT_URL" not in os.environ:
            raise UserError(
                "no sandbox is running",
                "--env local",
                "run `mla-pipeline sandbox` in this folder (MLA_STATE is its --state), or name another --env",
            )
    settings = settings_of(env)
    return settings, Aws(settings.region)


def pipeline_name(settings: Settings, pipeline: str) -> str:
    names = {"release": settings.names.release_pipeline, "production": settings.names.production_pipeline}
    if pipeline not in names:
        raise UserError(f"no pipeline '{pipeline}'", "argument", f"known: {', '.join(names)}")
    return names[pipeline]


def execution_arn(aws: Aws, settings: Settings, pipeline: str, given: str | None) -> str:
    from pipelines import service

    if given and given.startswith("arn:"):
        return given
    if given:
        known = aws.sagemaker.describe_pipeline(PipelineName=pipeline_name(settings, pipeline))["PipelineArn"]
        return f"{known}/execution/{given}"
    return service.latest(aws, pipeline_name(settings, pipeline))


def follow(aws: Aws, arn: str) -> None:
    from pipelines import service
    from pipelines.display import Display

    ended = Display().follow(service.watch(aws, arn))
    if ended.status != "Succeeded":
        raise UserError(f"{ended.status}: {service.reason(ended)}", f"execution {ended.id}")


def pairs(given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise UserError(f"'{one}' has no '='", "--parameter", "write NAME=VALUE")
        if any("\ud800" <= one <= "\udfff" for one in value):  # bytes that Python could not read
            raise UserError(f"{name} = {value!r} is no UTF-8", "--parameter", "give text")
        if name in pairs:
            raise UserError(f"{name} is given twice", "--parameter", "give it once")
        pairs[name] = value
    return pairs


def not_production(settings: Settings, values: Mapping[str, str]) -> None:
    """Raise UserError when a release is to be deployed to the production endpoint."""
    from pipelines.parameters import check_staging

    staging = values.get("StagingEndpointName", settings.parameters.release["StagingEndpointName"])
    check_staging(staging, settings.parameters.production["ProductionEndpointName"], "--parameter")


@contextmanager
def errors() -> Iterator[None]:
    """One line and exit status 1 for whatever a person can remedy; 130 for Ctrl-C."""
    from pipelines.aws import explained

    try:
        with explained():
            yield
    except BrokenPipeError:  # `| head`: typer ends quietly
        raise
    except (UserError, OSError, UnicodeEncodeError) as error:
        if os.environ.get("MLA_DEBUG"):
            raise
        typer.echo(f"mla-pipeline: {_in_words(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("mla-pipeline: stopped", err=True)
        raise typer.Exit(130) from None


def _in_words(error: Exception) -> str:
    """One line; a file that cannot be read or written is named with the remedy."""
    if isinstance(error, UnicodeEncodeError):
        return "an argument holds bytes that are no UTF-8; correct it"
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if full else "give a path that you may read and write"
        return str(UserError(error.strerror, str(error.filename or "the disk of the state folder"), fix))
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that servers and jobs are stopped in either case."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
