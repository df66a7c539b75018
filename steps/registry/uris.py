"""Model URIs: what a person may write as `ModelUri`, and what it means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steps.job import StepError

_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-LOGGED_MODEL_ID or runs:/RUN_ID/PATH"
_RUN = re.compile(r"runs:/(?P<run_id>[0-9A-Za-z_-]+)/(?P<path>[^\s?#]+)")
_LOGGED = re.compile(r"models:/(?P<model_id>m-[0-9a-f]{32})")
_VERSION = re.compile(r"models:/(?P<name>[^/@\s]+)/(?P<version>[0-9]+)")
_ALIAS = re.compile(r"models:/(?P<name>[^/@\s]+)@(?P<alias>[^/@\s]+)")


@dataclass(frozen=True)
class ModelUri:
    """A parsed model URI; the fields that its form does not have are None.

    Attributes:
        text: the URI as written.
        name: registered name; three levels (catalog.schema.model) in Unity Catalog.
        version: decimal version number.
        alias: registered alias.
        run_id, path: run and path of the model folder within the run's artifacts.
        model_id: MLflow 3 logged model, "m-" and 32 hexadecimal digits.
    """

    text: str
    name: str | None = None
    version: str | None = None
    alias: str | None = None
    run_id: str | None = None
    path: str | None = None
    model_id: str | None = None


def parse_model_uri(text: str) -> ModelUri:
    """Parse `text`. Raises StepError for anything that does not name exactly one model."""
    for form in (_RUN, _LOGGED, _VERSION, _ALIAS):
        if match := form.fullmatch(text.rstrip("/")):
            return ModelUri(text, **match.groupdict())
    if re.fullmatch(r"models:/[^/@\s]+/[A-Za-z]\w*", text):
        raise StepError(
            f"ModelUri '{text}' names a stage or 'latest', which another registration can move.",
            "Name a version (models:/NAME/3) or an alias (models:/NAME@champion).",
        )
    raise StepError(f"ModelUri '{text}' is no model URI.", f"Write {_FORMS}.")


def check_unity_catalog_name(name: str) -> None:
    """Unity Catalog knows three-level names only. Raises StepError otherwise."""
    if len(parts := name.split(".")) != 3 or not all(parts):
        raise StepError(
            f"'{name}' is no Unity Catalog model: the registry 'databricks-uc' needs catalog.schema.model.",
            "Write all three levels, or set MLFLOW_REGISTRY_URI=databricks for the workspace registry.",
        )
