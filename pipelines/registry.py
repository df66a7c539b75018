"""Commands that look at the MLflow side: doctor, provenance, image requirements; cli.py adds them.

What they say is said by the code that the jobs run, steps/registry. This package imports nothing of steps, so
each runs as a process of its own, with the addresses and the secret's ARN that a job of the environment gets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.console import Env, connect, errors
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.settings import Settings

ROOT = Path(__file__).resolve().parent.parent

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def doctor(
    model_uri: Annotated[
        str | None, typer.Argument(help="Model to be released; the environment's ModelUri by default.")
    ] = None,
    env: Env = "local",
    json: Json = False,
) -> None:
    """Check that a release can read the model and write back; name the grant that is missing, with exit 1.

    Uses the secret of mlflow.secret_arn, read with your AWS identity; without one, this shell's credentials.
    """
    with errors():
        settings, _ = connect(env)
        uri = model_uri or str(settings.parameters.release["ModelUri"])
        run_module("steps.registry.doctor", [*_flag("--json", json), "--", uri], settings)


def provenance(
    start: Annotated[str, typer.Argument(metavar="PACKAGE_ARN|MODEL_URI", help="Either end of the chain.")],
    env: Env = "local",
    json: Json = False,
) -> None:
    """Print the chain: run, model version, kernel, evaluation, package, endpoint; contradictions exit 1."""
    with errors():
        settings, _ = connect(env)
        run_module("steps.registry.chain", [*_flag("--json", json), "--", start], settings)


def requirements(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_URI", help="Model URI, or a downloaded model's folder.")
    ],
    env: Env = "local",
    write: Annotated[
        Path | None, typer.Option(help="Write what the image would have to get to this requirements file.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare what a model requires with the serving image and the endpoint's driver; conflicts exit 1."""
    with errors():
        settings, _ = connect(env)
        options = [*_flag("--json", json), *(["--write", str(write)] if write else [])]
        if ami := settings.endpoint.inference_ami:
            options += ["--ami", ami]
        run_module("steps.registry.requirements", [*options, "--", model], settings)


def run_module(module: str, arguments: list[str], settings: Settings) -> None:
    """Run `python -m module` with this terminal and the environment's settings; its failure is ours.

    Raises UserError when this Python lacks mlflow, typer.Exit with the module's exit status unless it is 0.
    """
    if not find_spec("mlflow"):
        raise UserError("mlflow is not installed", sys.executable, "pip install 'mla-pipeline[job]'")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"AWS_DEFAULT_REGION": settings.region, "PYTHONPATH": path, **settings.mlflow.variables()}
    # -P: a folder `steps` where the command is typed must not take the place of ours.
    command = [sys.executable, "-P", "-m", module, *arguments]
    status = subprocess.run(command, env={**os.environ, **variables}).returncode
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)


def _flag(name: str, wanted: bool) -> list[str]:
    return [name] if wanted else []


COMMANDS = (doctor, provenance)

image = typer.Typer(help="Look at the serving image.", no_args_is_help=True)
image.command()(requirements)


@image.callback()
def _group() -> None:
    """Keeps `requirements` a word of its own: a group of one command would swallow it."""
