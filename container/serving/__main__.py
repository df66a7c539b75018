"""`python -m container.serving` (an image's `serve`): the model server on SageMaker's port until SIGTERM."""

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

# Before torch loads OpenMP: its threads otherwise spin at every barrier for milliseconds, which on shared
# cores made a decode step of a small model 40 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import uvicorn

from container.serving.base_engine import BaseEngine
from container.serving.engine import Engine, Options
from container.serving.kernel_download import download_kernel
from container.serving.server import create_app
from container.serving.settings import ServerSettings, SettingsError
from container.serving.vllm_engine.arguments import VllmOptions
from container.serving.vllm_engine.engine import VllmEngine

DRAIN_SECONDS = 23  # to be gone 25 s after SIGTERM; SageMaker kills after 30
FINISH_SECONDS = 20  # of these for what is under way; after them it is told that the server stops
# Longer than a client's pool keeps a connection: a server that closes first may close on a request just sent.
KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048  # connections that wait to be accepted, uvicorn's own number


def load(settings: ServerSettings) -> BaseEngine:
    """The engine that the settings describe; downloads the kernel first when they say where from."""
    kernel_dir = settings.kernel_dir
    if settings.kernel_s3_uri:
        kernel_dir = Path(tempfile.mkdtemp(prefix="mla-kernel-"))
        download_kernel(settings.kernel_s3_uri, kernel_dir, settings.kernel_sha256)
    if settings.engine == "vllm":
        return VllmEngine.load(
            settings.model_dir,
            kernel_dir,
            backend=settings.backend,
            kv_cache_dtype=settings.kv_cache_dtype,
            options=VllmOptions(
                max_batch=settings.max_batch,
                max_model_len=settings.max_model_len,
                cache_tokens=settings.cache_tokens,
                tensor_parallel=settings.tensor_parallel,
                pipeline_parallel=settings.pipeline_parallel,
            ),
        )
    return Engine.load(
        settings.model_dir,
        kernel_dir,
        backend=settings.backend,
        kv_cache_dtype=settings.kv_cache_dtype,
        options=Options(
            max_batch=settings.max_batch,
            step_tokens=settings.step_tokens,
            max_model_len=settings.max_model_len,
            cache_tokens=settings.cache_tokens,
            num_threads=settings.num_threads,
        ),
    )


class Server(uvicorn.Server):
    """uvicorn's, which tells the clients of what does not end in time before it closes their connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        serving = self.config.app.state.serving  # type: ignore[union-attr]  # create_app's
        asyncio.get_running_loop().call_later(FINISH_SECONDS, serving.interrupt)
        await super().shutdown(sockets)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket on the settings' address. Raises SettingsError when it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
            "end what uses the port, or set SAGEMAKER_BIND_TO_PORT and MLA_HOST"
        ) from None


def main() -> int:
    """Serves until a signal. Returns 0, or 1 when the settings, the port or the model cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = ServerSettings.from_environment(os.environ)
        listening = listen(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    app = create_app(settings, load)
    config = uvicorn.Config(
        app,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        access_log=False,
        log_config=None,
    )
    server = Server(config)

    def leave(*_: object) -> None:
        server.should_exit = True

    # uvicorn drains on a signal and then raises it again for the handler that was there before
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, leave)
    serving = app.state.serving
    serving.on_failure = leave
    server.run(sockets=[listening])
    if serving.failure:
        print(f"error: {serving.failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
