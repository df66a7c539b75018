"""An MLflow pyfunc from code: the released weights, by reference, served with the kernel that was measured.

The model folder holds the compiled kernel (artifact "kernel") and this project's code; its configuration says
where the weights are and what they are: {"weights_uri", "checkpoint", "files": [{"path", "bytes", "sha256"}],
"backend", "kv_cache_dtype"}. They are fetched once a machine, checked, and kept.

Environment: MLA_WEIGHTS names a folder that has the weights already (a Unity Catalog volume, say),
MLA_WEIGHTS_CACHE the folder to keep them in, MLA_KERNEL_BACKEND another backend than the measured one.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

DEFAULTS = {"max_new_tokens": 32, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}


class AcceleratedModel(PythonModel):
    """Completes texts with the inference engine and the kernel that was released with these weights."""

    def load_context(self, context: PythonModelContext) -> None:
        from container.serving.pyfunc import EngineGenerator

        config = context.model_config
        self._generator = EngineGenerator(
            str(weights(config) / config["checkpoint"]),
            kernel_dir=context.artifacts["kernel"],
            backend=os.environ.get("MLA_KERNEL_BACKEND") or config["backend"],
            kv_cache_dtype=config["kv_cache_dtype"],
        )

    def predict(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One completion for each prompt: a column "prompt", a list of texts, or one text."""
        return self._generator.generate(prompts(model_input), **DEFAULTS | (params or {}))

    def predict_stream(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """The completion of the first prompt, piece by piece."""
        yield from self._generator.stream(prompts(model_input)[0], **DEFAULTS | (params or {}))


def prompts(model_input: Any) -> list[str]:
    """The texts of a data frame, a dictionary, a list, or a single text.

    Raises:
        ValueError: naming the row that holds none, as a table's null or an empty cell does.
    """
    if isinstance(model_input, str):
        column: Any = [model_input]
    elif isinstance(model_input, list):
        column = [row["prompt"] if isinstance(row, dict) else row for row in model_input]
    else:
        column = model_input["prompt"] if "prompt" in model_input else model_input[next(iter(model_input))]
    texts = [column] if isinstance(column, str) else list(column)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise ValueError(f"row {row} holds {text!r} where a prompt of at least one character belongs")
    return texts


def weights(config: dict[str, Any]) -> Path:
    """The model folder that holds the weights, checked against the hashes that were released.

    Raises:
        RuntimeError: the files there are not the released ones.
    """
    if given := os.environ.get("MLA_WEIGHTS"):
        check(Path(given), config["files"])
        return Path(given)
    base = Path(os.environ.get("MLA_WEIGHTS_CACHE") or Path.home() / ".cache" / "mla-pipeline" / "weights")
    key = hashlib.sha256(json.dumps(config["files"], sort_keys=True).encode()).hexdigest()[:32]
    folder = base / key
    base.mkdir(parents=True, exist_ok=True)
    with _alone(base / f"{key}.lock") as alone:
        if folder.is_dir():
            return folder
        for left in base.glob(f".{key}-*") if alone else ():  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=base, prefix=f".{key}-"))
        try:
            local = mlflow.artifacts.download_artifacts(
                config["weights_uri"], dst_path=str(scratch / "model")
            )
            check(Path(local), config["files"])
            try:
                Path(local).rename(folder)
            except OSError:  # without a lock, another process on this machine may be faster
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Let one process of this machine in at a time; True unless the file system knows no locks.

    Spark starts a worker a core, and each loads the model: the weights come once.
    """
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def check(folder: Path, files: list[dict[str, Any]]) -> None:
    """Compare every file of `files` below `folder` with its size and SHA-256. Raises RuntimeError."""
    for file in files:
        path = folder / file["path"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise RuntimeError(
                f"{path} is missing or has another size than the released {file['bytes']} bytes"
            )
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != file["sha256"]:
            raise RuntimeError(f"{path} has SHA-256 {actual}, released was {file['sha256']}")


mlflow.models.set_model(AcceleratedModel())
