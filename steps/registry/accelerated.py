"""Register the accelerated model: an MLflow pyfunc with the compiled kernel, and the weights by reference.

A Databricks batch job or notebook that loads it runs the very kernel that was measured and released. The
weights stay where they are registered, so a 600 GB model is not stored twice.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

from steps.job import StepError
from steps.registry.access import Registry
from steps.registry.errors import error_code, explained
from steps.registry.provenance import NONE
from steps.registry.requirements import image_versions

log = logging.getLogger("steps.accelerated")

ARTIFACT_FOLDER = "mla-release/accelerated"
PACKAGE_TAG = "mla.model_package_arn"
_ROOT = Path(__file__).resolve().parents[2]
_NEEDED = ("jinja2", "numpy", "safetensors", "tokenizers", "torch")  # what the engine imports


def register(
    registry: Registry,
    name: str,
    origin: dict[str, Any],
    kernel: Path,
    *,
    backend: str,
    kv_cache_dtype: str,
    alias: str,
    package_arn: str,
    tags: dict[str, str],
) -> str:
    """Save, log to the training run and register the accelerated model.

    Each release has a folder of its own in the run: a registered version may be just a reference to it. Doing
    it again for the release that the alias names changes nothing.

    Args:
        registry: where.
        name: registered model to add a version to; created when it is new. Three levels in Unity Catalog.
        origin: provenance.json of the released weights.
        kernel: kernel artifact folder (index.json and the packages).
        backend, kv_cache_dtype: as measured.
        alias: set on the new version.
        package_arn: the release, by its model package.
        tags: of the new version, `PACKAGE_TAG` with package_arn among them.

    Returns:
        the new version.

    Raises:
        StepError: the weights have no registered version or run to refer to, or the registry refuses.
    """
    if origin["run_id"] == NONE:
        raise StepError(
            "The accelerated model is logged to the training run, but the released version names none.",
            "Register models from runs, or release with AcceleratedModelName = -.",
        )
    client = registry.client
    folder_in_run = f"{ARTIFACT_FOLDER}/{hashlib.sha256(package_arn.encode()).hexdigest()[:16]}"
    with explained(registry, f"The accelerated model '{name}'"), tempfile.TemporaryDirectory() as scratch:
        if version := _registered(registry, name, alias, package_arn):
            log.info("%s version %s is this release's already", name, version)
            return version
        folder = Path(scratch) / "model"
        save(folder, origin, kernel, backend=backend, kv_cache_dtype=kv_cache_dtype)
        client.log_artifacts(origin["run_id"], str(folder), folder_in_run)
        source = f"{client.get_run(origin['run_id']).info.artifact_uri}/{folder_in_run}"
        _ensure_model(client, name)
        version = str(client.create_model_version(name, source, origin["run_id"]).version)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, registry.tag_key(key), value)
        client.set_registered_model_alias(name, alias, version)
    log.info("registered %s version %s, alias %s", name, version, alias)
    return version


def save(folder: Path, origin: dict[str, Any], kernel: Path, *, backend: str, kv_cache_dtype: str) -> None:
    """Write the MLflow model folder (arguments as of register)."""
    import mlflow

    checkpoint = origin["checkpoint"]
    inside = "" if checkpoint == "." else f"{checkpoint}/"
    named = origin["name"] != NONE and origin["version"] != NONE
    weights = f"models:/{origin['name']}/{origin['version']}" if named else origin["model_uri"]
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name("accelerated_model.py")),
        artifacts={"kernel": str(kernel)},
        code_paths=[str(_ROOT / "kernels"), str(_ROOT / "container")],
        model_config={
            "weights_uri": weights,
            "checkpoint": checkpoint,
            "files": [file for file in origin["files"] if file["path"].startswith(inside)],
            "backend": backend,
            "kv_cache_dtype": kv_cache_dtype,
        },
        signature=signature(),
        pip_requirements=_requirements(),
        metadata={"mla_weights": weights, "mla_kernel_backend": backend},
    )


def signature() -> Any:
    """Of AcceleratedModel.predict, whatever the weights' own model had: column "prompt" -> text.

    Unity Catalog takes no model without one; mlflow hands predict only the parameters that are named here.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec("max_new_tokens", "long", 32),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("top_k", "long", 0),
        ParamSpec("seed", "long", 0),
    ]
    return ModelSignature(
        Schema([ColSpec("string", "prompt")]), Schema([ColSpec("string")]), ParamSchema(params)
    )


def _registered(registry: Registry, name: str, alias: str, package_arn: str) -> str:
    """The version that `alias` names, if it is of this release; else ""."""
    from mlflow.exceptions import MlflowException

    try:
        found = registry.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error_code(error)[0] not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        return ""
    return str(found.version) if found.tags.get(registry.tag_key(PACKAGE_TAG)) == package_arn else ""


def _requirements() -> list[str]:
    from importlib import metadata

    versions = image_versions()
    pinned = [f"{name}=={versions[name]}" for name in _NEEDED if name in versions]
    return [f"mlflow=={metadata.version('mlflow')}", *pinned]


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
