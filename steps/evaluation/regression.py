"""The candidate beside the version in production, in one job on one machine: what would users lose?

    operator   both kernels on the workload's shapes, call by call in turn         kernels/bench.py
    model      one decode step at batch 1, a few steps of each model in turn
    quality    perplexity of both on the same text

Both run in this version's engine, so the figures compare weights and kernels, not images. A regression is
percent by which the candidate is worse; a negative one says that it is better. Taking turns lets the drift of
a machine touch both alike. A version that is slower is so in its median and in its fastest call; other work
on the machine moves mostly the median (by half on two cores with a load of ten, where the fastest moves by
5 to 10 %). So the regression is what both agree on: the lesser of the two, 0 where they differ in sign.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from container.serving.checkpoint import ModelConfig, find_checkpoint
from container.serving.engine import Engine
from container.serving.sequence import Sampling
from kernels.backends import Backend
from kernels.bench import bind, cold_caches, geometric_mean
from kernels.timing import one_call_us
from kernels.workloads import Case, make_inputs
from steps.evaluation.example import texts
from steps.evaluation.machine import free_bytes
from steps.evaluation.model_level import encode
from steps.evaluation.operator import Sizes, finite, refusal
from steps.job import StepError, log

SECONDS_PER_CASE, FEWEST_CALLS, MOST_CALLS = 0.5, 12, 400
CONTEXT = 512  # tokens before the timed decode steps
TURNS, STEPS_A_TURN, SETTLING_STEPS = 16, 6, 2  # the first steps of a turn find the other model's caches
PIECE_CHARACTERS, PIECES = 512, 8
OWN_TEXT = "artifacts/evaluation.txt"  # a model may bring the text that it is to be judged by
SEED = 20240507


@dataclass(frozen=True)
class Side:
    """One of the two versions; `load` makes its engine, `weight_bytes` is the size of its files."""

    load: Callable[[], Engine]
    model_dir: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        files = find_checkpoint(self.model_dir).glob("*.safetensors")
        return sum(path.stat().st_size for path in files)


@dataclass
class Score:
    """One model on the text: nats over all scored tokens, what was scored, and the likeliest tokens."""

    nats: float = 0.0
    token_ids: list[list[int]] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)

    def perplexity(self, units: int) -> float:
        """exp of the mean negative logarithm a unit (token or byte)."""
        return finite(math.exp(min(self.nats / units, 700.0)))


@dataclass(frozen=True)
class Models:
    """Both models measured: decode step p50 in ms, its regression, and quality."""

    candidate_step_ms: float
    production_step_ms: float
    step_regression_percent: float
    candidate_perplexity: float
    production_perplexity: float
    perplexity_per: str  # token, or byte where the two tokenizers differ
    quality_regression_percent: float
    choices_equal_percent: (
        float | None
    )  # likeliest next tokens that are the same; None without a common vocabulary
    interleaved: bool


def percent(candidate: float, production: float) -> float:
    """By how much `candidate` exceeds `production`, in percent of the latter."""
    return finite(100.0 * (candidate / production - 1.0))


def operator_regression(
    candidate: Backend, production: Backend, sizes: Sizes, workload: Sequence[Case], device: torch.device
) -> float | None:
    """The regression of a call, in percent: geometric mean over the workload.

    None when the two take no common type of queries at these sizes.
    """
    backends = {"candidate": candidate, "production": production}
    for variant in sizes.variants():
        if all(refusal(one, variant, workload, device) is None for one in backends.values()):
            break
    else:
        return None
    percents = [_time_case(backends, variant, case, device) for case in workload]
    return percent(geometric_mean([1.0 + one / 100.0 for one in percents]), 1.0)


def _time_case(backends: Mapping[str, Backend], sizes: Sizes, case: Case, device: torch.device) -> float:
    inputs = make_inputs(
        [case.s_k] * case.b,
        s_q=case.s_q,
        h_q=sizes.h_q,
        kv_lora_rank=sizes.kv_lora_rank,
        rope_dim=sizes.rope_dim,
        q_dtype=sizes.q_dtype,
        kv_dtype=sizes.kv_dtype,
        causal=case.s_q > 1,
        softmax_scale=sizes.softmax_scale,
        device=device,
        seed=SEED,
    )
    caches = cold_caches(inputs.k_cache)
    calls = {name: bind(backend, inputs, caches) for name, backend in backends.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + SECONDS_PER_CASE
    for turn in range(MOST_CALLS):
        if turn >= FEWEST_CALLS and time.perf_counter() > deadline:
            break
        for name in calls if turn % 2 == 0 else reversed(calls):
            spent[name].append(one_call_us(calls[name], device))
    return agreed(*(one[SETTLING_STEPS:] for one in (spent["candidate"], spent["production"])))


def agreed(candidate: Sequence[float], production: Sequence[float]) -> float:
    """The regression in percent that medians and minima of two samples of times agree on; else 0."""
    found = [percent(measure(candidate), measure(production)) for measure in (statistics.median, min)]
    return min(found, key=abs) if found[0] * found[1] > 0 else 0.0


def compare_models(candidate: Side, production: Side, pieces: Sequence[str], device: torch.device) -> Models:
    """Time and score both models: in turns where both fit into memory, else one after the other.

    Raises StepError when a model ends a step with an error.
    """
    sides = {"candidate": candidate, "production": production}
    configs = [ModelConfig.from_folder(find_checkpoint(side.model_dir)) for side in sides.values()]
    room = min(config.max_position_embeddings for config in configs) - TURNS * STEPS_A_TURN - 2
    context = max(1, min(CONTEXT, room))
    together = 1.2 * sum(side.weight_bytes for side in sides.values()) < free_bytes(device)
    groups = [list(sides)] if together else [[name] for name in sides]
    times: dict[str, list[float]] = {}
    scores: dict[str, Score] = {}
    for group in groups:
        engines = {name: sides[name].load() for name in group}
        times |= decode_steps(engines, context)
        scores |= {name: score(engine, pieces) for name, engine in engines.items()}
        del engines
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ours, theirs = times["candidate"], times["production"]
    return Models(
        candidate_step_ms=statistics.median(ours),
        production_step_ms=statistics.median(theirs),
        step_regression_percent=agreed(ours, theirs),
        interleaved=together,
        **quality(
            scores["candidate"], scores["production"], pieces, configs[0].vocab_size == configs[1].vocab_size
        ),
    )


def decode_steps(engines: Mapping[str, Engine], context: int) -> dict[str, list[float]]:
    """Milliseconds of a decode step at batch 1 behind `context` tokens, by engine."""
    sequences = {}
    for name, engine in engines.items():
        generator = torch.Generator().manual_seed(SEED)
        prompt = torch.randint(engine.config.vocab_size, (context,), generator=generator).tolist()
        sampling = Sampling(max_tokens=TURNS * STEPS_A_TURN + 1, ignore_eos=True)
        sequences[name] = engine.add(prompt, sampling)
        while not sequences[name].output and not sequences[name].finish_reason:
            engine.step()
    times: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(TURNS):
        for name in names if turn % 2 == 0 else reversed(names):
            if reason := sequences[name].finish_reason:
                raise StepError(
                    f"The {name} model ended with '{reason}' before a decode step could be timed.",
                    "Read the engine's errors in the log.",
                )
            spent = [_step_ms(engines[name]) for _ in range(STEPS_A_TURN)]
            times[name] += spent[SETTLING_STEPS:]
    return times


def score(engine: Engine, pieces: Sequence[str]) -> Score:
    """Every token of every piece but the first, given the ones before it, through the decode path."""
    result = Score()
    for piece in pieces:
        ids = encode(engine, piece)[: engine.max_model_len]
        logits = engine.logits(ids)[:-1]
        targets = torch.tensor(ids[1:])
        result.nats += float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
        result.token_ids.append(ids)
        result.choices.append(logits.argmax(-1))
    return result


def quality(
    candidate: Score, production: Score, pieces: Sequence[str], one_vocabulary: bool
) -> dict[str, Any]:
    """Fields of Models. Tokens of two tokenizers cannot be compared, so those are counted by the byte."""
    same = one_vocabulary and candidate.token_ids == production.token_ids
    units = sum(len(ids) - 1 for ids in candidate.token_ids) if same else sum(len(p.encode()) for p in pieces)
    ours, theirs = candidate.perplexity(units), production.perplexity(units)
    pairs = zip(candidate.choices, production.choices, strict=True)
    return {
        "candidate_perplexity": ours,
        "production_perplexity": theirs,
        "perplexity_per": "token" if same else "byte",
        "quality_regression_percent": percent(ours, theirs),
        "choices_equal_percent": 100.0 * sum(int((a == b).sum()) for a, b in pairs) / units if same else None,
    }


def evaluation_text(model_dir: Path, provenance: Mapping[str, Any]) -> tuple[list[str], str]:
    """Pieces of the text to score, and where it is from.

    The model's own where it brings one: artifacts/evaluation.txt, or an input example of some length. Else
    the end of Python's language reference, which every installation has and the demo model has not seen.
    """
    own, wanted = model_dir / OWN_TEXT, PIECES * PIECE_CHARACTERS
    example = "\n\n".join(texts(provenance.get("input_example")))
    if own.is_file():
        text, source = own.read_text(encoding="utf-8")[:wanted], f"{OWN_TEXT} of the candidate"
    elif len(example) >= wanted // 4:
        text, source = example[:wanted], "the candidate's input example"
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name].strip() for name in sorted(topics))[-wanted:]
        source = "the end of Python's language reference"
    pieces = [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]
    log.info("quality is measured on %s: %d pieces of text", source, len(pieces))
    return [piece for piece in pieces if len(piece) > 1], source


def _step_ms(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return 1e3 * (time.perf_counter() - started)
