"""The command `mla-pipeline`: arguments in, one call, words out. What is slow to import is imported late."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.aws import Aws
    from pipelines.run import Summary
    from pipelines.service import Package
    from pipelines.settings import Settings

app = typer.Typer(
    help="Release MLA language models from Databricks MLflow to Amazon SageMaker with a measured kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
State = Annotated[Path, typer.Option("--state", help="Folder of the local MLflow store, caches and reports.")]
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


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["MLA_DEBUG"] = "1"


@app.command()
def run(
    parameter: Values = None,
    approve: Annotated[bool, typer.Option("--approve", help="Approve the version without asking.")] = False,
    state: State = Path(".mla"),
    port: Annotated[int, typer.Option(help="Port of the AWS sandbox; 0 takes a free one.")] = 0,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server; 0 takes a free one.")] = 0,
) -> None:
    """Run the whole chain on this machine: MLflow model, release, approval, production, one answer."""
    from pipelines import run as chain
    from pipelines.display import Display
    from pipelines.local import Local

    display = Display()
    with _errors(), _stoppable(), Local(state, port, mlflow_port) as local:
        decide = (lambda package: "Approved") if approve else _ask
        summary = chain.run(local, display, _pairs(parameter), decide)
        _print_summary(summary, display)


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="Port of the AWS sandbox; 0 takes a free one.")] = 4599,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server; 0 takes a free one.")] = 5000,
    state: State = Path(".mla"),
) -> None:
    """Serve AWS and MLflow on loopback until Ctrl-C; other commands find them with --env local."""
    from pipelines.local import Local

    with _errors(), _stoppable(), Local(state, port, mlflow_port) as local:
        local.mlflow.wait_until_healthy()
        typer.echo(
            f"AWS     {local.connection.endpoint_url}   (AWS_ENDPOINT_URL; any credentials, us-east-1)"
        )
        typer.echo(f"MLflow  {local.mlflow.uri}   (MLFLOW_TRACKING_URI)")
        typer.echo(
            "In another terminal: mla-pipeline upsert && mla-pipeline start --wait. Ctrl-C stops both."
        )
        signal.pause()


@app.command()
def render(
    pipeline: Annotated[str | None, typer.Argument(help="release or production; both when left out")] = None,
    env: Env = "local",
    check: Annotated[bool, typer.Option("--check", help="Only check; list every problem.")] = False,
) -> None:
    """Print the pipeline definitions as JSON, or check them. Calls no AWS."""
    with _errors():
        from pipelines import lint, production, release

        settings = _settings(env)
        built = {"release": release, "production": production}
        wanted = [pipeline] if pipeline else list(built)
        problems = []
        for name in wanted:
            if name not in built:
                raise UserError(f"no pipeline '{name}'", "argument", f"known: {', '.join(built)}")
            text = built[name].get_pipeline(settings).definition()
            problems += [f"{name}, {problem}" for problem in lint.lint(text)]
            if not check:
                typer.echo(json.dumps(json.loads(text), indent=2))
        for problem in problems:
            typer.echo(problem, err=True)
        if problems:
            raise UserError(
                f"{len(problems)} problems", f"environment {env}", "correct them; upsert refuses this"
            )
        if check:
            typer.echo(f"{', '.join(wanted)}: no problem found")


@app.command()
def upsert(
    env: Env = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
) -> None:
    """Create or update both pipelines, the package group and the rule that an approval triggers."""
    with _errors():
        from pipelines import upsert as deployment

        settings, aws = _connect(env)
        changes = deployment.plan(aws, settings, deployment.render(settings))
        if not dry_run:
            deployment.execute(changes)
        for change in changes:
            typer.echo(f"{change.action:<7}{change.kind} {change.name}")


@app.command()
def start(
    pipeline: Which = RELEASE, env: Env = "local", parameter: Values = None, wait: Wait = False
) -> None:
    """Start a pipeline; parameters that are not given take the defaults of its definition."""
    with _errors():
        from pipelines import service

        settings, aws = _connect(env)
        arn = service.start(aws, _name(settings, pipeline), _pairs(parameter))
        typer.echo(arn)
        if wait:
            _follow(aws, arn)


@app.command()
def status(
    pipeline: Which = RELEASE, env: Env = "local", execution: ExecutionId = None, wait: Wait = False
) -> None:
    """Show an execution: its status, its steps, why it failed."""
    with _errors():
        from pipelines import service
        from pipelines.display import Display, summary_table

        settings, aws = _connect(env)
        arn = _execution(aws, settings, pipeline, execution)
        if wait:
            _follow(aws, arn)
            return
        now = service.status(aws, arn)
        display = Display()
        display.note(f"{now.pipeline} {now.id}: {now.status}" + (f": {now.failure}" if now.failure else ""))
        display.console.print(summary_table(now))


@app.command()
def logs(
    step: Annotated[str, typer.Argument(help="Step name, e.g. Evaluate")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="release or production")] = RELEASE,
    env: Env = "local",
    execution: ExecutionId = None,
) -> None:
    """Print what a step's container wrote (CloudWatch Logs)."""
    with _errors():
        from pipelines import service

        settings, aws = _connect(env)
        for line in service.logs(aws, _execution(aws, settings, pipeline, execution), step):
            typer.echo(line)


