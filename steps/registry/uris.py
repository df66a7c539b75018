"""Model URIs: what a person may write as `ModelUri`, and what it means."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from steps.job import StepError

_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-LOGGED_MODEL_ID or runs:/RUN_ID/PATH"
_NAME = r"(?P<name>[^/:@\s](?:[^/:@]*[^/:@\s])?)"  # blanks within a name are fine with MLflow
_RUN = re.compile(r"runs:/(?P<run_id>[0-9A-Za-z_-]+)/(?P<path>\S(?:.*\S)?)")
_LOGGED = re.compile(r"models:/(?P<model_id>m-[0-9a-f]{32})")
_VERSION = re.compile(rf"models:/{_NAME}/(?P<version>[0-9]+)")
_ALIAS = re.compile(rf"models:/{_NAME}@(?P<alias>[^/@\s]+)")
# A model package names its model by it: CustomerMetadataValue of the API, [\p{L}\p{Z}\p{N}_.:/=+\-@]{1,256}.
_METADATA_SIGNS, _METADATA_LIMIT = "_.:/=+-@", 256


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
    """Parse `text`.

    Raises:
        StepError: it does not name exactly one model, or it cannot be written on a model package, which would
            fail only after the evaluation.
    """
    strange = [c for c in text if unicodedata.category(c)[0] not in "LZN" and c not in _METADATA_SIGNS]
    if strange or len(text) > _METADATA_LIMIT:
        reason = f"holds {strange[0]!r}" if strange else f"has {len(text)} characters"
        raise StepError(
            f"ModelUri '{text:.300}' {reason}: a SageMaker model package cannot name this model.",
            f"Use letters, digits, blanks and {_METADATA_SIGNS} in at most {_METADATA_LIMIT} characters: "
            "copy the model to such a name (MlflowClient.copy_model_version).",
        )
    for form in (_RUN, _LOGGED, _VERSION, _ALIAS):
        if match := form.fullmatch(text.rstrip("/")):
            return ModelUri(text, **match.groupdict())
    if re.fullmatch(rf"models:/{_NAME}/[A-Za-z]\w*", text):
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
