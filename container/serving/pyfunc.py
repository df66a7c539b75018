"""The engine behind an MLflow pyfunc's predict and predict_stream, for batch jobs and spark_udf."""

from collections.abc import Iterator
from typing import Any

from container.serving.engine import Engine
from container.serving.sequence import Sampling


class EngineGenerator:
    """Completes texts with one engine per process. Compiled kernels come from the build cache.

    `params` are those of the model's signature: max_new_tokens, temperature, top_p, top_k, seed.
    """

    def __init__(self, folder: str, **load: Any):
        self._engine = Engine.load(folder, **load)

    def generate(self, prompts: list[str], **params: Any) -> list[str]:
        """One completion for each prompt, in one continuous batch.

        Raises BadRequest for a prompt that cannot be served, RuntimeError when a generation failed.
        """
        completions = self._engine.generate(prompts, **_sampling(params))
        for row, completion in enumerate(completions):
            if completion.finish_reason == "error":
                raise RuntimeError(f"prompt {row} could not be completed: {completion.error}")
        return [completion.text for completion in completions]

    def stream(self, prompt: str, **params: Any) -> Iterator[str]:
        """The completion's text as it is generated. Closing the iterator ends the generation.

        Raises as `generate` does, once what was generated has been given.
        """
        sequence = self._engine.add(prompt, Sampling(**_sampling(params)))
        sent = 0
        try:
            while sequence.finish_reason is None:
                self._engine.step()  # another thread's call may also have advanced this sequence
                text = sequence.detokenizer.released
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
            if sequence.finish_reason == "error":
                raise RuntimeError(f"the prompt could not be completed: {sequence.error}")
        finally:
            self._engine.abort(sequence)


def _sampling(params: dict[str, Any]) -> dict[str, Any]:
    fields = dict(params)
    fields["max_tokens"] = int(fields.pop("max_new_tokens", 32))
    return fields
