"""vLLM's columns of `python -m container.serving.bench --gpu`: its own MLA backends, and ours inside it.

vLLM draws its weights itself, from the native engine's distribution, prefills the context for real and
decodes with CUDA graphs of exactly the batch sizes measured and a cache just large enough; all else is as
vLLM comes. A step's time is the time between two of its outputs, so what it overlaps with the GPU's work
costs nothing.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from container.serving.attention import PAGE
from container.serving.bench_gpu import V2_LITE, Plan, timing
from container.serving.bench_table import Timing
from container.serving.sequence import Sampling, Sequence
from container.serving.vllm_engine.arguments import VllmOptions
from container.serving.vllm_engine.engine import VllmEngine

# What a real checkpoint's config.json has and transformers does not fill in.
ROUTING = {
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
}
PROFILER = {"profiler": "torch", "torch_profiler_with_stack": False, "ignore_frontend": True}
WARM = 4  # tokens before a step is measured


def vllm_engine(plan: Plan, attention: str | None = None) -> Iterator[Timing]:
    """vLLM's decode steps with our kernel, or with its backend named `attention`."""
    from container.serving.vllm_engine.random_weights import LOAD_FORMAT, WorkerExtension

    batch, limit = max(plan.batches), max(plan.contexts) + room(plan)
    # Always the same path: it is part of the key of vLLM's compile cache.
    checkpoint = Path(tempfile.gettempdir()) / "mla-bench-v2-lite"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(V2_LITE | ROUTING))
    save_file({"unused": torch.zeros(1)}, checkpoint / "model.safetensors")  # a checkpoint has one
    with tempfile.TemporaryDirectory() as traces:
        extra: dict[str, Any] = {
            "load_format": LOAD_FORMAT,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            "compilation_config": {"cudagraph_capture_sizes": sorted(plan.batches)},
        }
        if attention is not None:
            extra |= {"attention_backend": attention, "block_size": None}
        if plan.profile:
            extra["profiler_config"] = PROFILER | {"torch_profiler_dir": traces}
        options = VllmOptions(
            max_batch=batch, max_model_len=limit, cache_tokens=batch * (limit + PAGE), extra=extra
        )
        engine = VllmEngine.load(checkpoint, plan.kernel_dir, backend="hopper", options=options)
        plan.wait()
        try:
            for context in plan.contexts:
                for batch in plan.batches:
                    sequences = _start(engine, context, batch, room(plan))
                    yield timing(context, batch, [_step(engine, sequences) for _ in range(plan.steps)])
                    if plan.profile:
                        _profile(engine, sequences)
                    for sequence in sequences:
                        engine.abort(sequence)
        finally:
            engine.close()


def room(plan: Plan) -> int:
    """Tokens that a sequence may generate: those measured, and those while the others' prompts are read."""
    return 4 * plan.steps


def _start(engine: VllmEngine, context: int, batch: int, tokens: int) -> list[Sequence]:
    """`batch` sequences of `context` random tokens that all decode by now, for up to `tokens` tokens."""
    generator = torch.Generator().manual_seed(batch)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    prompts = torch.randint(engine.config.vocab_size, (batch, context), generator=generator)
    sequences = [engine.add(prompt, sampling) for prompt in prompts.tolist()]
    while any(len(s.output) < WARM for s in sequences):
        engine.step()
    return sequences


def _step(engine: VllmEngine, sequences: list[Sequence]) -> float:
    """Milliseconds until the sequences have another token; a mean when several came at once."""
    before, start = len(sequences[0].output), time.perf_counter()
    while len(sequences[0].output) == before:
        if ended := sum(s.finish_reason is not None for s in sequences):
            raise RuntimeError(f"{ended} of {len(sequences)} sequences ended before all points were measured")
        engine.step()
    return 1e3 * (time.perf_counter() - start) / (len(sequences[0].output) - before)


def _profile(engine: VllmEngine, sequences: list[Sequence]) -> None:
    """Has vLLM's worker print where the GPU's time goes in a few decode steps."""
    engine.profile(True)
    for _ in range(8):
        _step(engine, sequences)
    engine.profile(False)
