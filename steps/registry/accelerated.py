"""Register the accelerated model: an MLflow pyfunc with the compiled kernel, and the weights by reference.

A Databricks batch job or notebook that loads it runs the very kernel that was measured and released. The
weights stay where they are registered, so a 600 GB model is not stored twice.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from steps.job import StepError
from steps.registry.access import Registry
from steps.registry.errors import explained
from steps.registry.provenance import NONE
from steps.registry.requirements import image_versions

log = logging.getLogger("steps.accelerated")

ARTIFACT_FOLDER = "mla-release/accelerated"
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
    tags: dict[str, str],
) -> str:
    """Save, log to the training run and register the accelerated model.

    Args:
        registry: where.
        name: registered model to add a version to; created when it is new. Three levels in Unity Catalog.
        origin: provenance.json of the released weights.
        kernel: kernel artifact folder (index.json and the packages).
        backend, kv_cache_dtype: as measured.
        alias: set on the new version.
        tags: of the new version.

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
    with explained(registry, f"The accelerated model '{name}'"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(folder, origin, kernel, backend=backend, kv_cache_dtype=kv_cache_dtype)
        client.log_artifacts(origin["run_id"], str(folder), ARTIFACT_FOLDER)
        source = f"{client.get_run(origin['run_id']).info.artifact_uri}/{ARTIFACT_FOLDER}"
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
    from mlflow.models import ModelSignature

    checkpoint = origin["checkpoint"]
    inside = "" if checkpoint == "." else f"{checkpoint}/"
    named = origin["name"] != NONE and origin["version"] != NONE
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name("accelerated_model.py")),
        artifacts={"kernel": str(kernel)},
        code_paths=[str(_ROOT / "kernels"), str(_ROOT / "container")],
        model_config={
            "weights_uri": f"models:/{origin['name']}/{origin['version']}" if named else origin["model_uri"],
            "checkpoint": checkpoint,
            "files": [file for file in origin["files"] if file["path"].startswith(inside)],
            "backend": backend,
            "kv_cache_dtype": kv_cache_dtype,
        },
        signature=ModelSignature.from_dict(origin["signature"]) if origin.get("signature") else None,
        pip_requirements=_requirements(),
        metadata={"mla_weights": origin["model_uri"], "mla_kernel_backend": backend},
    )


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
