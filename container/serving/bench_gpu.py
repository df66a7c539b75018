"""Decode speed of engines on a GPU, side by side: `python -m container.serving.bench --gpu`.

Random weights in DeepSeek-V2-Lite's shape (15.7B parameters, bfloat16) made on the GPU, and a cache of random
latents: a decode step's time does not depend on their values. Every engine runs in a process of its own, one
after the other, and leaves a line of JSON for each point; the table has a column for each engine.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from container.serving.attention import PAGE, DecodeAttention
from container.serving.bench_table import Result, Timing, table
from container.serving.cache import LatentCache
from container.serving.checkpoint import ModelConfig
from container.serving.engine import Engine, Options
from container.serving.model import Model
from container.serving.tokenizer import Tokenizer
from container.serving.vllm_engine.arguments import VLLM
from container.serving.weights import Loader, Rows
from kernels.machine import device_name

V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "max_position_embeddings": 16384,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Plan:
    """What to measure: decode steps at every context and batch size."""

    contexts: list[int]
    batches: list[int]
    steps: int
    kernel_dir: str | None
    profile: bool
    after: str | None = None

    def wait(self) -> None:
        """Until the file `after` exists: an engine may load while the machine still does something else."""
        while self.after and not Path(self.after).exists():
            time.sleep(0.1)


class RandomLoader:
    """Weights that are drawn instead of read, in the shapes that a Loader is asked for: no files."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def one(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if len(shape) == 1:
            filled = torch.zeros if name.endswith("bias") else torch.ones
            return filled(shape, dtype=dtype or self.dtype, device=self.device)
        return self._draw(shape, self.dtype).to(dtype or self.dtype)  # drawn as it would be stored

    def __contains__(self, name: str) -> bool:
        """None of the tensors that a checkpoint may have or not."""
        return False

    def optional(self, name: str, *shape: int) -> Tensor | None:
        return None

    def joined(self, *parts: Rows) -> Tensor:
        return self._draw((sum(shape[0] for _, shape in parts), *parts[0][1][1:]), self.dtype)

    def stacked(self, groups: Sequence[Sequence[Rows]]) -> Tensor:
        rows = sum(shape[0] for _, shape in groups[0])
        return self._draw((len(groups), rows, *groups[0][0][1][1:]), self.dtype)

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(std=shape[-1] ** -0.5)


def our_engine(plan: Plan, backend: str) -> Iterator[Timing]:
    """This package's engine with one of the kernel backends."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = ModelConfig.from_dict(V2_LITE)
    limit = max(plan.contexts) + 4 * plan.steps
    batch = max(plan.batches)
    options = Options(max_batch=batch, max_model_len=limit, graph_sizes=tuple(plan.batches))
    kernels = Path(plan.kernel_dir) if plan.kernel_dir else None
    attention = DecodeAttention(backend, kernels, device, config, dtype, "bfloat16")
    model = Model(config, cast(Loader, RandomLoader(device, dtype)), limit)
    cache = LatentCache(config.num_hidden_layers, batch * (limit // PAGE + 2), attention, device)
    cache.fill_random()
    engine = Engine(model, Tokenizer(None), cache, options, limit)
    plan.wait()
    for context in plan.contexts:
        for batch in plan.batches:
            engine.decode_step_times(context, batch, 4, prefill=False)
            times = engine.decode_step_times(context, batch, plan.steps, prefill=False)
            yield timing(context, batch, times)
            if plan.profile:
                _profile(engine, context, batch)


def vllm_engine(plan: Plan, attention: str | None) -> Iterator[Timing]:
    """vLLM with its MLA backend `attention`, or with our kernel inside it (None)."""
    from container.serving import bench_vllm  # uses this module

    return bench_vllm.vllm_engine(plan, attention)


def timing(context: int, batch: int, times: list[float]) -> Timing:
    """The figures of one point from its steps' milliseconds."""
    return Timing(context, batch, statistics.median(times), sorted(times)[int(0.99 * (len(times) - 1))])


