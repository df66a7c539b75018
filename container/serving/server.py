"""The endpoint over HTTP: SageMaker's /ping and /invocations, OpenAI's /v1 routes, /metrics."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from container.serving import protocol
from container.serving.base_engine import BaseEngine
from container.serving.loop import EngineLoop, Overloaded, Stopped, Stream
from container.serving.metrics import Metrics
from container.serving.protocol import Answer, ChatRequest, CompletionRequest, error_body
from container.serving.sequence import BadRequest, Step
from container.serving.settings import ServerSettings
from container.serving.tokenizer import TokenizerMissing

log = logging.getLogger(__name__)
MLFLOW_FORMS = {"inputs", "instances", "dataframe_split", "dataframe_records"}


class TooLarge(ValueError):
    """The body exceeds the limit."""


class WrongType(ValueError):
    """The body is not declared to be JSON."""


class NotReady(RuntimeError):
    """The model is still loading."""


class GenerationFailed(RuntimeError):
    """The engine gave up on a request: its logits were not finite, or a step raised."""


class Serving:
    """The application's state: nothing, then an engine that has generated its first token."""

    def __init__(self, settings: ServerSettings, load: Callable[[ServerSettings], BaseEngine]):
        self.settings, self._load = settings, load
        self.metrics = Metrics()
        self.loop: EngineLoop | None = None
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._start, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _start(self) -> None:
        try:
            engine = self._load(self.settings)
            warm = engine.generate([[0]], max_tokens=1)[0]
            if warm.finish_reason == "error":
                raise GenerationFailed("the warm-up token could not be generated; see the log above")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("the model cannot be served: %s", self.failure)
            self.on_failure()
            return
        loop = EngineLoop(engine, self.metrics, self.settings.max_queue)
        loop.start()
        self.metrics.observe(engine)
        self.loop = loop
        log.info("ready: one token generated with backend %s", engine.backend)

    def stop(self) -> None:
        if self.loop is not None:
            self.loop.stop()


