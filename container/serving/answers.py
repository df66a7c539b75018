"""From a parsed request to its response: queues the sequences and answers whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from container.serving import protocol
from container.serving.answer_json import Answer
from container.serving.errors import GenerationFailed, error_body
from container.serving.loop import EngineLoop, Stopped, Streams
from container.serving.protocol import ChatRequest, CompletionRequest
from container.serving.sequence import BadRequest

LONG_TEXT = 16_384  # characters, about 10 ms of tokenizing


async def answer(
    loop: EngineLoop, model: str, http: Request, request: CompletionRequest | ChatRequest
) -> Response:
    """OpenAI's JSON, or events of it when the request asks for a stream. `model` is the name served."""
    streams = await _submit(loop, model, request)
    chat = isinstance(request, ChatRequest)
    build = Answer(chat, model, loop.engine.tokenizer, request.n, request.return_token_ids)
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        return StreamingResponse(_events(build, streams, with_usage), media_type="text/event-stream")
    await _collect(loop, http, streams)
    return JSONResponse(build.whole(streams.sequences))


async def predictions(loop: EngineLoop, model: str, http: Request, request: CompletionRequest) -> Response:
    """MLflow's JSON: the text of every prompt."""
    streams = await _submit(loop, model, request)
    await _collect(loop, http, streams)
    return JSONResponse({"predictions": [s.detokenizer.text for s in streams.sequences]})


async def _submit(loop: EngineLoop, model: str, request: CompletionRequest | ChatRequest) -> Streams:
    if request.model is not None and request.model != model:
        raise BadRequest(f"model {request.model!r} is not served here, it is {model!r}", "model")
    count = 1 if isinstance(request, ChatRequest) else len(request.prompts())
    if not 1 <= count * request.n <= protocol.MAX_PROMPTS:
        raise BadRequest(f"{count} prompts times n={request.n}, expected 1..{protocol.MAX_PROMPTS}", "prompt")
    loop.check_room(count * request.n)
    prompts = await _token_ids(loop, request)
    copies = [prompt for prompt in prompts for _ in range(request.n)]
    return loop.submit(
        copies, request.samplings(count, loop.engine.config.generation), ends_only=not request.stream
    )


async def _token_ids(loop: EngineLoop, request: CompletionRequest | ChatRequest) -> list[list[int]]:
    """The request's prompts, tokenized; a long text in a thread, since streams and /ping wait meanwhile."""
    engine = loop.engine

    def work() -> list[list[int]]:
        if isinstance(request, ChatRequest):
            return [engine.tokenizer.chat_prompt([m.plain() for m in request.messages])]
        return [engine.encode(p) if isinstance(p, str) else p for p in request.prompts()]

    return await asyncio.to_thread(work) if request.characters > LONG_TEXT else work()


async def _collect(loop: EngineLoop, http: Request, streams: Streams) -> None:
    """Waits for all sequences. A client that goes away cancels them; a failed one fails the request."""

    async def leave_with_the_client() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        streams.leave()

    watch = asyncio.create_task(leave_with_the_client())
    try:
        async with streams:
            async for _ in streams:
                pass
    finally:
        watch.cancel()
    for sequence in streams.sequences:
        if sequence.finish_reason == "error":
            kind = Stopped if loop.stopping else GenerationFailed
            raise kind(sequence.error or "generation failed")


async def _events(build: Answer, streams: Streams, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of all sequences as they come, then [DONE]."""
    # tokens made and sent: the text of some is held back, and the sequence itself may be ahead of its steps
    made, sent = [0] * len(streams.sequences), [0] * len(streams.sequences)
    async with streams:
        async for index, step in streams:
            made[index] += step.token_id is not None
            if step.finish_reason == "error":
                body = error_body(step.sequence.error or "generation failed", "server_error")
                yield f"data: {json.dumps(body)}\n\n"
            elif step.text or step.finish_reason or build.token_ids:
                new = slice(sent[index], made[index])
                sent[index] = made[index]
                event = build.chunk(index, step.sequence, step.text, new, step.finish_reason)
                yield f"data: {json.dumps(event)}\n\n"
        if with_usage:
            yield f"data: {json.dumps(build.final_usage(streams.sequences))}\n\n"
        yield "data: [DONE]\n\n"
