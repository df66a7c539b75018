"""What the mlflow, Databricks and AWS clients raise, as a StepError that names cause and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from steps.job import StepError, redact
from steps.registry.credentials import SECRET_VARIABLE

GRANTS = "EXECUTE on the model, USE CATALOG and USE SCHEMA on its parents"


class RegistryName(Protocol):
    """What an error says about the registry: its URI and the kind of credentials in use."""

    @property
    def registry_uri(self) -> str: ...

    @property
    def credentials(self) -> str: ...


@contextmanager
def explained(registry: RegistryName, subject: str) -> Iterator[None]:
    """Turn what the mlflow, Databricks and AWS clients raise into a StepError that names cause and remedy."""
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        explanation = _explain(registry, subject, error)
        # a client error's own text may quote signed URLs; a programming error's traceback is needed
        programming = isinstance(error, (TypeError, AttributeError, KeyError, IndexError, ImportError))
        raise explanation from (error if programming else None)


def _explain(registry: RegistryName, subject: str, error: Exception) -> StepError:
    code, status = error_code(error)
    # the Databricks SDK appends its whole configuration to some errors
    text = redact(" ".join(str(error).split())).partition(" Config: ")[0].rstrip(".")[:300]
    where = registry.registry_uri
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "NoSuchKey", "NoSuchBucket") or status == 404:
        fix = "Correct the name, version or alias"
        if where.partition("://")[0] == "databricks":
            fix += "; catalog.schema.model is in Unity Catalog (mlflow.registry_uri: databricks-uc)"
        return StepError(f"{subject} does not exist in {where}: {text}.", f"{fix}.")
    if code == "ENDPOINT_NOT_FOUND":
        return StepError(
            f"{where} does not know a request that {subject} needs: {text[:150]}.",
            "Update the server (logged models, models:/m-…, need MLflow 3), or name a registered version.",
        )
    if code in ("UNAUTHENTICATED", "ExpiredToken", "InvalidAccessKeyId", "invalid_client") or status == 401:
        return StepError(
            f"{where} refused the credentials ({registry.credentials}) for {subject}: {text}.",
            f"Renew the secret that {SECRET_VARIABLE} names; check DATABRICKS_HOST.",
        )
    if code in ("PERMISSION_DENIED", "AccessDenied") or status == 403:
        if where.startswith("arn:"):
            fix = "Allow the job's role sagemaker-mlflow:* on this ARN, and to read the server's bucket."
        elif "owner" in text:
            fix = "Make the job's principal an owner of the model; `mla-pipeline doctor` says who owns it."
        else:
            fix = f"Grant the job's principal {GRANTS}; `mla-pipeline doctor` says which is missing."
        return StepError(f"{subject}: permission denied by {where}: {text}.", fix)
    if code == "REQUEST_LIMIT_EXCEEDED" or status == 429:
        return StepError(
            f"{where} limits the rate of requests (429) for {subject}.", "Start the step again later."
        )
    if status and status >= 500:
        return StepError(
            f"{where} failed with {status} for {subject}: {text}.", "Start the step again later."
        )
    if "auth" in text.lower() and ("default auth" in text or "oidc" in text or "credential" in text.lower()):
        return StepError(
            f"No credentials for {where} that work: {text}.",
            f"Give the job {SECRET_VARIABLE}: a secret with client_id and client_secret, or token.",
        )
    return StepError(
        f"{subject} in {where}: {type(error).__name__}: {text}.", "Check the URI and the registry."
    )


def error_code(error: Exception) -> tuple[str, int]:
    """The registry's error code and HTTP status, as far as the exception tells them."""
    chain: BaseException | None = error
    while chain is not None:
        response = getattr(chain, "response", None)
        if isinstance(response, dict):  # botocore
            return str(response.get("Error", {}).get("Code", "")), 0
        status = getattr(response, "status_code", 0) or 0
        code = getattr(chain, "error_code", "") or ""
        if code and code != "INTERNAL_ERROR":
            return str(code), status
        if status:
            return str(code), int(status)
        text = str(chain)
        if text.startswith("invalid_client"):  # the OAuth error code that Databricks' SDK puts first
            return "invalid_client", 401
        if "is not authorized to perform" in text:  # AWS's own answer, in which mlflow finds no error code
            return "AccessDenied", 403
        if type(chain).__name__ == "RestException":
            return str(code), chain.get_http_status_code()  # type: ignore[attr-defined]
        for number in (401, 403, 404, 429, 500, 502, 503, 504):
            if f"error code {number}" in text or f"{number} error" in text or f"too many {number}" in text:
                return "", number
        chain = chain.__cause__ or chain.__context__
    return "", 0
