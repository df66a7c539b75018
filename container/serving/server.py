"""The endpoint over HTTP: SageMaker's /ping and /invocations, OpenAI's /v1 routes, /metrics."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from container.serving import protocol
from container.serving.answers import answer, predictions
from container.serving.base_engine import BaseEngine
from container.serving.errors import HANDLERS, GenerationFailed, NotReady, TooLarge, WrongType
from container.serving.loop import EngineLoop
from container.serving.metrics import Metrics
from container.serving.protocol import ChatRequest, CompletionRequest
from container.serving.sequence import BadRequest
from container.serving.settings import ServerSettings

log = logging.getLogger(__name__)


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

    @property
    def ready(self) -> EngineLoop:
        """The engine's loop. Raises NotReady before there is one."""
        if self.loop is None:
            raise NotReady(self.failure or "the model is still loading")
        return self.loop

    def interrupt(self) -> None:
        """Fails what is still generated, so that its clients are told before their connections end."""
        if self.loop is not None:
            self.loop.interrupt()

    def stop(self) -> None:
        if self.loop is not None:
            self.loop.stop()


class Endpoint:
    """The handlers of the routes."""

    def __init__(self, serving: Serving):
        self._serving = serving
        self._model = serving.settings.model_name
        card = {"id": self._model, "object": "model", "owned_by": "mla-pipeline"}
        self._card = {**card, "created": int(time.time())}

    async def ping(self, _: Request) -> Response:
        serving = self._serving
        ready = serving.loop is not None and not serving.loop.failed
        return JSONResponse(
            {"status": "ready" if ready else serving.failure or "loading"}, 200 if ready else 503
        )

    async def metrics(self, _: Request) -> Response:
        text = self._serving.metrics.prometheus()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def one_model(self, http: Request) -> Response:
        if http.path_params["name"] != self._model:
            raise HTTPException(404)
        return JSONResponse(self._card)

    async def invocations(self, http: Request) -> Response:
        value = await self._body(http)
        if "messages" in value:
            return await self._answer(http, protocol.parse(ChatRequest, value))
        if "prompt" in value:
            return await self._answer(http, protocol.parse(CompletionRequest, value))
        if value.keys() & set(protocol.MLFLOW_FORMS):
            request = protocol.mlflow_request(value)
            return await predictions(self._serving.ready, self._model, http, request)
        raise BadRequest(f"the body needs prompt, messages or one of {', '.join(protocol.MLFLOW_FORMS)}")

    async def completions(self, http: Request) -> Response:
        return await self._answer(http, protocol.parse(CompletionRequest, await self._body(http)))

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, protocol.parse(ChatRequest, await self._body(http)))

    async def _answer(self, http: Request, request: CompletionRequest | ChatRequest) -> Response:
        return await answer(self._serving.ready, self._model, http, request)

    async def _body(self, http: Request) -> dict[str, Any]:
        kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json":
            raise WrongType(f"content type {kind} is not accepted, send application/json")
        limit = self._serving.settings.max_body_bytes
        # of a body that says its size nothing needs to come before it is refused
        parts, size = [], int(http.headers.get("content-length", 0))
        if size <= limit:
            size = 0
            async for part in http.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        if size > limit:
            raise TooLarge(f"the body is over {limit} bytes; send a shorter prompt")
        return protocol.parse_json(b"".join(parts))


def create_app(settings: ServerSettings, load: Callable[[ServerSettings], BaseEngine]) -> Starlette:
    """The application; `load` builds the engine on a thread of its own while /ping answers 503."""
    serving = Serving(settings, load)
    endpoint = Endpoint(serving)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        serving.start()
        reporter = asyncio.create_task(_report(serving))
        yield
        reporter.cancel()
        serving.stop()

    routes = [
        Route("/invocations", endpoint.invocations, methods=["POST"]),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/ping", endpoint.ping),
        Route("/metrics", endpoint.metrics),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{name:path}", endpoint.one_model),
    ]
    counted = Middleware(CountResponses, metrics=serving.metrics)
    app = Starlette(routes=routes, middleware=[counted], exception_handlers=HANDLERS, lifespan=lifespan)
    app.state.serving = serving
    return app


class CountResponses:
    """ASGI middleware that counts responses by path and status; it adds nothing to a stream's parts."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                # a path that nobody serves is whatever a client makes up
                self._metrics.response("other" if status in (404, 405) else scope["path"], status)
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _report(serving: Serving) -> None:
    """Writes the figures as embedded-metric lines, which CloudWatch turns into metrics."""
    while True:
        await asyncio.sleep(serving.settings.emf_seconds)
        print(serving.metrics.embedded(serving.settings.model_name), flush=True)
