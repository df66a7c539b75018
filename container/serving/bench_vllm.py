"""vLLM's columns of `python -m container.serving.bench --gpu`: its own MLA backends, and ours inside it.

vLLM draws its weights itself (load_format dummy) in the same shape, prefills the context for real and decodes
with CUDA graphs of exactly the batch sizes measured and a cache just large enough; all else is as vLLM comes.
A step's time is the time between two of its outputs, so what it overlaps with the GPU's work costs nothing.
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
from container.serving.bench_gpu import V2_LITE, Plan, Timing, timing
from container.serving.sequence import Sampling
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


def vllm_engine(plan: Plan, attention: str | None = None) -> Iterator[Timing]:
    """vLLM's decode steps with our kernel, or with its backend named `attention`."""
    batch, context = max(plan.batches), max(plan.contexts)
    extra: dict[str, Any] = {
        "load_format": "dummy",
        "compilation_config": {"cudagraph_capture_sizes": sorted(plan.batches)},
    }
    if attention is not None:
        extra |= {"attention_backend": attention, "block_size": None}
    limit = context + 4 * plan.steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(V2_LITE | ROUTING))
        save_file({"unused": torch.zeros(1)}, path / "model.safetensors")  # a checkpoint has one
        engine = VllmEngine.load(
            path,
            plan.kernel_dir,
            backend="hopper",
            options=VllmOptions(
                max_batch=batch, max_model_len=limit, cache_tokens=batch * (limit + PAGE), extra=extra
            ),
        )
        plan.wait()
        try:
            for context in plan.contexts:
                for batch in plan.batches:
                    yield _point(engine, context, batch, plan.steps)
        finally:
            engine.close()


def _point(engine: VllmEngine, context: int, batch: int, steps: int) -> Timing:
    generator = torch.Generator().manual_seed(batch)
    sampling = Sampling(max_tokens=2 * steps, ignore_eos=True)
    sequences = [
        engine.add(
            torch.randint(engine.config.vocab_size, (context,), generator=generator).tolist(), sampling
        )
        for _ in range(batch)
    ]
    while any(len(s.output) < 4 for s in sequences):
        engine.step()
    times: list[float] = []
    while len(times) < steps:
        before, start = len(sequences[0].output), time.perf_counter()
        while len(sequences[0].output) == before:
            engine.step()
        times.append(1e3 * (time.perf_counter() - start) / (len(sequences[0].output) - before))
    for sequence in sequences:
        engine.abort(sequence)
    return timing(context, batch, times)
