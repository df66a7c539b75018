"""Call a compiled target through the C ABI; argument structures are cached, so a call costs microseconds."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import Problem, check_arguments, check_tensors
from kernels.package import DecodeParams, KernelPackage
from kernels.workspace import Workspaces

ERROR_BYTES = 512
INVALID_ARGUMENT = 1
UNSUPPORTED = 2
MAX_PLANS = 256
# What csrc/cpu takes at most: `auto` passes it over beyond that, instead of failing in it.
CPU_LARGEST = {
    "batch": 1 << 20, "s_q": 64, "h_q": 1024, "kv_lora_rank": 4096, "rope_dim": 1024, "page_size": 1 << 20
}  # fmt: skip
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


@dataclass(slots=True)
class _Plan:
    """Everything of a call that only depends on shapes, strides and dtypes."""

    params: DecodeParams
    address: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspace_bytes: int


class _Local(threading.local):
    """Plans and workspace of one thread: the structures are filled and run without a lock."""

    def __init__(self) -> None:
        self.plans: dict[tuple[Any, ...], _Plan] = {}
        self.workspaces = Workspaces()
        self.error = ctypes.create_string_buffer(ERROR_BYTES)


class CompiledBackend:
    """A compiled target (`cpu` or `hopper`) loaded from a verified package."""

    def __init__(self, package: KernelPackage) -> None:
        self.package = package
        self.name = package.target
        library = package.open()
        self._workspace_bytes = library.mla_decode_workspace_bytes
        self._run = library.mla_decode_run
        self._on_gpu = self.name != "cpu"
        self._local = _Local()

    def __repr__(self) -> str:
        return f"CompiledBackend({self.name}, {self.package.sha256[:12]})"

    def unsupported(self, problem: Problem) -> str | None:
        """None when this target runs `problem`, else the reason."""
        device_type = "cuda" if self._on_gpu else "cpu"
        if problem.device_type != device_type:
            return f"target {self.name} runs on {device_type}, the tensors are on {problem.device_type}"
        if self.name == "cpu":
            return cpu_unsupported(problem)
        return hopper_unsupported(problem)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run the operator. ValueError for a bad argument, NotImplementedError for what the target lacks."""
        local = self._local
        try:
            key = (
                q.shape, q.stride(), q.dtype, k_cache.shape, k_cache.stride(), k_cache.dtype,
                block_table.shape, block_table.stride(), block_table.dtype, cache_seqlens.shape,
                cache_seqlens.stride(), cache_seqlens.dtype, q.device, k_cache.device, block_table.device,
                cache_seqlens.device,
                head_dim_v, softmax_scale, causal, 0 if self._on_gpu else torch.get_num_threads(),
            )  # fmt: skip
        except AttributeError:
            check_tensors(q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens)
            raise
        plan = local.plans.get(key)
        if plan is None:
            plan = self._plan(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
            if len(local.plans) >= MAX_PLANS:
                local.plans.clear()
            local.plans[key] = plan
        out = torch.empty(plan.out_shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(plan.lse_shape, dtype=torch.float32, device=q.device)
        stream = torch.cuda.current_stream(q.device).cuda_stream if self._on_gpu else None
        params = plan.params
        params.q = q.data_ptr()
        params.kv_cache = k_cache.data_ptr()
        params.block_table = block_table.data_ptr()
        params.cache_seqlens = cache_seqlens.data_ptr()
        params.out = out.data_ptr()
        params.lse = lse.data_ptr()
        if stream is not None:
            with torch.cuda.device(q.device):
                params.stream = stream
                params.workspace = local.workspaces.address(q.device, stream, plan.workspace_bytes)
                status = self._run(plan.address, local.error, ERROR_BYTES)
        else:
            params.workspace = local.workspaces.address(q.device, None, plan.workspace_bytes)
            status = self._run(plan.address, local.error, ERROR_BYTES)
        if status:
            raise _status_error(status, self.name, local.error.value.decode(errors="replace"))
        return out, lse

    def _plan(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> _Plan:
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        problem = Problem.of(q, k_cache, head_dim_v, causal)
        reason = self.unsupported(problem)
        if reason is not None:
            raise NotImplementedError(f"backend {self.name}: {reason}")
        params = call_params(problem, q, k_cache, block_table, softmax_scale)
        params.num_threads = 0 if self._on_gpu else torch.get_num_threads()
        b, s_q, h_q, _ = q.shape
        size = params.workspace_bytes = self._workspace_bytes(ctypes.addressof(params))
        return _Plan(params, ctypes.addressof(params), (b, s_q, h_q, head_dim_v), (b, h_q, s_q), size)


def call_params(
    problem: Problem, q: Tensor, k_cache: Tensor, block_table: Tensor, softmax_scale: float
) -> DecodeParams:
    """What a call's sizes, strides and dtypes say, for contiguous outputs; addresses are still null."""
    b, s_q, h_q, _ = q.shape
    head_dim_v = problem.kv_lora_rank
    return DecodeParams(
        struct_bytes=ctypes.sizeof(DecodeParams),
        q_dtype=DTYPE_CODES[q.dtype],
        kv_dtype=DTYPE_CODES[k_cache.dtype],
        batch=b,
        s_q=s_q,
        h_q=h_q,
        kv_lora_rank=head_dim_v,
        rope_dim=problem.rope_dim,
        num_blocks=k_cache.shape[0],
        page_size=problem.page_size,
        max_blocks_per_seq=block_table.shape[1],
        causal=int(problem.causal),
        softmax_scale=softmax_scale,
        q_stride_batch=q.stride(0),
        q_stride_seq=q.stride(1),
        q_stride_head=q.stride(2),
        kv_stride_block=k_cache.stride(0),
        kv_stride_token=k_cache.stride(1),
        block_table_stride=block_table.stride(0),
        out_stride_batch=s_q * h_q * head_dim_v,
        out_stride_seq=h_q * head_dim_v,
        out_stride_head=head_dim_v,
    )


def _status_error(status: int, target: str, message: str) -> Exception:
    if status == INVALID_ARGUMENT:
        return ValueError(f"backend {target}: {message}")
    if status == UNSUPPORTED:
        return NotImplementedError(f"backend {target}: {message}")
    return RuntimeError(f"backend {target} failed: {message}")


def cpu_unsupported(problem: Problem) -> str | None:
    """None when csrc/cpu takes the problem's sizes, else the reason."""
    if problem.kv_dtype == torch.uint8 and (problem.kv_lora_rank, problem.rope_dim) != (512, 64):
        return f"fp8_ds_mla needs sizes 512 and 64, got {problem.kv_lora_rank} and {problem.rope_dim}"
    for name, value in (("kv_lora_rank", problem.kv_lora_rank), ("rope_dim", problem.rope_dim)):
        if value % 16:
            return f"{name} is {value}, target cpu needs a multiple of 16"
    for name, most in CPU_LARGEST.items():
        if getattr(problem, name) > most:
            return f"{name} is {getattr(problem, name)}, target cpu takes at most {most}"
    return None


def hopper_unsupported(problem: Problem) -> str | None:
    """None when csrc/hopper takes the problem on the current GPU, else the reason."""
    if torch.cuda.get_device_capability() != (9, 0):
        return (
            f"target hopper needs compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}"
        )
    if (problem.kv_lora_rank, problem.rope_dim) != (512, 64):
        return f"target hopper takes sizes 512 and 64, got {problem.kv_lora_rank} and {problem.rope_dim}"
    if problem.page_size != 64:
        return f"target hopper takes pages of 64 tokens, got {problem.page_size}"
    if problem.q_dtype not in (torch.bfloat16, torch.float16):
        return f"target hopper takes bfloat16 and float16 queries, got {problem.q_dtype}"
    if problem.kv_dtype not in (problem.q_dtype, torch.uint8):
        return f"target hopper takes a {problem.q_dtype} (as q) or fp8_ds_mla cache, got {problem.kv_dtype}"
    if problem.kv_dtype == torch.uint8 and problem.q_dtype != torch.bfloat16:
        return f"target hopper takes an fp8_ds_mla cache with bfloat16 queries, got {problem.q_dtype}"
    if problem.h_q > 128:
        return f"target hopper takes at most 128 heads, got {problem.h_q}"
    return None
