"""The model level: the engine that will serve, against transformers with the same weights.

transformers shares no code with the engine: it expands keys and values from the latent at every step and
knows no page and no kernel. Agreement says that weights, rotation, routing, cache and kernel are right.

What the gate takes is the engine's error beyond rounding. R: transformers in float32; T: transformers in the
type that is served; E: the engine; |x|: Frobenius norm of logits, each row's mean taken off.

    engine        e = |E - R| / |R|
    transformers  t = |T - R| / |R|      0 for a float32 model, where T is R
    gate          max(0, e - t)

Rounding to bfloat16 moves logits by a per cent for a trained model and by ten for random weights (a router
that flips an expert at a near tie does most of it), whoever computes them, so e alone cannot tell a wrong
engine from a right one. By the triangle inequality e - t <= |E - T| / |R|: what is left cannot be explained
by the rounding that transformers does too. A wrong rotation, scale, router or page changes logits by tens of
per cent. An independent error w adds in squares, so one hides in an allowance m while
w < sqrt(m * (m + 2 t)): 6 % at t = 9 %, m = 2 %. The kernel's own error does not hide there: it is bounded
against float64 on its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from container.serving.checkpoint import ModelConfig, find_checkpoint
from container.serving.engine import Engine
from steps.evaluation.example import prompt_of
from steps.evaluation.machine import free_bytes
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
        rounded: the same for the same tokens, computed in the served type; None where `logits` are.
    """

    prompt: list[int]
    token_ids: list[int]
    logits: Tensor
    rounded: Tensor | None


@dataclass(frozen=True)
class Reference:
    """transformers' answers, the type they were computed in, and why that is not float32 (else None)."""

    cases: list[Expected]
    dtype: torch.dtype
    note: str | None


@dataclass(frozen=True)
class Agreement:
    """Logits against the reference: the worst prompt's relative error, and greedy tokens equal of `total`.

    Every token is chosen after the reference's own prefix, so that a near tie counts as one token, not as
    all that follow it.
    """

    error: float
    equal: int
    total: int


def measure(engine: Engine, model_dir: Path, input_example: Any = None) -> ModelLevel:
    """Compare and time the model.

    Args:
        engine: loaded with the backend and cache dtype under evaluation.
        model_dir: the MLflow model folder it was loaded from.
        input_example: of provenance.json; where it holds a text, the endpoint's smoke test asks with that.
    Raises:
        StepError: transformers cannot load the checkpoint, or the engine fails on a prompt.
    """
    prompts = [encode(engine, text) for text in PROMPTS]
    reference = run_transformers(find_checkpoint(model_dir), prompts, engine.model.device, engine.model.dtype)
    served = agreement(reference, [engine.logits(case.token_ids) for case in reference.cases])
    rounded = [case.rounded for case in reference.cases if case.rounded is not None]
    peer = agreement(reference, rounded) if rounded else None
    log.info(
        "model: logits differ by %.2e from transformers in %s, its own in %s by %s; %d of %d tokens equal",
        served.error,
        name_of(reference.dtype),
        name_of(engine.model.dtype),
        f"{peer.error:.2e}" if peer else "-",
        served.equal,
        served.total,
    )
    times = engine.decode_step_times(context=CONTEXT, batch=1, steps=WARM_UP_STEPS + STEPS)[WARM_UP_STEPS:]
    if not times:
        raise StepError(
            "The engine ended before a decode step could be timed.", "Read the engine's errors in the log."
        )
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    log.info("model: decode step p50 %.3f ms, p90 %.3f ms, p99 %.3f ms", p50, p90, p99)
    return ModelLevel(
        dtype=name_of(engine.model.dtype),
        reference_dtype=name_of(reference.dtype),
        reference_note=reference.note,
        logits_relative_error=served.error,
        transformers_relative_error=peer.error if peer else None if reference.note else 0.0,
        excess_relative_error=excess(served.error, peer.error if peer else 0.0),
        tokens_equal=served.equal,
        transformers_tokens_equal=peer.equal if peer else None,
        tokens_total=served.total,
        tokens_per_s=1e3 * len(times) / sum(times),
        decode_step_ms=Milliseconds(p50=p50, p90=p90, p99=p99),
        smoke=smoke(engine, input_example),
    )


def encode(engine: Engine, text: str) -> list[int]:
    """Token ids of `text`; without a tokenizer the text's bytes, folded into the vocabulary."""
    if engine.tokenizer.available:
        return engine.tokenizer.encode(text)
    return [byte % engine.config.vocab_size for byte in text.encode()]


