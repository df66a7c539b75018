"""Decode speed beside transformers' generate, in one run: `python -m container.serving.bench`.

With `--gpu` it is bench_gpu.py that runs: engines beside each other on a GPU.

Both sides have the same random weights, dtype, threads and context. The context's cache is filled with random
latents instead of a prefill, on both sides: a decode step's time does not depend on their values.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see __main__.py; it helps both sides

import torch

from container.serving import bench_gpu
from container.serving.engine import Engine, Options
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
    parser.add_argument("--gpu", action="store_true", help="engines on a GPU; has options of its own")
    if "--gpu" in sys.argv:
        return bench_gpu.main([word for word in sys.argv[1:] if word != "--gpu"])
    options = parser.parse_args()
    results = [r for name in MODELS for r in measure(name, options.batch, options.context, options.steps)]
    text = markdown(results, options.context)
    options.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
