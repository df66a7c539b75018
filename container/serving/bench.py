"""Decode speed beside transformers' generate, in one run: `python -m container.serving.bench`.

Both sides have the same random weights, dtype, threads and context. The context's cache is filled with random
latents instead of a prefill, on both sides: a decode step's time does not depend on their values.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see __main__.py; it helps both sides

import torch
from torch import Tensor

from container.serving.attention import PAGE, DecodeAttention
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.engine import Engine, Options
from container.serving.model import Model
from container.serving.tokenizer import Tokenizer
from container.serving.weights import Loader, Rows
from kernels.machine import device_name

CONTEXT = 4096
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo (V3 form, float32)": (
        "V3",
        {
            "dtype": "float32",
            "vocab_size": 258,
            "hidden_size": 128,
            "intermediate_size": 384,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "q_lora_rank": 96,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "tie_word_embeddings": True,
        },
    ),
    "100M (V2 form, bfloat16)": (
        "V2",
        {
            "dtype": "bfloat16",
            "vocab_size": 16384,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "q_lora_rank": None,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
        },
    ),
}
COMMON = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 8192,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Result:
    """Milliseconds of one decode step of `batch` sequences, medians."""

    model: str
    batch: int
    theirs: float
    ours: float
    backend: str


def build(name: str) -> Any:
    """transformers' model of a row of MODELS with random weights."""
    import transformers

    family, sizes = MODELS[name]
    sizes = {**COMMON, **sizes, "num_key_value_heads": sizes["num_attention_heads"]}
    dtype = getattr(torch, sizes["dtype"])
    torch.manual_seed(0)
    config = getattr(transformers, f"Deepseek{family}Config")(**sizes)
    return getattr(transformers, f"Deepseek{family}ForCausalLM")(config).to(dtype).eval()


def transformers_step(model: Any, batch: int, context: int, steps: int) -> float:
    """Milliseconds a decoded token of generate, from the difference of a long and a short generation."""
    from transformers import DynamicCache

    config = model.config
    prompt = torch.randint(config.vocab_size, (batch, context))

    def generate(new: int) -> float:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            latent = torch.randn(batch, 1, context - 1, config.kv_lora_rank, dtype=model.dtype)
            rope = torch.randn(batch, 1, context - 1, config.qk_rope_head_dim, dtype=model.dtype)
            cache.update(latent, rope, layer)
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    generate(1)
    samples = [1e3 * (generate(1 + steps) - generate(1)) / steps for _ in range(3)]
    return statistics.median(samples)