def excess(engine: float, transformers: float) -> float:
    """The engine's error beyond that of transformers in the same type; the module's docstring says why."""
    return engine if engine >= OUT_OF_BOUNDS else max(0.0, engine - transformers)


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def run_transformers(
    checkpoint: Path, prompts: list[list[int]], device: torch.device, served: torch.dtype
) -> Reference:
    """Greedy continuations and logits of transformers' implementation, in float32 and in the type `served`.

    A model that does not fit into the free memory in float32 is its own reference in `served`: rounding then
    counts as the engine's error, and the note says so.
    """
    if served == torch.float32:
        dtype, note = served, None
    else:
        dtype, note = reference_dtype(checkpoint, device, served)
    model = load_transformers(checkpoint, dtype, device)
    greedy = [continue_greedily(model, prompt) for prompt in prompts]
    logits = [teacher_forced(model, ids) for ids in greedy]
    del model
    rounded: list[Tensor | None] = [None] * len(prompts)
    if dtype != served:
        model = load_transformers(checkpoint, served, device)
        rounded = [teacher_forced(model, ids) for ids in greedy]
    cases = [Expected(*parts) for parts in zip(prompts, greedy, logits, rounded, strict=True)]
    return Reference(cases, dtype, note)


def load_transformers(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """transformers' model of the checkpoint. Raises StepError when it cannot load it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the checkpoint is a folder; nothing may be looked up
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture = ModelConfig.from_folder(checkpoint).architecture
    try:
        model: torch.nn.Module = getattr(transformers, architecture).from_pretrained(
            checkpoint, dtype=dtype, local_files_only=True, attn_implementation="eager"
        )
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise StepError(
            f"transformers {transformers.__version__} cannot load the checkpoint as {architecture}: {error}.",
            "Save the model with a config.json and safetensors in Hugging Face's DeepSeek layout.",
        ) from error
    return model.to(device).eval()


def reference_dtype(
    checkpoint: Path, device: torch.device, served: torch.dtype
) -> tuple[torch.dtype, str | None]:
    """float32 where the weights fit into free memory with a fifth to spare, else `served` and why."""
    stored: torch.dtype = getattr(torch, ModelConfig.from_folder(checkpoint).dtype)
    file_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    needed, free = 1.2 * file_bytes / stored.itemsize * torch.float32.itemsize, free_bytes(device)
    if needed <= free:
        return torch.float32, None
    return served, (
        f"The float32 reference was skipped: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
        f"The error is against transformers in {name_of(served)}, so it holds the rounding of both."
    )


@torch.inference_mode()
def continue_greedily(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """`prompt` and NEW_TOKENS greedy tokens, decoded with transformers' own cache."""
    device = next(model.parameters()).device
    ids, step, cache = list(prompt), list(prompt), None
    for _ in range(NEW_TOKENS):
        answer = model(input_ids=torch.tensor([step], device=device), past_key_values=cache, use_cache=True)
        step, cache = [int(answer.logits[0, -1].argmax())], answer.past_key_values
        ids += step
    return ids


@torch.inference_mode()
def teacher_forced(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Float32 logits [len(ids), vocabulary] of one pass over the sequence, on the CPU."""
    device = next(model.parameters()).device
    return cast("Tensor", model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu())


def agreement(reference: Reference, logits: list[Tensor]) -> Agreement:
    """`logits` [len(token_ids), vocabulary] of each case against the reference's."""
    worst, equal, total = 0.0, 0, 0
    for case, actual in zip(reference.cases, logits, strict=True):
        worst = max(worst, relative_error(actual, case.logits))
        chosen = actual[len(case.prompt) - 1 : -1].argmax(-1).tolist()
        generated = case.token_ids[len(case.prompt) :]
        equal += sum(a == b for a, b in zip(chosen, generated, strict=True))
        total += len(generated)
    return Agreement(worst, equal, total)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, both [len, vocabulary].

    Each row's mean is taken off first: softmax does not see it, and a large one would hide an error.
    """
    actual, expected = (x.double() - x.double().mean(-1, keepdim=True) for x in (actual, expected))
    error = float((actual - expected).norm() / expected.norm())
    return error if np.isfinite(error) else OUT_OF_BOUNDS


def smoke(engine: Engine, input_example: Any = None) -> Smoke:
    """Prompt and greedy answer for the endpoint's smoke test, generated as the server generates.

    The prompt is the model's own input example where that holds a text. An example that the model ends at
    once shows nothing of the weights, so the default follows.
    """
    own = prompt_of(input_example)
    sources = {"the model's input example": own, "the default prompt": PROMPTS[0]}
    for source, text in sources.items():
        if text is None:
            continue
        while len(ids := encode(engine, text)) + SMOKE_TOKENS > engine.max_model_len and len(text) > 1:
            text = text[: len(text) // 2]
        prompt: str | list[int] = text if engine.tokenizer.available else ids
        [answer] = engine.generate(cast("list[str]", [prompt]), max_tokens=SMOKE_TOKENS)
        if answer.finish_reason == "error":
            raise StepError(
                f"The engine could not continue {source}, {text!r:.200}.",
                "Read the engine's errors in the log.",
            )
        if len(answer.token_ids) > 1:
            break
    log.info("smoke test: %s, %r, gives %r", source, text, answer.text)
    return Smoke(prompt=prompt, max_tokens=SMOKE_TOKENS, token_ids=answer.token_ids, text=answer.text)
