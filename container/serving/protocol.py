"""The JSON of requests and answers: OpenAI completions and chat, and MLflow's scoring format."""

import json
import random
import time
from collections.abc import Sequence as Many
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from container.serving.generation import GenerationDefaults
from container.serving.sequence import BadRequest, Logprob, Sampling, Sequence
from container.serving.tokenizer import Tokenizer

Ids = list[StrictInt]
MAX_PROMPTS = 64


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Request(BaseModel):
    """Fields that completions and chat share. Unknown fields are ignored, as clients send many."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: StrictInt | None = None
    temperature: float | None = Field(None, allow_inf_nan=False)
    top_p: float | None = Field(None, allow_inf_nan=False)
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    n: StrictInt = Field(1, ge=1, le=16)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    return_token_ids: StrictBool = False

    def wanted_logprobs(self) -> int | None:
        return None

    def samplings(self, prompts: int, defaults: GenerationDefaults) -> list[Sampling]:
        """One for each of n completions of each prompt; with a seed each gets its own, counted up from it.

        What the request does not say, the checkpoint's generation_config.json says, and after it Sampling.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        chosen = {}
        for name in ("max_tokens", "temperature", "top_k", "top_p"):
            value = getattr(self, name)
            value = getattr(defaults, name) if value is None else value
            if value is not None:
                chosen[name] = value

        def one(index: int) -> Sampling:
            return Sampling(
                **chosen,
                fit=self.max_tokens is None,
                seed=None if self.seed is None else self.seed + index,
                stop=tuple(stop),
                logprobs=self.wanted_logprobs(),
                ignore_eos=self.ignore_eos,
            )

        return [one(i) for i in range(prompts * self.n)]


class CompletionRequest(Request):
    prompt: StrictStr | Ids | list[StrictStr] | list[Ids]
    logprobs: StrictInt | None = None

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    role: StrictStr
    content: StrictStr | list[TextPart]

    def plain(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None

    def model_post_init(self, _: Any) -> None:
        self.max_tokens = self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Params(BaseModel):
    """`params` of MLflow's scoring format, as the model's signature names them."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: StrictInt = 32
    max_tokens: StrictInt | None = None
    temperature: float = Field(0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, allow_inf_nan=False)
    top_k: StrictInt = 0
    seed: StrictInt | None = None
    stop: list[StrictStr] = []


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises BadRequest; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise BadRequest(f"the body holds {constant}, which is not JSON", code="invalid_json")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {type(value).__name__}, expected a JSON object", code="invalid_json")
    return value


def parse(kind: type[BaseModel], value: dict[str, Any]) -> Any:
    """A validated request. Raises BadRequest naming the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [str(part) for part in first["loc"]]
        where = path[0] if path else None
        raise BadRequest(f"{'.'.join(path) or 'body'}: {first['msg']}", where) from None


def mlflow_request(value: dict[str, Any]) -> CompletionRequest:
    """A completion of the prompts in `inputs`, `instances`, `dataframe_split` or `dataframe_records`.

    A table gives its column "prompt", or its only column. Raises BadRequest.
    """
    params = parse(Params, value.get("params") or {})
    form = next(k for k in ("inputs", "instances", "dataframe_split", "dataframe_records") if k in value)
    data = value[form]
    if form == "dataframe_split":
        if not isinstance(data, dict) or not {"columns", "data"} <= data.keys():
            raise BadRequest("dataframe_split needs 'columns' and 'data'", form)
        data = [dict(zip(data["columns"], row, strict=False)) for row in data["data"]]
    if isinstance(data, dict):
        data = next(iter(data.values())) if len(data) == 1 else data.get("prompt")
    prompts = [data] if isinstance(data, str) else data
    if not isinstance(prompts, list) or not prompts:
        raise BadRequest(f"{form} holds no prompts, expected a list of texts", form)
    if isinstance(prompts[0], dict):
        prompts = [row.get("prompt", next(iter(row.values()), None)) for row in prompts]
    fields = params.model_dump(exclude={"max_new_tokens"})
    return parse(
        CompletionRequest,
        {**fields, "prompt": prompts, "max_tokens": params.max_tokens or params.max_new_tokens},
    )


class Answer:
    """Builds the JSON of one request's answer, whole or in stream chunks."""

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer, token_ids: bool):
        self.chat, self.model, self.tokenizer, self.token_ids = chat, model, tokenizer, token_ids
        # not from the system's randomness: reading it lets go of the interpreter just when the engine starts
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(128):032x}"
        self.created = int(time.time())

    def whole(self, sequences: Many[Sequence]) -> dict[str, Any]:
        choices = []
        for index, s in enumerate(sequences):
            text = s.detokenizer.text
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["finish_reason"] = s.finish_reason
            choice["logprobs"] = self._logprobs(s.logprobs) if s.sampling.logprobs is not None else None
            if self.token_ids:
                choice["token_ids"] = s.output
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(sequences)}

    def chunk(
        self, index: int, sequence: Sequence, text: str, new: slice, reason: str | None
    ) -> dict[str, Any]:
        """A stream's event: `text` and the `new` of the tokens of sequence `index`."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": text} if text else {}
        else:
            choice["text"] = text
        choice["finish_reason"] = reason
        if sequence.sampling.logprobs is not None:
            choice["logprobs"] = self._logprobs(sequence.logprobs[new])
        if self.token_ids:
            choice["token_ids"] = sequence.output[new]
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice]}

    def final_usage(self, sequences: Many[Sequence]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(sequences)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: Many[Logprob]) -> dict[str, Any]:
        name = self.tokenizer.token
        if self.chat:
            content = [
                {
                    "token": name(e.token_id),
                    "logprob": e.logprob,
                    "top_logprobs": [{"token": name(t), "logprob": p} for t, p in e.top],
                }
                for e in entries
            ]
            return {"content": content}
        return {
            "tokens": [name(e.token_id) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{name(t): p for t, p in e.top} for e in entries],
        }


def usage(sequences: Many[Sequence]) -> dict[str, Any]:
    """Token counts; cached_tokens are prompt tokens whose latents were in the cache already."""
    prompt = sum(len(s.prompt) for s in sequences)
    completion = sum(len(s.output) for s in sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.reused for s in sequences)},
    }
