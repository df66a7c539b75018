"""The command `mla-pipeline`: arguments in, one call, words out. What is slow to import is imported late."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import operations, registry
from pipelines.console import (
    PIPELINES,
    RELEASE,
    Env,
    ExecutionId,
    MlflowPort,
    Note,
    Port,
    State,
    Values,
    VersionOf,
    Wait,
    Which,
    connect,
    errors,
    execution_arn,
    follow,
    not_production,
    pairs,
    pipeline_name,
    settings_of,
    stoppable,
)
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.run import Summary
    from pipelines.versions import Package

app = typer.Typer(
    help="Release MLA language models from Databricks MLflow to Amazon SageMaker with a measured kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no ✓ shows a ? in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if debug:
        os.environ["MLA_DEBUG"] = "1"


@app.command()
def run(
    parameter: Values = None,
    approve: Annotated[bool, typer.Option("--approve", help="Approve the version without asking.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep servers and endpoints up until Ctrl-C.")] = False,
    state: State = Path(".mla"),
    port: Annotated[int, Port] = 0,
    mlflow_port: Annotated[int, MlflowPort] = 0,
) -> None:
    """Run the whole chain on this machine: MLflow model, release, approval, production, one answer."""
    from pipelines import run as chain
    from pipelines.display import Display
    from pipelines.local import Local
    from pipelines.parameters import RELEASE, check_values

    display = Display()
    with errors(), stoppable():
        values = pairs(parameter)
        check_values({one.name: one for one in RELEASE}, values, "--parameter")  # before anything starts
        not_production(settings_of("local"), values)
        with Local(state, port, mlflow_port) as local:
            decide = (lambda package: "Approved") if approve else _ask
            summary = chain.run(local, display, values, decide)
            _print_summary(summary, display)
            if keep:
                typer.echo("What is deployed stays up: mla-pipeline invoke TEXT. Ctrl-C ends it.")
                signal.pause()


@app.command()
def sandbox(
    port: Annotated[int, Port] = 4599,
    mlflow_port: Annotated[int, MlflowPort] = 5000,
    state: State = Path(".mla"),
) -> None:
    """Serve AWS and MLflow on loopback until Ctrl-C; other commands find them with --env local."""
    from pipelines.local import Local

    with errors(), stoppable(), Local(state, port, mlflow_port) as local:
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
    with errors():
        from pipelines import lint, production, release

        settings = settings_of(env)
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
def start(
    pipeline: Which = RELEASE,
    env: Env = "local",
    parameter: Values = None,
    wait: Wait = False,
    if_new: Annotated[
        bool,
        typer.Option("--if-new", help="Only if ModelUri's alias names a version never tried; for CI, cron."),
    ] = False,
) -> None:
    """Start a pipeline; parameters that are not given take the defaults of its definition."""
    with errors():
        from pipelines import service, triggers

        settings, aws = connect(env)
        name, values = pipeline_name(settings, pipeline), pairs(parameter)
        if pipeline == RELEASE:
            not_production(settings, values)
        if if_new:
            if pipeline != RELEASE or "ModelUri" in values:
                raise UserError(
                    "it looks at the configured ModelUri of a release", "--if-new", "leave it out"
                )
            version = triggers.current(settings)
            if before := triggers.tried(aws, settings, version):
                typer.echo(f"nothing to do: {version.uri} is not new, {before}")
                return
            values["ModelUri"] = version.uri
            arn = service.start(aws, name, values, version.display_name, version.token(name))
        else:
            arn = service.start(aws, name, values)
        typer.echo(arn)
        if wait:
            follow(aws, arn)


@app.command()
def status(
    what: Annotated[str, typer.Argument(help="release, production, or the name of an endpoint")] = RELEASE,
    env: Env = "local",
    execution: ExecutionId = None,
    wait: Wait = False,
) -> None:
    """Show an execution: its steps, why it failed; or an endpoint: health, version, traffic, alarms, cost."""
    with errors():
        from pipelines import endpoint, service
        from pipelines.display import Display, summary_table

        settings, aws = connect(env)
        if what not in PIPELINES:
            for line in endpoint.status(aws, settings, what).lines():
                typer.echo(line)
            return
        arn = execution_arn(aws, settings, what, execution)
        if wait:
            follow(aws, arn)
            return
        now = service.status(aws, arn)
        display = Display()
        reason = service.reason(now)
        display.note(f"{now.pipeline} {now.id}: {now.status}" + (f": {reason}" if reason else ""))
        display.console.print(summary_table(now))


@app.command()
def logs(
    step: Annotated[str, typer.Argument(help="Step name, e.g. Evaluate")],
    pipeline: Annotated[str, typer.Option("--pipeline", help="release or production")] = RELEASE,
    env: Env = "local",
    execution: ExecutionId = None,
) -> None:
    """Print what a step's container wrote (CloudWatch Logs)."""
    with errors():
        from pipelines import service

        settings, aws = connect(env)
        for line in service.logs(aws, execution_arn(aws, settings, pipeline, execution), step):
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
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 48,
) -> None:
    """Ask an endpoint to continue a text."""
    with errors():
        from pipelines import service

        settings, aws = connect(env)
        name = endpoint or str(settings.parameters.production["ProductionEndpointName"])
        typer.echo(service.invoke(aws, name, prompt, max_tokens)["choices"][0]["text"])


@app.command()
def report(
    env: Env = "local",
    execution: ExecutionId = None,
    to: Annotated[Path | None, typer.Option(help="Folder; .mla/runs/<execution> by default.")] = None,
) -> None:
    """Download the evaluation of a release: evaluation.json and report.html."""
    with errors():
        from pipelines import service

        settings, aws = connect(env)
        arn = execution_arn(aws, settings, RELEASE, execution)
        for path in service.report(aws, arn, to or Path(".mla") / "runs" / arn.rsplit("/", 1)[-1]):
            typer.echo(path)


def _decide(env: str, version: str | None, approval: str, note: str) -> None:
    with errors():
        from pipelines import versions

        settings, aws = connect(env)
        package = versions.find_package(aws, settings.names.model_package_group, version)
        versions.decide(aws, package.arn, approval, note)
        typer.echo(f"version {package.version} is {approval}: {package.arn}")


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
            "No terminal to ask: the version stays pending. Run with --approve, or with --keep and then "
            "`mla-pipeline approve` in another terminal."
        )
        return ""
    return "Approved" if typer.confirm(f"Approve version {package.version} for production?") else "Rejected"


def _print_summary(summary: Summary, display: Any) -> None:
    from pipelines.display import summary_lines

    display.console.rule("summary")
    for line in summary_lines(summary):
        display.note(line)


for command in (*operations.COMMANDS, *registry.COMMANDS):
    app.command()(command)
app.add_typer(registry.image, name="image")

if __name__ == "__main__":
    app()