def create_app(settings: ServerSettings, load: Callable[[ServerSettings], BaseEngine]) -> FastAPI:
    """The application; `load` builds the engine on a thread of its own while /ping answers 503."""
    serving = Serving(settings, load)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        reporter = asyncio.create_task(_report(serving))
        yield
        reporter.cancel()
        serving.stop()

    app = FastAPI(title="MLA model server", lifespan=lifespan, openapi_url=None)
    app.state.serving = serving
    app.add_middleware(CountResponses, metrics=serving.metrics)
    _add_errors(app)

    @app.get("/ping")
    async def ping() -> Response:
        ready = serving.loop is not None and not serving.loop.failed
        return JSONResponse(
            {"status": "ready" if ready else serving.failure or "loading"}, 200 if ready else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(serving.metrics.prometheus(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        card = {"id": settings.model_name, "object": "model", "owned_by": "mla-pipeline"}
        return JSONResponse({"object": "list", "data": [card]})

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        value = await _body(request, settings.max_body_bytes)
        if "messages" in value:
            return await _answer(serving, request, protocol.parse(ChatRequest, value))
        if "prompt" in value:
            return await _answer(serving, request, protocol.parse(CompletionRequest, value))
        if value.keys() & MLFLOW_FORMS:
            return await _predictions(serving, request, protocol.mlflow_request(value))
        raise BadRequest(f"the body needs prompt, messages or one of {', '.join(sorted(MLFLOW_FORMS))}")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        value = await _body(request, settings.max_body_bytes)
        return await _answer(serving, request, protocol.parse(CompletionRequest, value))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        value = await _body(request, settings.max_body_bytes)
        return await _answer(serving, request, protocol.parse(ChatRequest, value))

    return app


STATUSES: dict[type[Exception], tuple[int, str]] = {
    BadRequest: (400, "invalid_request_error"),
    TokenizerMissing: (400, "invalid_request_error"),
    TooLarge: (413, "invalid_request_error"),
    WrongType: (415, "invalid_request_error"),
    Overloaded: (503, "overloaded_error"),
    NotReady: (503, "not_ready_error"),
    Stopped: (503, "not_ready_error"),
    GenerationFailed: (500, "server_error"),
}


def _add_errors(app: FastAPI) -> None:
    """Every error becomes JSON of one form."""

    async def known(_: Request, error: Exception) -> Response:
        status, kind = STATUSES[type(error)]
        body = error_body(str(error), kind, getattr(error, "param", None), getattr(error, "code", None))
        headers = {"Retry-After": str(getattr(error, "retry_after", 5))} if status == 503 else None
        return JSONResponse(body, status, headers)

    for error in STATUSES:
        app.add_exception_handler(error, known)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(error_body(f"internal error: {type(error).__name__}", "server_error"), 500)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        text = f"{request.method} {request.url.path} is not served here"
        return JSONResponse(error_body(text, "invalid_request_error"), status)


class CountResponses:
    """ASGI middleware that counts responses by path and status; it adds nothing to a stream's parts."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.response("other" if status == 404 else scope["path"], status)
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _body(request: Request, limit: int) -> dict[str, Any]:
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongType(f"content type {kind} is not accepted, send application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body is over {limit} bytes; send a shorter prompt")
        parts.append(part)
    return protocol.parse_json(b"".join(parts))


def _submit(serving: Serving, request: CompletionRequest | ChatRequest) -> list[Stream]:
    if serving.loop is None:
        raise NotReady("the model is still loading" if not serving.failure else serving.failure)
    if request.model is not None and request.model != serving.settings.model_name:
        raise BadRequest(
            f"model {request.model!r} is not served here, it is {serving.settings.model_name!r}", "model"
        )
    tokenizer = serving.loop.engine.tokenizer
    if isinstance(request, ChatRequest):
        prompts: list[str | list[int]] = [tokenizer.chat_prompt([m.plain() for m in request.messages])]
    else:
        prompts = request.prompts()
    if not 1 <= len(prompts) * request.n <= protocol.MAX_PROMPTS:
        raise BadRequest(
            f"{len(prompts)} prompts times n={request.n}, expected 1..{protocol.MAX_PROMPTS}", "prompt"
        )
    copies = [prompt for prompt in prompts for _ in range(request.n)]
    return serving.loop.submit(copies, request.samplings(len(prompts)))


async def _answer(serving: Serving, http: Request, request: CompletionRequest | ChatRequest) -> Response:
    streams = _submit(serving, request)
    assert serving.loop is not None
    tokenizer, chat = serving.loop.engine.tokenizer, isinstance(request, ChatRequest)
    answer = Answer(chat, serving.settings.model_name, tokenizer, request.return_token_ids)
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        return StreamingResponse(_events(answer, streams, with_usage), media_type="text/event-stream")
    await _collect(http, streams)
    return JSONResponse(answer.whole([s.sequence for s in streams]))


async def _predictions(serving: Serving, http: Request, request: CompletionRequest) -> Response:
    streams = _submit(serving, request)
    await _collect(http, streams)
    return JSONResponse({"predictions": [s.sequence.detokenizer.text for s in streams]})


async def _collect(http: Request, streams: list[Stream]) -> None:
    """Waits for all streams. A client that goes away cancels them; a failed one fails the request."""

    async def run(stream: Stream) -> None:
        async with stream:
            async for _ in stream:
                pass

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work: asyncio.Future[Any] = asyncio.gather(*(run(stream) for stream in streams))
    watch: asyncio.Future[Any] = asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
    for stream in streams:
        if stream.sequence.finish_reason == "error":
            raise GenerationFailed(stream.sequence.error or "generation failed")


async def _events(answer: Answer, streams: list[Stream], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of all streams as they come, then [DONE]."""
    merged: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()

    async def forward(index: int, stream: Stream) -> None:
        async for step in stream:
            merged.put_nowait((index, step))

    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(stream)
        tasks = [asyncio.create_task(forward(i, s)) for i, s in enumerate(streams)]
        stack.callback(lambda: [task.cancel() for task in tasks])
        open_streams = len(streams)
        unsent = [0] * len(streams)  # tokens whose text was held back
        while open_streams:
            index, step = await merged.get()
            unsent[index] += step.token_id is not None
            if step.finish_reason == "error":
                body = error_body(step.sequence.error or "generation failed", "server_error")
                yield f"data: {json.dumps(body)}\n\n"
            elif step.text or step.finish_reason or answer.token_ids:
                event = answer.chunk(index, step.sequence, step.text, unsent[index], step.finish_reason)
                unsent[index] = 0
                yield f"data: {json.dumps(event)}\n\n"
            open_streams -= step.finish_reason is not None
        if with_usage:
            yield f"data: {json.dumps(answer.final_usage([s.sequence for s in streams]))}\n\n"
        yield "data: [DONE]\n\n"


async def _report(serving: Serving) -> None:
    """Writes the figures as embedded-metric lines, which CloudWatch turns into metrics."""
    while True:
        await asyncio.sleep(serving.settings.emf_seconds)
        print(serving.metrics.embedded(serving.settings.model_name), flush=True)
