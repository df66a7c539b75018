"""The serving engine as Evaluate uses it."""

from __future__ import annotations

from pathlib import Path

import torch

from container.serving.checkpoint import NotMlaModel
from container.serving.engine import Engine, Options
from container.serving.weights import WeightError
from kernels.backends import BackendError
from steps.job import StepError

# Evaluation serves one short sequence at a time; a cache for a full batch would only cost memory.
ENGINE_OPTIONS = Options(max_batch=1, cache_tokens=4096)


def load_engine(
    model_dir: Path, kernel_dir: Path, backend: str, kv_cache_dtype: str, device: torch.device
) -> Engine:
    """The engine that the endpoint runs, for one sequence. Raises StepError naming what cannot be loaded."""
    try:
        return Engine.load(
            model_dir,
            kernel_dir,
            backend=backend,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            options=ENGINE_OPTIONS,
        )
    except (WeightError, BackendError, NotMlaModel, ValueError) as error:
        raise StepError(
            f"The engine cannot load the model: {error}.", "Correct the model or KvCacheDtype."
        ) from error