def measure(name: str, batches: list[int], context: int, steps: int) -> list[Result]:
    """Both sides of one model at every batch size."""
    model = build(name)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = {batch: transformers_step(model, batch, context, max(2, steps // 8)) for batch in batches}
        del model
        tokens = max(batches) * (context + 2 * steps + 128)
        options = Options(max_batch=max(batches), cache_tokens=tokens, max_model_len=context + steps + 64)
        engine = Engine.load(folder, options=options)
        engine.cache.fill_random()
        for batch in batches:
            engine.decode_step_times(context, batch, 4, prefill=False)
            times = engine.decode_step_times(context, batch, steps, prefill=False)
            results.append(Result(name, batch, theirs[batch], statistics.median(times), engine.backend))
            print(
                f"{name} batch {batch}: transformers {theirs[batch]:.2f} ms, engine {results[-1].ours:.2f} ms"
            )
    return results


class RandomLoader:
    """Weights that are drawn instead of read, in the shapes that a Loader is asked for: no files."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def one(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if len(shape) == 1:
            filled = torch.zeros if name.endswith("bias") else torch.ones
            return filled(shape, dtype=dtype or self.dtype, device=self.device)
        return self._draw(shape, dtype or self.dtype)

    def optional(self, name: str, *shape: int) -> Tensor | None:
        return None

    def joined(self, *parts: Rows) -> Tensor:
        return self._draw((sum(shape[0] for _, shape in parts), *parts[0][1][1:]), self.dtype)

    def stacked(self, groups: Sequence[Sequence[Rows]]) -> Tensor:
        rows = sum(shape[0] for _, shape in groups[0])
        return self._draw((len(groups), rows, *groups[0][0][1][1:]), self.dtype)

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device).mul_(shape[-1] ** -0.5)


V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "dtype": "bfloat16",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    **COMMON,
    "max_position_embeddings": 16384,
}


def _profile(engine: Engine, context: int, batch: int) -> None:
    """Prints where the GPU's time goes in a few decode steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        engine.decode_step_times(context, batch, 4, prefill=False)
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=60))


def measure_gpu(
    batches: list[int], contexts: list[int], steps: int, backend: str, kernel_dir: Path | None, profile: bool
) -> str:
    """The engine alone, random weights in DeepSeek-V2-Lite's shape, on a GPU: a Markdown table."""
    device = torch.device("cuda")
    config = ModelConfig.from_dict(V2_LITE)
    dtype = torch.bfloat16
    lines = [
        f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}, DeepSeek-V2-Lite's shape, random "
        "bfloat16 weights. Milliseconds of a decode step: median (p99).",
        "",
        "| context | batch | step ms | tokens/s | eager step ms | backend |",
        "|---|---|---|---|---|---|",
    ]
    limit = max(contexts) + 4 * steps
    options = Options(max_batch=max(batches), max_model_len=limit, cache_tokens=max(batches) * (limit + 64))
    attention = DecodeAttention(backend, kernel_dir, device, config, dtype, "bfloat16")
    load = cast(Loader, RandomLoader(device, dtype))
    model = Model(config, load, limit)
    pages = -(-(options.cache_tokens or 0) // PAGE)
    cache = LatentCache(config.num_hidden_layers, pages, attention, device)
    cache.fill_random()
    engine = Engine(model, Tokenizer(None), cache, options, limit)
    for context in contexts:
        for batch in batches:
            engine.decode_step_times(context, batch, 4, prefill=False)
            times = sorted(engine.decode_step_times(context, batch, steps, prefill=False))
            if profile:
                _profile(engine, context, batch)
            graphs, engine._graphs = engine._graphs, None
            engine.decode_step_times(context, batch, 2, prefill=False)
            eager = statistics.median(engine.decode_step_times(context, batch, 8, prefill=False))
            engine._graphs = graphs
            median, worst = statistics.median(times), times[int(0.99 * (len(times) - 1))]
            rate = 1e3 * batch / median
            lines.append(
                f"| {context} | {batch} | {median:.2f} ({worst:.2f}) | {rate:.0f} | {eager:.2f} "
                f"| {engine.backend} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def markdown(results: list[Result], context: int) -> str:
    """The results file."""
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    head = [
        "# Decode speed of the engine",
        "",
        "Written by `python -m container.serving.bench`. Milliseconds of one decode step (one token for",
        f"every sequence of the batch) at a context of {context} tokens, medians; both sides in one run on",
        "one machine with the same random weights, dtype and threads, the context's cache filled with",
        "random latents.",
        "",
        f"Machine: {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + f"; load average when it began {LOAD[0]:.1f}.",
        "",
        "| model | batch | transformers ms | engine ms | times faster | engine tokens/s | backend |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {r.model} | {r.batch} | {r.theirs:.2f} | {r.ours:.2f} | {r.theirs / r.ours:.1f} "
        f"| {1e3 * r.batch / r.ours:.0f} | {r.backend} |"
        for r in results
    ]
    return "\n".join([*head, *rows]) + "\n"


LOAD = os.getloadavg()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="decode steps measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("RESULTS.md"))
    parser.add_argument("--gpu", action="store_true", help="the engine alone, in DeepSeek-V2-Lite's shape")
    parser.add_argument("--backend", default="auto", help="of --gpu")
    parser.add_argument("--kernel-dir", type=Path, help="compiled kernels for --gpu; default: build them")
    parser.add_argument("--profile", action="store_true", help="print the kernels' times of --gpu")
    options = parser.parse_args()
    if options.gpu:
        contexts = [1024, 8192] if options.context == CONTEXT else [options.context]
        text = measure_gpu(
            options.batch, contexts, options.steps, options.backend, options.kernel_dir, options.profile
        )
        options.out.write_text("# Decode speed of the engine on a GPU\n\n" + text)
        return 0
    results = [r for name in MODELS for r in measure(name, options.batch, options.context, options.steps)]
    text = markdown(results, options.context)
    options.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
