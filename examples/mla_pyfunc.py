"""The demo model as an MLflow pyfunc from code: completes texts with the checkpoint logged beside it.

With this repository installed, the inference engine and its compiled kernel do the work; elsewhere
transformers. Signature: column "prompt" (string) -> string; params max_new_tokens, temperature, top_p,
top_k, seed.
"""

from collections.abc import Iterator
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

DEFAULTS = {"max_new_tokens": 32, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}


class MlaModel(PythonModel):
    """Loads artifacts["checkpoint"], a Hugging Face DeepSeek-V3 folder."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = context.artifacts["checkpoint"]
        try:
            from container.serving.pyfunc import EngineGenerator
        except ModuleNotFoundError:
            self._generator: Any = TransformersGenerator(folder)
        else:
            self._generator = EngineGenerator(folder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One completion for each row's prompt."""
        return self._generator.generate(prompts_of(model_input), **{**DEFAULTS, **(params or {})})

    def predict_stream(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """The completion of the first prompt, piece by piece."""
        yield from self._generator.stream(prompts_of(model_input)[0], **{**DEFAULTS, **(params or {})})


def prompts_of(model_input: Any) -> list[str]:
    """The texts of a table's column "prompt", of a dictionary, a list or a single text."""
    if isinstance(model_input, str):
        return [model_input]
    if isinstance(model_input, pd.DataFrame | dict):
        column = model_input["prompt"]
        return [column] if isinstance(column, str) else list(column)
    return [row["prompt"] if isinstance(row, dict) else row for row in model_input]


class TransformersGenerator:
    """The same interface by transformers alone."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def generate(self, prompts: list[str], **params: Any) -> list[str]:
        return [self._one(prompt, **params) for prompt in prompts]

    def stream(self, prompt: str, **params: Any) -> Iterator[str]:
        yield self._one(prompt, **params)

    def _one(
        self, prompt: str, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
    ) -> str:
        import torch

        torch.manual_seed(seed)
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        tokens = self._tokenizer(prompt, return_tensors="pt").input_ids
        out = self._model.generate(tokens, max_new_tokens=max_new_tokens, **how)[0, tokens.shape[1] :]
        return str(self._tokenizer.decode(out, skip_special_tokens=True))


mlflow.models.set_model(MlaModel())
