"""The JSON of requests: OpenAI completions and chat, and MLflow's scoring format."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from container.serving.generation import GenerationDefaults
from container.serving.sequence import BadRequest, Sampling

MAX_PROMPTS = 64
# Lists stop at their first fault: to name a million of them takes ten seconds, in which nobody is served.
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
MLFLOW_FORMS = ("inputs", "instances", "dataframe_split", "dataframe_records")
UNSUPPORTED_CODE = "unsupported_parameter"  # as OpenAI has it
# Fields that would change the answer, which this server does not have, and their values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
}


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Request(BaseModel):
    """Fields that completions and chat share. Unknown fields are ignored, as clients send many, but not those
    that ask for another answer."""

    model_config = ConfigDict(extra="ignore")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = None
    max_tokens: StrictInt | None = None
    temperature: float | None = Field(None, allow_inf_nan=False)
    top_p: float | None = Field(None, allow_inf_nan=False)
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | Texts | None = None
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
                seed=None if self.seed is None else _counted(self.seed, index),
                stop=tuple(stop),
                logprobs=self.wanted_logprobs(),
                ignore_eos=self.ignore_eos,
            )

        return [one(i) for i in range(prompts * self.n)]


def _counted(seed: int, index: int) -> int:
    """seed + index; the last 64-bit number is followed by the first one."""
    return seed + index if seed + index < 1 << 63 or seed >= 1 << 63 else seed + index - (1 << 64)


class CompletionRequest(Request):
    unsupported = {**UNSUPPORTED, "best_of": (1,), "echo": (False,), "suffix": ("",)}

    prompt: (
        StrictStr
        | Ids
        | Annotated[Texts, Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: StrictInt | None = None

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def characters(self) -> int:
        """Length of the text to tokenize."""
        return sum(len(prompt) for prompt in self.prompts() if isinstance(prompt, str))

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
    content: StrictStr | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Any = None

    @property
    def characters(self) -> int:
        content = self.content or ""
        return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)

    def plain(self) -> dict[str, str]:
        """Role and text. Raises BadRequest where there is none, or a tool was called."""
        content = self.content
        if self.tool_calls:
            raise BadRequest("messages with tool_calls are not supported here", "messages", UNSUPPORTED_CODE)
        if content is None:
            raise BadRequest(f"the message of role {self.role!r} has no content", "messages")
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    unsupported = {
        **UNSUPPORTED,
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"], []),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None

    def model_post_init(self, _: Any) -> None:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens

    @property
    def characters(self) -> int:
        """Length of the text to tokenize."""
        return sum(m.characters for m in self.messages)

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
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
    stop: Texts = []


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises BadRequest; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise BadRequest(f"the body holds {constant}, which is not JSON", code="invalid_json")

    try:
        text = body.decode(json.detect_encoding(body))
        value = json.loads(text, parse_constant=refuse)
        if "\\ud" in text.lower():  # an escape of half a character: nothing can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body is {type(value).__name__}, expected a JSON object", code="invalid_json")
    return value


def parse(kind: type[BaseModel], value: dict[str, Any]) -> Any:
    """A validated request. Raises BadRequest naming the first field that is wrong or not supported."""
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [str(part) for part in first["loc"]]
        where = path[0] if path else None
        raise BadRequest(f"{'.'.join(path) or 'body'}: {first['msg']}", where) from None
    for name, neutral in getattr(kind, "unsupported", {}).items():
        if value.get(name) is not None and value[name] not in neutral:
            raise BadRequest(f"{name} is not supported here; leave it out", name, UNSUPPORTED_CODE)
    return request


def mlflow_request(value: dict[str, Any]) -> CompletionRequest:
    """A completion of the prompts in `inputs`, `instances`, `dataframe_split` or `dataframe_records`.

    A table gives its column "prompt", or its only column. Raises BadRequest.
    """
    params = parse(Params, value.get("params") or {})
    form = next(k for k in MLFLOW_FORMS if k in value)
    fields = params.model_dump(exclude={"max_new_tokens"})
    if params.max_tokens is None:
        fields["max_tokens"] = params.max_new_tokens
    return parse(CompletionRequest, {**fields, "prompt": _mlflow_prompts(form, value[form])})


def _mlflow_prompts(form: str, data: Any) -> list[Any]:
    if form == "dataframe_split":
        data = _rows(data)
    if isinstance(data, dict):
        data = _prompt_of(form, data)
    prompts = [data] if isinstance(data, str) else data
    if not isinstance(prompts, list) or not prompts:
        raise BadRequest(f"{form} holds no prompts, expected a list of texts", form)
    return [_prompt_of(form, row) if isinstance(row, dict) else row for row in prompts]


def _rows(table: Any) -> list[dict[str, Any]]:
    columns, rows = (table.get(k) if isinstance(table, dict) else None for k in ("columns", "data"))
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise BadRequest("dataframe_split needs the lists 'columns' and 'data'", "dataframe_split")
    if not all(isinstance(column, str) for column in columns):
        raise BadRequest("dataframe_split: the names in 'columns' must be texts", "dataframe_split")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise BadRequest(
            f"dataframe_split: every row of 'data' must be a list of {len(columns)} values, one a column",
            "dataframe_split",
        )
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _prompt_of(form: str, row: dict[str, Any]) -> Any:
    if "prompt" not in row and len(row) != 1:
        raise BadRequest(f"{form} has the columns {sorted(row)}, expected 'prompt' or only one", form)
    return row["prompt"] if "prompt" in row else next(iter(row.values()))