def _profile(engine: Engine, context: int, batch: int) -> None:
    """Prints where the GPU's time goes in a few decode steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        engine.decode_step_times(context, batch, 8, prefill=False)
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))


@dataclass(frozen=True)
class Column:
    """An engine of the table: what it is, and what measures a plan in a process that it has to itself."""

    title: str
    measure: Callable[[Plan], Iterator[Timing]]
    vllms_own: bool = False  # vLLM with a kernel of its own: what ours is compared with


ENGINES = {
    "hopper": Column("this package's engine with its CUDA kernel", lambda p: our_engine(p, "hopper")),
    "triton": Column("this package's engine with its Triton kernel", lambda p: our_engine(p, "triton")),
    "vllm-hopper": Column(f"vLLM {VLLM} with this package's CUDA kernel", lambda p: vllm_engine(p, None)),
    "vllm-flash_attn_mla": Column(
        f"vLLM {VLLM} with FLASH_ATTN_MLA, which it chooses by itself on an H100",
        lambda p: vllm_engine(p, "FLASH_ATTN_MLA"),
        vllms_own=True,
    ),
    "vllm-flashmla": Column(
        f"vLLM {VLLM} with FLASHMLA, its second choice",
        lambda p: vllm_engine(p, "FLASHMLA"),
        vllms_own=True,
    ),
}


def measure(name: str, plan: Plan, timeout: float) -> Result:
    """One engine's times, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.jsonl"
        words = ["--only", name, "--plan", json.dumps(asdict(plan)), "--json", str(out)]
        command = [sys.executable, "-m", "container.serving.bench_gpu", *words]
        failure = None
        process = subprocess.Popen(command, start_new_session=True)
        try:
            if status := process.wait(timeout):
                failure = f"failed with status {status}"
        except subprocess.TimeoutExpired:
            failure = f"not done within {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # vLLM's own processes, too: they hold the GPU's memory
            process.wait()
        rows = out.read_text().splitlines() if out.is_file() else []
        return Result([Timing(**json.loads(row)) for row in rows], failure)


def report(results: Mapping[str, Result]) -> str:
    """The results file."""
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    head = [
        "# Decode speed of engines on a GPU",
        "",
        f"Written by `python -m container.serving.bench --gpu`: {about}",
        "",
        f"Machine: {device_name(torch.device('cuda'))}, torch {torch.__version__}. Milliseconds of a decode "
        "step (one token for every sequence), median (99th percentile), and tokens a second.",
        "",
    ]
    titles = {name: column.title for name, column in ENGINES.items()}
    own = [name for name, column in ENGINES.items() if column.vllms_own]
    return "\n".join(head) + "\n" + table(results, titles, "hopper", own)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m container.serving.bench --gpu", description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=["hopper", "triton"])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=64, help="decode steps measured")
    parser.add_argument("--kernel-dir", help="compiled kernels; default: build them")
    parser.add_argument("--profile", action="store_true", help="print the kernels' times")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for an engine")
    parser.add_argument("--within", type=float, default=1e9, help="seconds for all of them")
    parser.add_argument("--after", help="load the first engine, but measure only when this file exists")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("RESULTS_GPU.md"))
    options = parser.parse_args(arguments)
    kernels = options.kernel_dir
    plan = Plan(options.context, options.batch, options.steps, kernels, options.profile, options.after)
    end = time.monotonic() + options.within
    results: dict[str, Result] = {}
    for name in options.engines:
        results[name] = measure(name, plan, max(0.0, min(options.timeout, end - time.monotonic())))
        options.out.write_text(report(results))
    print(options.out.read_text())
    return 1 if any(r.failure for r in results.values()) else 0


def measure_here(arguments: Sequence[str]) -> int:
    """The process of one engine: `--only NAME --plan JSON --json FILE`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    with options.json.open("w") as file:
        for row in ENGINES[options.only].measure(Plan(**json.loads(options.plan))):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(options.only, row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(measure_here(sys.argv[1:]))
