"""The server's settings, all from environment variables, since that is what SageMaker gives a container."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
KERNEL_S3_URI = "MLA_KERNEL_S3_URI"
MOST_THREADS = 1024  # OpenMP ends the process when the system gives it no more
ENGINES = ("native", "vllm")


class SettingsError(ValueError):
    """An environment variable holds a value that cannot be used; names both."""


@dataclass(frozen=True)
class ServerSettings:
    """Where model and kernels are, which backend to use, and the limits of a request and of the queue."""

    model_dir: Path
    kernel_dir: Path | None
    kernel_s3_uri: str | None = None  # where to download the kernel from; only without a folder
    kernel_sha256: str = ""
    engine: str = "native"
    tensor_parallel: int = 1  # of engine vllm
    pipeline_parallel: int = 1
    backend: str = "auto"
    kv_cache_dtype: str = "bfloat16"
    port: int = 8080
    host: str = "0.0.0.0"
    model_name: str = "mla"
    max_batch: int = 64
    max_queue: int = 256
    max_model_len: int | None = None
    cache_tokens: int | None = None
    step_tokens: int = 512
    num_threads: int | None = None
    max_body_bytes: int = 6 * MIB  # InvokeEndpoint's own limit
    emf_seconds: float = 60.0

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "ServerSettings":
        """Reads the MLA_* variables and SAGEMAKER_BIND_TO_PORT. Raises SettingsError."""
        root = Path(env.get("MLA_ML_ROOT") or "/opt/ml")
        named = env.get("MLA_KERNEL_DIR")
        kernels = Path(named) if named else root / "additional-model-data-sources" / "kernel"
        if named and not kernels.is_dir():
            raise SettingsError(f"MLA_KERNEL_DIR is {named}, which is not a folder")
        uri = env.get(KERNEL_S3_URI)
        if uri and not re.fullmatch(r"s3://[^/]+/.+", uri):
            raise SettingsError(f"{KERNEL_S3_URI} is {uri!r}, expected s3://bucket/prefix")

        def number(name: str, default: int | None, most: int | None = None) -> int | None:
            text = env.get(name)
            if not text:
                return default
            if not text.isascii() or not text.isdigit() or int(text) < 1:
                raise SettingsError(f"{name} is {text!r}, expected a positive whole number")
            if most is not None and int(text) > most:
                raise SettingsError(f"{name} is {text!r}, at most {most} is possible")
            return int(text)

        engine = env.get("MLA_ENGINE") or "native"
        if engine not in ENGINES:
            raise SettingsError(f"MLA_ENGINE is {engine!r}, expected {' or '.join(ENGINES)}")
        parallel = number("MLA_TENSOR_PARALLEL", 1) or 1, number("MLA_PIPELINE_PARALLEL", 1) or 1
        if engine == "native" and parallel != (1, 1):
            raise SettingsError(
                "MLA_TENSOR_PARALLEL and MLA_PIPELINE_PARALLEL belong to MLA_ENGINE=vllm; the native engine "
                "uses one GPU"
            )
        return cls(
            model_dir=root / "model",
            kernel_dir=kernels if kernels.is_dir() else None,
            kernel_s3_uri=uri if uri and not kernels.is_dir() else None,
            kernel_sha256=env.get("MLA_KERNEL_SHA256") or "",
            engine=engine,
            tensor_parallel=parallel[0],
            pipeline_parallel=parallel[1],
            backend=env.get("MLA_KERNEL_BACKEND") or "auto",
            kv_cache_dtype=env.get("MLA_KV_CACHE_DTYPE") or "bfloat16",
            port=number("SAGEMAKER_BIND_TO_PORT", cls.port, 65535) or cls.port,
            host=env.get("MLA_HOST") or "0.0.0.0",
            model_name=env.get("MLA_MODEL_NAME") or "mla",
            max_batch=number("MLA_MAX_BATCH", cls.max_batch) or cls.max_batch,
            max_queue=number("MLA_MAX_QUEUE", cls.max_queue) or cls.max_queue,
            max_model_len=number("MLA_MAX_MODEL_LEN", None),
            cache_tokens=number("MLA_CACHE_TOKENS", None),
            step_tokens=number("MLA_STEP_TOKENS", cls.step_tokens) or cls.step_tokens,
            num_threads=number("MLA_NUM_THREADS", None, MOST_THREADS),
        )
