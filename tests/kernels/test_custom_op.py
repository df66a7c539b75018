"""torch.ops.mla.decode under torch's own checks, torch.compile, torch.export and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.custom_op
from kernels import Backend
from kernels.workloads import Inputs, make_inputs


def causal() -> Inputs:
    return make_inputs([70, 2], h_q=4, s_q=3, causal=True)


CASES: dict[str, Callable[[], Inputs]] = {
    "ragged": lambda: make_inputs([70, 3], h_q=4),
    "causal, rows shorter than their queries": causal,
    "all lengths zero": lambda: make_inputs([0, 0], h_q=4),
    "no rows": lambda: make_inputs([], h_q=4),
    "fp8 cache": lambda: make_inputs([70], h_q=4, kv_dtype=torch.uint8),
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_passes_torchs_own_checks(case: Callable[[], Inputs], backend: str) -> None:
    torch.library.opcheck(kernels.custom_op.decode, (*case().arguments(), backend))


def test_strided_queries_pass_too() -> None:
    q, *rest = causal().arguments()
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(kernels.custom_op.decode, (strided, *rest, "cpu"))


def test_is_the_backend(cpu: Backend) -> None:
    arguments = make_inputs([70, 3], h_q=4).arguments()
    found = torch.ops.mla.decode(*arguments, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, cpu(*arguments), strict=True))


def test_one_compiled_graph_serves_every_batch_and_cache() -> None:
    def layer(q: Tensor, k_cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        out, lse = torch.ops.mla.decode(q * 2, k_cache, table, lengths, 512, 0.1, False, "cpu")
        return out.float().sum(-1) + lse.transpose(1, 2)

    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for lengths in ([70, 3], [5, 6, 7, 300], [0, 64, 128]):
        arguments = make_inputs(lengths, h_q=4, seed=len(lengths)).arguments()[:4]
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))
    assert len(graphs) == 1


def test_under_inductors_own_frontend() -> None:
    arguments = make_inputs([70, 3], h_q=4).arguments()

    def layer(q: Tensor) -> Tensor:
        out, _ = torch.ops.mla.decode(q * 2, *arguments[1:], "cpu")
        return out.float().sum(-1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), layer(arguments[0]))


def test_export_with_a_dynamic_batch() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k_cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            return torch.ops.mla.decode(q, k_cache, table, lengths, 512, 0.1, True, "cpu")[0]

    batch, auto = torch.export.Dim("batch", min=1, max=64), torch.export.Dim.AUTO
    shapes = ({0: batch}, {0: auto}, {0: batch, 1: auto}, {0: batch})
    exported = torch.export.export(Layer(), causal().arguments()[:4], dynamic_shapes=shapes)
    other = make_inputs([5, 6, 100], h_q=4, s_q=3, causal=True).arguments()[:4]
    torch.testing.assert_close(exported.module()(*other), Layer()(*other))


def test_a_gradient_is_refused_on_the_way_back() -> None:
    q, *rest = make_inputs([70], h_q=4).arguments()
    out, _ = torch.ops.mla.decode(q.requires_grad_(), *rest, "cpu")
    with pytest.raises(RuntimeError, match=r"backward through mla.decode.* no autograd formula"):
        out.float().sum().backward()
