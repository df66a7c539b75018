"""provenance.json: what was pulled, from where, and what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from container.serving.checkpoint import ModelConfig, NotMlaModel, find_checkpoint
from steps.job import StepError, redact
from steps.registry.access import Registry, ResolvedModel
from steps.registry.partial import Downloaded
from steps.registry.requirements import Row

SCHEMA_VERSION = 1
NONE = "-"  # JsonGet reads these fields, and CustomerMetadataProperties take no empty value
_EXAMPLE_LIMIT = 64 << 10  # bytes of an input example worth carrying along
_MLMODEL_LIMIT = 8 << 20  # bytes; parsing a megabyte of YAML takes seconds


def read_mlmodel(folder: Path) -> dict[str, Any]:
    """The MLmodel file of a model folder. Raises StepError when there is none or it is malformed."""
    path = folder / "MLmodel"
    try:
        if (size := path.stat().st_size) > _MLMODEL_LIMIT:
            raise StepError(f"MLmodel has {size} bytes.", "Log the model again, with a smaller signature.")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StepError(
            "The folder holds no file MLmodel, so it is no MLflow model.",
            "Name the folder that log_model wrote (runs:/RUN_ID/NAME) or a registered model.",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise StepError(f"MLmodel is no YAML: {error}.", "Log the model again.") from None
    if not isinstance(document, dict) or not isinstance(document.get("flavors"), dict):
        raise StepError("MLmodel names no flavors.", "Log the model again with mlflow 2 or newer.")
    return document


def describe_model(folder: Path) -> dict[str, Any]:
    """The part of provenance.json that the model folder itself tells.

    Returns:
        the keys signature, flavors, requirements, input_example, checkpoint and mla.

    Raises:
        StepError: no MLflow model, or no MLA model, with the reason.
    """
    document = read_mlmodel(folder)
    try:
        checkpoint = find_checkpoint(folder)
        config = ModelConfig.from_folder(checkpoint)
    except NotMlaModel as error:
        flavor = _dict(document["flavors"].get("transformers"))
        if "source_model_revision" in flavor and "model_binary" not in flavor:
            raise StepError(
                f"The model has no weights, only a reference to {flavor.get('source_model_name')} "
                "(logged with save_pretrained=False).",
                "Call mlflow.transformers.persist_pretrained_model on it, or log it with its weights.",
            ) from error
        reason = str(error).replace(f"{folder}/", "").replace(str(folder), "the model").rstrip(".")
        raise StepError(
            f"This is no multi-head latent attention model that the engine runs: {reason}.",
            "Name a model of DeepSeek-V2 or V3 form whose config.json has kv_lora_rank and qk_rope_head_dim.",
        ) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:  # a value of an unforeseen type
        raise StepError(
            f"The checkpoint's config.json or generation_config.json cannot be understood: {error}.",
            "Compare it with that of a published DeepSeek-V2 or V3 model; log the model again.",
        ) from error
    return {
        "signature": _plain(document.get("signature")),
        "flavors": sorted(map(str, document["flavors"])),
        "requirements": _requirements(folder),
        "input_example": _input_example(folder, document),
        "checkpoint": checkpoint.relative_to(folder).as_posix(),
        "mla": {
            "architecture": config.architecture,
            "num_attention_heads": config.num_attention_heads,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "num_hidden_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "dtype": config.dtype,
        },
    }


def provenance(
    registry: Registry,
    model: ResolvedModel,
    description: dict[str, Any],
    files: Sequence[Downloaded],
    parity: Sequence[Row] = (),
) -> dict[str, Any]:
    """The document of provenance.json; `parity` is the comparison of the requirements with the image."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model_uri": model.uri.text,
        "tracking_uri": registry.tracking_uri,
        "registry_uri": registry.registry_uri,
        "name": model.name or NONE,
        "version": model.version or NONE,
        "alias": model.alias or NONE,
        "run_id": model.run_id or NONE,
        "source": redact(model.source) or NONE,
        "route": model.store.describe,
        **description,
        "requirement_parity": [asdict(row) for row in parity],
        "files": [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files],
        "total_bytes": sum(file.bytes for file in files),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _requirements(folder: Path) -> list[str]:
    path = folder / "requirements.txt"
    if not path.is_file():
        return []
    lines = (line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return [
        redact(line) for line in lines if line and not line.startswith("#")
    ]  # an index may have a password


def _input_example(folder: Path, document: dict[str, Any]) -> Any:
    name = _dict(document.get("saved_input_example_info")).get("artifact_path")
    path = (folder / str(name)).resolve()
    inside = path.is_relative_to(folder.resolve())
    if not name or not inside or not path.is_file() or path.stat().st_size > _EXAMPLE_LIMIT:
        return None
    try:
        return _plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        return None  # another format than JSON: the example is an aid, not part of the model


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: YAML knows dates, Python's JSON NaN. None when it cannot."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except ValueError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
