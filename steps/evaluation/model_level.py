"""The model level: the engine that will serve, against transformers with the same weights.

transformers shares no code with the engine: it expands keys and values from the latent at every step and
knows no page and no kernel. Agreement says that weights, rotation, routing, cache and kernel are right.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from container.serving.checkpoint import ModelConfig, find_checkpoint
from container.serving.engine import Engine
from steps.evaluation.schema import OUT_OF_BOUNDS, Milliseconds, ModelLevel, Smoke
from steps.job import StepError, log

PROMPTS = (
    "The assert statement is",
    "A class definition defines",
    "Strings are immutable sequences",
    "If the file cannot be opened,",
)
NEW_TOKENS = 32  # greedy tokens after each prompt
SMOKE_TOKENS = 16
CONTEXT, WARM_UP_STEPS, STEPS = 512, 8, 64


@dataclass(frozen=True)
class Expected:
    """What transformers gives for one prompt.

    Attributes:
        prompt: token ids.
        token_ids: prompt and greedy continuation.
        logits: float32 [len(token_ids), vocabulary], teacher-forced.
    """

    prompt: list[int]
    token_ids: list[int]
    logits: Tensor


def measure(engine: Engine, model_dir: Path) -> ModelLevel:
    """Compare and time the model.

    Args:
        engine: loaded with the backend and cache dtype under evaluation.
        model_dir: the MLflow model folder it was loaded from.
    Raises:
        StepError: transformers cannot load the checkpoint, or the engine fails on a prompt.
    """
    prompts = [encode(engine, text) for text in PROMPTS]
    expected = run_transformers(find_checkpoint(model_dir), prompts, engine.model.device)
    error, equal, total = compare(engine, expected)
    log.info("model: logits differ by %.2e, %d of %d greedy tokens equal", error, equal, total)
    times = engine.decode_step_times(context=CONTEXT, batch=1, steps=WARM_UP_STEPS + STEPS)[WARM_UP_STEPS:]
    if not times:
        raise StepError(
            "The engine ended before a decode step could be timed.", "Read the engine's errors in the log."
        )
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    log.info("model: decode step p50 %.3f ms, p90 %.3f ms, p99 %.3f ms", p50, p90, p99)
    return ModelLevel(
        logits_relative_error=error,
        tokens_equal=equal,
        tokens_total=total,
        tokens_per_s=1e3 * len(times) / sum(times),
        decode_step_ms=Milliseconds(p50=p50, p90=p90, p99=p99),
        smoke=smoke(engine),
    )


def encode(engine: Engine, text: str) -> list[int]:
    """Token ids of `text`; without a tokenizer the text's bytes, folded into the vocabulary."""
    if engine.tokenizer.available:
        return engine.tokenizer.encode(text)
    return [byte % engine.config.vocab_size for byte in text.encode()]


def run_transformers(checkpoint: Path, prompts: list[list[int]], device: torch.device) -> list[Expected]:
    """Greedy continuations and logits of transformers' implementation, in float32 where memory allows."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the checkpoint is a folder; nothing may be looked up
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture = ModelConfig.from_folder(checkpoint).architecture
    try:
        model = getattr(transformers, architecture).from_pretrained(
            checkpoint,
            dtype=reference_dtype(checkpoint, device),
            local_files_only=True,
            attn_implementation="eager",
        )
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise StepError(
            f"transformers {transformers.__version__} cannot load the checkpoint as {architecture}: {error}.",
            "Save the model with a config.json and safetensors in Hugging Face's DeepSeek layout.",
        ) from error
    model = model.to(device).eval()
    return [run_one(model, prompt) for prompt in prompts]


def reference_dtype(checkpoint: Path, device: torch.device) -> torch.dtype:
    """float32 when the weights fit twice into the free memory in it, else the checkpoint's own dtype."""
    config = ModelConfig.from_folder(checkpoint)
    stored: torch.dtype = getattr(torch, config.dtype)
    file_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    needed = file_bytes / stored.itemsize * torch.float32.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.float32 if 2 * needed < free else stored


@torch.inference_mode()
def run_one(model: torch.nn.Module, prompt: list[int]) -> Expected:
    """Greedy decoding with transformers' own cache, then one pass over the whole sequence for the logits."""
    device = next(model.parameters()).device
    ids, step, cache = list(prompt), list(prompt), None
    for _ in range(NEW_TOKENS):
        answer = model(input_ids=torch.tensor([step], device=device), past_key_values=cache, use_cache=True)
        step, cache = [int(answer.logits[0, -1].argmax())], answer.past_key_values
        ids += step
    logits = model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu()
    return Expected(prompt, ids, logits)


def compare(engine: Engine, expected: list[Expected]) -> tuple[float, int, int]:
    """Agreement of the engine, teacher-forced through its decode path.

    Returns:
        the worst prompt's relative error of the logits, and how many of how many greedy tokens are equal.
        Every token is chosen after transformers' own prefix, so that a near tie counts as one token, not as
        all that follow it.
    """
    worst, equal, total = 0.0, 0, 0
    for case in expected:
        logits = engine.logits(case.token_ids)
        worst = max(worst, relative_error(logits, case.logits))
        chosen = logits[len(case.prompt) - 1 : -1].argmax(-1).tolist()
        generated = case.token_ids[len(case.prompt) :]
        equal += sum(a == b for a, b in zip(chosen, generated, strict=True))
        total += len(generated)
    return worst, equal, total


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, both [len, vocabulary].

    Each row's mean is taken off first: softmax does not see it, and a large one would hide an error.
    """
    actual, expected = (x.double() - x.double().mean(-1, keepdim=True) for x in (actual, expected))
    error = float((actual - expected).norm() / expected.norm())
    return error if np.isfinite(error) else OUT_OF_BOUNDS


def smoke(engine: Engine) -> Smoke:
    """Prompt and greedy answer for the endpoint's smoke test, generated as the server generates."""
    text = PROMPTS[0]
    prompt: str | list[int] = text if engine.tokenizer.available else encode(engine, text)
    [answer] = engine.generate(cast("list[str]", [prompt]), max_tokens=SMOKE_TOKENS)
    if answer.finish_reason == "error":
        raise StepError(
            "The engine could not continue the smoke prompt.", "Read the engine's errors in the log."
        )
    return Smoke(prompt=prompt, max_tokens=SMOKE_TOKENS, token_ids=answer.token_ids, text=answer.text)
