"""Call the emulated library on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kernels.arguments import Problem, check_arguments
from kernels.compiled import call_params
from kernels.package import KernelPackage, file_sha256
from kernels.workspace import COUNTER_BYTES

ERROR_BYTES = 4096


class EmulatedFailure(RuntimeError):
    """What the emulator found, or the library refused."""


class _Region(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int),
    )


@dataclass
class Emulator:
    """A Backend that runs the Hopper kernels on a device of `multiprocessors` (at most 63).

    `seed` decides the order of everything that happens at the same time. `fault` breaks the kernel:
    "file:line" leaves a synchronisation out, "!file:line" inverts the parity that a wait is for.
    """

    library: Path
    multiprocessors: int = 8
    seed: int = 0
    fault: str = ""
    workspace: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    name: str = "emulated hopper"

    def __post_init__(self) -> None:
        package = KernelPackage(self.library.parent, "hopper", file_sha256(self.library), {})
        self._library = package.open()
        self._library.emulator_synchronisations.restype = ctypes.c_char_p

    def unsupported(self, problem: Problem) -> str | None:
        """The library itself refuses what it lacks."""
        return None

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
        """Run the operator; EmulatedFailure when it does not end well. What nobody writes is NaN."""
        check_arguments(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale)
        problem = Problem.of(q, k_cache, head_dim_v, causal)
        b, s_q, h_q, _ = q.shape
        out = torch.full((b, s_q, h_q, head_dim_v), float("nan"), dtype=q.dtype)
        lse = torch.full((b, h_q, s_q), float("nan"))
        params = call_params(problem, q, k_cache, block_table, softmax_scale)
        tensors = {
            "q": q, "kv_cache": k_cache, "block_table": block_table, "cache_seqlens": cache_seqlens,
            "out": out, "lse": lse,
        }  # fmt: skip
        for name, tensor in tensors.items():
            setattr(params, name, tensor.data_ptr())
        self._configure(tensors)
        size = self._library.mla_decode_workspace_bytes(ctypes.byref(params))
        if self.workspace.numel() < size:
            self.workspace = fresh_workspace(size)
        params.workspace, params.workspace_bytes = self.workspace.data_ptr(), size
        self._configure(tensors | {"workspace": self.workspace[:size]})
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._library.mla_decode_run(ctypes.byref(params), error, ERROR_BYTES):
            raise EmulatedFailure(error.value.decode(errors="replace"))
        return out, lse

    def synchronisations(self) -> dict[str, str]:
        """Place ("file:line") -> operation of what runs have met since the last call."""
        lines = self._library.emulator_synchronisations().decode().splitlines()
        return dict(line.split(" ", 1) for line in lines)

    def _configure(self, tensors: dict[str, Tensor]) -> None:
        configure(
            self._library, self.seed, self.multiprocessors, tensors, {"out", "lse", "workspace"}, self.fault
        )


def configure(
    library: ctypes.CDLL,
    seed: int,
    multiprocessors: int,
    tensors: Mapping[str, Tensor],
    writable: Container[str],
    fault: str = "",
) -> None:
    """Tell `library` how the next runs go, and which memory they may touch."""
    regions = (_Region * len(tensors))(
        *(
            _Region(name.encode(), tensor.data_ptr(), _extent(tensor), name in writable)
            for name, tensor in tensors.items()
        )
    )
    library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    library.emulator_configure(seed, multiprocessors, regions, len(regions))
    library.emulator_break(ctypes.c_char_p(fault.encode()))


def fresh_workspace(size: int) -> Tensor:
    """Counters of 0 and NaN for the rest, aligned to 256 bytes."""
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :][:size]
    memory[:COUNTER_BYTES] = 0
    return memory


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
