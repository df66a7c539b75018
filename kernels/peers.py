"""The public MLA decode kernels that the hopper target is measured against, behind one interface.

`flash_mla` is PyPI's `sgl-flash-mla` (FlashMLA's dense decode for Hopper, its legacy path), `fa3` PyPI's
`fa3-fwd` (FlashAttention-3 with `qv`). Both are optional: `unavailable` says why one cannot be used.

Both plan their work over the multiprocessors from the lengths. In a whole operation the plan is a part of the
call, as it is in ours: FlashMLA makes its metadata in a kernel before the decode, FlashAttention-3 does
without scheduler metadata and plans in the call. A serving engine can plan once a step for all layers: then
the plan is made before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backends import BackendError
from kernels.flash_mla_backend import FlashMlaBackend
from kernels.workloads import Inputs

Run = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A library: what it is called, and how a call of it is prepared."""

    title: str
    distribution: str
    load: Callable[[], object]
    prepare: Callable[[Inputs, Tensor], tuple[Run, Run]]

    def version(self) -> str:
        """E.g. "FlashMLA (sgl-flash-mla 1.0.0)"."""
        return f"{self.title} ({self.distribution} {importlib.metadata.version(self.distribution)})"


def _flash_mla(inputs: Inputs, _: Tensor) -> tuple[Run, Run]:
    backend = FlashMlaBackend()
    schedule = backend.schedule(inputs.q, inputs.cache_seqlens)
    planned = functools.partial(backend.run, *inputs.arguments(), schedule)
    planned()  # fills the schedule
    return functools.partial(backend, *inputs.arguments()), planned


def _fa3(inputs: Inputs, room: Tensor) -> tuple[Run, Run]:
    """The wheel has no paged path, so it reads a contiguous copy of the cache."""
    module = importlib.import_module("fa3_fwd_interface")
    b, s_q, h_q, width = inputs.q.shape
    latent, page_size = inputs.head_dim_v, inputs.k_cache.shape[1]
    pages = -(-int(inputs.cache_seqlens.max()) // page_size)
    # unused entries of a table may be out of range
    table = inputs.block_table[:, :pages].clamp(0, inputs.k_cache.shape[0] - 1).long()
    rows = gathered(inputs.k_cache, table, room).view(b, pages * page_size, 1, width)
    q_latent, q_rope = inputs.q[..., :latent].contiguous(), inputs.q[..., latent:].contiguous()
    schedule = module.get_scheduler_metadata(
        b, s_q, pages * page_size, h_q, 1, width - latent, inputs.cache_seqlens, qkv_dtype=inputs.q.dtype,
        headdim_v=latent, causal=inputs.causal,
    )  # fmt: skip

    def run(schedule: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = module.flash_attn_with_kvcache(
            q_rope, rows[..., latent:], rows[..., :latent], qv=q_latent, cache_seqlens=inputs.cache_seqlens,
            softmax_scale=inputs.softmax_scale, causal=inputs.causal, scheduler_metadata=schedule,
            return_softmax_lse=True,
        )  # fmt: skip
        return out, lse

    return functools.partial(run, None), functools.partial(run, schedule)


def gathered(k_cache: Tensor, table: Tensor, room: Tensor) -> Tensor:
    """The pages of `table` [b, n] in its order, copied into the first b * n pages of `room`."""
    return torch.index_select(k_cache, 0, table.flatten(), out=room[: table.numel()])


PEERS = {
    "flash_mla": Peer("FlashMLA", "sgl-flash-mla", FlashMlaBackend, _flash_mla),
    "fa3": Peer("FlashAttention-3", "fa3-fwd", lambda: importlib.import_module("fa3_fwd_interface"), _fa3),
}


def unavailable(name: str) -> str | None:
    """None when the peer can be imported and a Hopper GPU is present, else the reason."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    peer = PEERS[name]
    try:
        peer.load()
    except (BackendError, ImportError, OSError, RuntimeError) as error:
        return f"{peer.distribution} cannot be used: {error}"
    return None


def prepare(name: str, inputs: Inputs, room: Tensor) -> tuple[Run, Run]:
    """Two calls of peer `name` on `inputs`: the whole operation, and one whose plan is made here, before.

    room: pages for a contiguous copy of the cache, each row as long as the longest (kernels.pool). Each call
    returns out [b, s_q, h_q, head_dim_v], and lse in the peer's own shape.
    """
    return PEERS[name].prepare(inputs, room)
