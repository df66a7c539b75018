"""The `auto` backend: on a problem class's first call measure the correct backends, then use the fastest."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels.arguments import Problem, check_arguments
from kernels.backends import Backend, BackendError, available_backends
from kernels.timing import best_seconds

log = logging.getLogger(__name__)
CHECK_BYTES = 1 << 30  # the reference may take, beside a cache that fills the memory: it checks fewer rows
# A candidate must agree with the float32 torch form: rounding is far below, a wrong kernel far above.
AGREEMENT = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3}


class AutoBackend:
    """Picks among `available_backends(kernel_dir, device)` for each problem class (device, dtypes, sizes).

    The first call of a class decides for the others: let it have lengths like theirs.
    """

    name = "auto"

    def __init__(self, kernel_dir: Path | None = None) -> None:
        self._kernel_dir = kernel_dir
        self._backends: dict[str, dict[str, Backend]] = {}
        self._chosen: dict[tuple[object, ...], Backend] = {}

    def unsupported(self, problem: Problem) -> str | None:
        """None: the reference takes what no other backend takes."""
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
        """Run the problem on its class's backend, choosing it first when the class is new."""
        arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
        try:
            batch, *rest = q.shape
            # Lengths stay on their device, so the table's width stands for them.
            sizes = (
                batch.bit_length(), *rest, head_dim_v, k_cache.shape[1], block_table.shape[1].bit_length()
            )  # fmt: skip
            key = (q.device, q.dtype, k_cache.dtype, sizes, torch.get_num_threads())
        except (AttributeError, IndexError, ValueError):
            check_arguments(*arguments[:-1])
            raise
        backend = self._chosen.get(key)
        if backend is None:
            check_arguments(*arguments[:-1])
            backend = self._chosen[key] = self.choose(*arguments)
        return backend(*arguments)

    def choose(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> Backend:
        """The fastest backend that runs this problem and agrees with the reference on its first rows.

        Raises BackendError when none agrees, ValueError for a bad argument.
        """
        problem = Problem.of(q, k_cache, head_dim_v, causal)
        device = str(q.device)
        if device not in self._backends:
            self._backends[device] = available_backends(self._kernel_dir, q.device)
        candidates = {
            name: backend
            for name, backend in self._backends[device].items()
            if not backend.unsupported(problem)
        }
        reference = candidates.pop("reference")
        if not candidates:
            return reference
        arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
        outputs: dict[str, Tensor] = {}
        for name, backend in candidates.items():
            try:
                outputs[name] = backend(*arguments)[0]
            except RuntimeError as refusal:  # also NotImplementedError, for what no Problem describes
                log.warning("%s does not run %s: %s", name, problem, refusal)
        if not outputs:
            return reference
        rows = _checked_rows(q, k_cache, block_table)
        few = (q[:rows], k_cache, block_table[:rows], cache_seqlens[:rows], *arguments[4:])
        expected = torch.nan_to_num(reference(*few)[0].float())
        allowed = AGREEMENT[torch.bfloat16 if k_cache.dtype == torch.uint8 else q.dtype]
        correct: dict[str, Backend] = {}
        for name, out in outputs.items():
            difference = (torch.nan_to_num(out[:rows].float()) - expected).norm()
            error = float(difference / expected.norm().clamp_min(1e-20))
            if error <= allowed:
                correct[name] = candidates[name]
            else:
                log.warning("%s differs from the reference by %.2e on %s: left out", name, error, problem)
        if not correct:
            raise BackendError(f"no compiled backend agrees with the reference on {problem}")
        if len(correct) == 1:
            return next(iter(correct.values()))
        seconds = {name: best_seconds(partial(run, *arguments), q.device) for name, run in correct.items()}
        fastest = min(seconds, key=seconds.__getitem__)
        log.info("backend %s is the fastest of %s on %s", fastest, seconds, problem)
        return correct[fastest]


def _checked_rows(q: Tensor, k_cache: Tensor, block_table: Tensor) -> int:
    """How many rows the reference computes in CHECK_BYTES, were they as long as the table is wide.

    In float32 a token takes its latent and rope values and a score of each query row, thrice at the worst.
    """
    b, s_q, h_q, width = q.shape
    row_bytes = block_table.shape[1] * k_cache.shape[1] * 3 * 4 * (width + s_q * h_q)
    return max(1, min(b, CHECK_BYTES // max(row_bytes, 1)))
