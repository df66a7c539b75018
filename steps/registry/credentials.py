"""Credentials of the registry: read inside the job from AWS Secrets Manager, never written anywhere.

The secret is a JSON object with one of these sets of keys (and optionally `host`):

    client_id, client_secret    a Databricks service principal, OAuth machine-to-machine
    token                       a Databricks personal access token, or an MLflow server's bearer token
    username, password          an MLflow server with basic authentication

Its values live in this process's environment, where the mlflow client looks for them. steps.job.redact keeps
them out of the log and the exit message because of the variables' names.
"""

from __future__ import annotations

import json
import os
from typing import Any

from steps.job import StepError

SECRET_VARIABLE = "MLA_DATABRICKS_SECRET_ARN"

_SHAPE = "a JSON object with client_id and client_secret, or token, or username and password"


def load_credentials() -> str:
    """Put the secret's credentials into this process's environment.

    Returns:
        the kind of credentials in use, for the log: "oauth-m2m", "token", "basic", "environment" (already set
        by whoever started the process) or "none".

    Raises:
        StepError: the secret cannot be read or has another shape. Its content is never quoted.
    """
    arn = os.environ.get(SECRET_VARIABLE)
    if not arn:
        given = (
            "DATABRICKS_CLIENT_SECRET",
            "DATABRICKS_TOKEN",
            "MLFLOW_TRACKING_TOKEN",
            "MLFLOW_TRACKING_PASSWORD",
        )
        return "environment" if any(os.environ.get(name) for name in given) else "none"
    kind, variables = _variables(_read_secret(arn), arn)
    if kind in ("oauth-m2m", "token"):  # whatever an image or a role left behind must not win over the secret
        for name in ("DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET"):
            os.environ.pop(name, None)
    os.environ.update(variables)
    return kind


def _read_secret(arn: str) -> dict[str, Any]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        region = arn.split(":")[3] if arn.startswith("arn:") else None
        answer = boto3.client("secretsmanager", region_name=region or None).get_secret_value(SecretId=arn)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise StepError(
            f"Cannot read the registry's credentials: Secrets Manager answered {code} for {arn}.",
            "Grant the job's role secretsmanager:GetSecretValue on it (and kms:Decrypt on its key)."
            if "AccessDenied" in code
            else f"Correct {SECRET_VARIABLE}, or create the secret in this account and region.",
        ) from error
    except BotoCoreError as error:
        raise StepError(
            f"Cannot reach Secrets Manager for {arn}: {error}.",
            "Give the job a route to it (VPC endpoint secretsmanager) and a region.",
        ) from error
    try:
        secret = json.loads(answer.get("SecretString") or "")
    except ValueError:  # the parser's message quotes the text it parsed
        secret = None
    if not isinstance(secret, dict):
        raise StepError(f"The secret {arn} is no JSON object.", f"Store {_SHAPE}.")
    return secret


def _variables(secret: dict[str, Any], arn: str) -> tuple[str, dict[str, str]]:
    def values(*names: str) -> list[str] | None:
        found = [secret.get(name) for name in names]
        return [str(value).strip() for value in found] if all(found) else None

    host = {"DATABRICKS_HOST": str(secret["host"])} if secret.get("host") else {}
    if pair := values("client_id", "client_secret"):
        return "oauth-m2m", host | {"DATABRICKS_CLIENT_ID": pair[0], "DATABRICKS_CLIENT_SECRET": pair[1]}
    if token := values("token"):
        return "token", host | {"DATABRICKS_TOKEN": token[0], "MLFLOW_TRACKING_TOKEN": token[0]}
    if pair := values("username", "password"):
        return "basic", {"MLFLOW_TRACKING_USERNAME": pair[0], "MLFLOW_TRACKING_PASSWORD": pair[1]}
    keys = ", ".join(sorted(secret)) or "none"
    raise StepError(f"The secret {arn} has the keys {keys}.", f"Store {_SHAPE}.")