@app.command()
def approve(version: VersionOf = None, env: Env = "local", note: Note = "") -> None:
    """Approve a registered version; the approval moves it to production."""
    _decide(env, version, "Approved", note)


@app.command()
def reject(version: VersionOf = None, env: Env = "local", note: Note = "") -> None:
    """Reject a registered version; it never reaches production."""
    _decide(env, version, "Rejected", note)


@app.command()
def invoke(
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    env: Env = "local",
    endpoint: Annotated[str, typer.Option(help="Endpoint; the environment's production by default.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 48,
) -> None:
    """Ask an endpoint to continue a text."""
    with _errors():
        from pipelines import service

        settings, aws = _connect(env)
        name = endpoint or str(settings.parameters.production["ProductionEndpointName"])
        typer.echo(service.invoke(aws, name, prompt, max_tokens)["choices"][0]["text"])


@app.command()
def report(
    env: Env = "local",
    execution: ExecutionId = None,
    to: Annotated[Path | None, typer.Option(help="Folder; .mla/runs/<execution> by default.")] = None,
) -> None:
    """Download the evaluation of a release: evaluation.json and report.html."""
    with _errors():
        from pipelines import service

        settings, aws = _connect(env)
        arn = _execution(aws, settings, RELEASE, execution)
        for path in service.report(aws, arn, to or Path(".mla") / "runs" / arn.rsplit("/", 1)[-1]):
            typer.echo(path)


def _settings(env: str) -> Settings:
    from pipelines.local import Connection
    from pipelines.settings import Settings

    connection = Connection.read() if env == "local" else None
    return connection.settings() if connection else Settings.load(env)


def _connect(env: str) -> tuple[Settings, Aws]:
    """Settings and clients; with --env local, of the sandbox that runs here."""
    from pipelines.aws import Aws
    from pipelines.local import Connection

    if env == "local":
        if connection := Connection.read():
            connection.use()
        elif "AWS_ENDPOINT_URL" not in os.environ:
            raise UserError(
                "no sandbox is running", "--env local", "run `mla-pipeline sandbox`, or name another --env"
            )
    settings = _settings(env)
    return settings, Aws(settings.region)


def _name(settings: Settings, pipeline: str) -> str:
    names = {"release": settings.names.release_pipeline, "production": settings.names.production_pipeline}
    if pipeline not in names:
        raise UserError(f"no pipeline '{pipeline}'", "argument", f"known: {', '.join(names)}")
    return names[pipeline]


def _execution(aws: Aws, settings: Settings, pipeline: str, given: str | None) -> str:
    from pipelines import service

    if given and given.startswith("arn:"):
        return given
    if given:
        known = aws.sagemaker.describe_pipeline(PipelineName=_name(settings, pipeline))["PipelineArn"]
        return f"{known}/execution/{given}"
    return service.latest(aws, _name(settings, pipeline))


def _follow(aws: Aws, arn: str) -> None:
    from pipelines import service
    from pipelines.display import Display

    ended = Display().follow(service.watch(aws, arn))
    if ended.status != "Succeeded":
        raise UserError(f"{ended.status}: {service.reason(ended)}", f"execution {ended.id}")


def _decide(env: str, version: str | None, approval: str, note: str) -> None:
    with _errors():
        from pipelines import service

        settings, aws = _connect(env)
        package = service.find_package(aws, settings.names.model_package_group, version)
        service.decide(aws, package.arn, approval, note)
        typer.echo(f"version {package.version} is {approval}: {package.arn}")


def _pairs(given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise UserError(f"'{one}' has no '='", "--parameter", "write NAME=VALUE")
        pairs[name] = value
    return pairs


def _ask(package: Package) -> str:
    for name in (
        "MlflowModelName",
        "MlflowModelVersion",
        "KernelBackend",
        "RelativeError",
        "Speedup",
        "DecodeLatencyMs",
    ):
        typer.echo(f"  {name:<20} {package.metadata.get(name, '-')}")
    if not sys.stdin.isatty():
        typer.echo(
            "No terminal to ask: version stays pending; approve with --approve or `mla-pipeline approve`."
        )
        return ""
    return "Approved" if typer.confirm(f"Approve version {package.version} for production?") else "Rejected"


def _print_summary(summary: Summary, display: Any) -> None:
    from pipelines.display import summary_lines

    display.console.rule("summary")
    for line in summary_lines(summary):
        display.console.print(line, soft_wrap=True)


@contextmanager
def _errors() -> Iterator[None]:
    """One line and exit status 1 for whatever a person can remedy; 130 for Ctrl-C."""
    from pipelines.aws import explained

    try:
        with explained():
            yield
    except UserError as error:
        if os.environ.get("MLA_DEBUG"):
            raise
        typer.echo(f"mla-pipeline: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("mla-pipeline: stopped", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that servers and jobs are stopped in either case."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    app()
