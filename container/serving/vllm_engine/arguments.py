"""What vLLM is asked for: the checks before it starts, its arguments, and a request's sampling."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from container.serving.attention import PAGE
from container.serving.checkpoint import ModelConfig
from container.serving.sequence import Logprob, Sampling

VLLM = "0.23.0"  # its attention interface moves with every version
CACHE_DTYPES = ("bfloat16", "float16")
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class VllmOptions:
    """Sizes of a vLLM engine. None leaves a value to vLLM; the parallel sizes multiply to the GPUs used.

    extra: more fields of vLLM's EngineArgs, by name.
    """

    max_batch: int = 64
    max_model_len: int | None = None
    cache_tokens: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    extra: Mapping[str, Any] | None = None


def check_version() -> None:
    """Raises RuntimeError when vLLM is missing or another version than the backend is written for."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise RuntimeError(
            "engine: vllm, but vLLM is not installed; build the image with ENGINE=vllm, or install the "
            "extra vllm"
        ) from None
    if found.split("+")[0] != VLLM:
        raise RuntimeError(f"vLLM {found} is installed, the MLA backend is written for {VLLM}; install that")


def check_settings(config: ModelConfig, kv_cache_dtype: str, options: VllmOptions) -> None:
    """Raises ValueError for what this engine does not serve, naming the setting and the choice."""
    if config.dtype not in CACHE_DTYPES or kv_cache_dtype != config.dtype:
        raise ValueError(
            f"engine: vllm keeps the cache in the model's dtype, {' or '.join(CACHE_DTYPES)}; this model's "
            f"is {config.dtype}, KvCacheDtype {kv_cache_dtype}: make them equal, or serve with engine: native"
        )
    if config.num_attention_heads % options.tensor_parallel:
        raise ValueError(
            f"{config.num_attention_heads} heads cannot be split over {options.tensor_parallel} GPUs; "
            "choose a tensor_parallel that divides them"
        )


def process_environment(kernel: str, kernel_dir: Path | None, given: Mapping[str, str]) -> dict[str, str]:
    """Variables that vLLM's processes inherit; what is `given` already stays, except which kernel it is."""
    named = {"MLA_KERNEL_BACKEND": kernel} | ({"MLA_KERNEL_DIR": str(kernel_dir)} if kernel_dir else {})
    defaults = {
        # A fork of this process would copy the threads' locks of its web server, held or not.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # FlashInfer's sampler is compiled with nvcc by the first request that asks for top_k or top_p. An
        # endpoint's image has no nvcc; the error would end the engine for all requests.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    return named | {name: value for name, value in defaults.items() if name not in given}


def engine_arguments(checkpoint: Path, config: ModelConfig, options: VllmOptions) -> dict[str, Any]:
    """The fields of vLLM's EngineArgs. A page of the cache is the kernel's; vLLM sees no tokenizer."""
    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the checkpoint's: its sampling defaults are not the contract's
        "attention_backend": "CUSTOM",
        "block_size": PAGE,
        "kv_cache_dtype": "auto",
        "max_num_seqs": options.max_batch,
        "tensor_parallel_size": options.tensor_parallel,
        "pipeline_parallel_size": options.pipeline_parallel,
    }
    limits = [config.max_position_embeddings, options.max_model_len, options.cache_tokens]
    arguments["max_model_len"] = min(limit for limit in limits if limit)
    if options.cache_tokens:
        blocks = 1 + -(-options.cache_tokens // PAGE)  # vLLM's first one is its null block
        layers = -(-config.num_hidden_layers // options.pipeline_parallel)
        arguments["kv_cache_memory_bytes"] = blocks * PAGE * config.latent_dim * ELEMENT_BYTES * layers
        # Nothing is taken by this share any more; vLLM only looks whether it is free when it starts.
        arguments["gpu_memory_utilization"] = 0.1
    return arguments | dict(options.extra or {})


def sampling_arguments(sampling: Sampling, eos_token_ids: Collection[int]) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams; only token ids decide there when a request ends, never text."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "logprobs": sampling.logprobs,
        "ignore_eos": True,  # vLLM's own notion of it; ours are the stop tokens
        "stop_token_ids": [] if sampling.ignore_eos else sorted(eos_token_ids),
        "detokenize": False,
    }


def chosen_logprob(token: int, choices: Mapping[int, Any] | None, wanted: int | None) -> Logprob | None:
    """The Logprob of a token from vLLM's {token id: logprob and rank}; None when none was asked for."""
    if choices is None or wanted is None:
        return None
    ranked = sorted(choices.items(), key=lambda item: item[1].rank)
    top = tuple((other, entry.logprob) for other, entry in ranked if entry.rank <= wanted)
    return Logprob(token, choices[token].logprob, top)
