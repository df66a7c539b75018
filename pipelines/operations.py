"""Commands that change an account on purpose: bootstrap, plan, upsert, rollback; cli.py adds them."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.console import Env, Values, Wait, connect, errors, follow, pairs
from pipelines.errors import UserError

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def bootstrap(env: Env, parameter: Values = None, dry_run: DryRun = False) -> None:
    """Deploy the CloudFormation stacks of an environment and print the configuration that they give."""
    with errors():
        import yaml

        from pipelines import bootstrap as account

        if env == "local":
            fix = "name the environment of an account: --env dev"
            raise UserError("the sandbox has what the stacks make", "--env local", fix)
        settings, aws = connect(env)
        outputs = account.deploy(aws, settings, pairs(parameter), typer.echo, dry_run)
        if not dry_run:
            typer.echo(f"\n# for config/{env}.yaml, key by key; the tags are printed last by the image build")
            typer.echo(yaml.safe_dump(account.configuration(outputs), sort_keys=False).rstrip())
            if address := outputs.get("WebhookAddress"):
                typer.echo(f"\n# MLflow's webhook: {address}, its secret: {outputs['WebhookSecretName']}")


def plan(env: Env = "local") -> None:
    """Say what upsert would change, which caches that busts, what runs cost and which quotas they need."""
    with errors():
        from pipelines import plan as planning
        from pipelines import upsert as deployment

        settings, aws = connect(env)
        for line in planning.make(aws, settings, deployment.render(settings)).lines():
            typer.echo(line)


def upsert(env: Env = "local") -> None:
    """Create or update both pipelines, the package group and the rule of approvals: execute the plan."""
    with errors():
        from pipelines import upsert as deployment
        from pipelines.plan import change_lines

        settings, aws = connect(env)
        changes = deployment.plan(aws, settings, deployment.render(settings))
        deployment.execute(changes)
        for line in change_lines(changes):
            typer.echo(line)


def rollback(
    version: Annotated[
        str | None,
        typer.Argument(help="Version or package ARN; by default the one before that was in production."),
    ] = None,
    env: Env = "local",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: Wait = False,
    dry_run: DryRun = False,
) -> None:
    """Return production to a version that served before, by the production pipeline."""
    with errors():
        from pipelines import rollback as back

        settings, aws = connect(env)
        chosen = back.plan(aws, settings, version)
        for line in chosen.lines():
            typer.echo(line)
        if dry_run or not (yes or typer.confirm("Go on?")):
            return
        arn = back.start(aws, chosen)
        typer.echo(arn)
        if wait:
            follow(aws, arn)


COMMANDS = (bootstrap, plan, upsert, rollback)
