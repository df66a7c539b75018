"""The Triton kernels of a decode step against torch, in Triton's interpreter, which needs no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from container.serving import experts, fused, gemv, rows
from container.serving.engine import Engine
from tests.container.serving.conftest import write_checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_paths.py runs them compiled")
EPS = 1e-6


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def test_rows() -> None:
    x, delta, weight = torch.randn(3, 60), torch.randn(3, 60), torch.rand(60)
    total, out = rows.add_norm(x, delta, weight, EPS)
    close(total, x + delta)
    close(out, normed(x + delta, weight))
    close(rows.add_norm(x[:, :40], None, weight[:40], EPS)[1], normed(x[:, :40], weight[:40]))
    close(rows.silu_product(torch.cat((x, delta), dim=1)), F.silu(x) * delta)


def test_greedy_takes_the_first_of_the_largest_and_tells_what_is_not_finite() -> None:
    logits = torch.randn(5, 300)
    logits[0, 5] = logits[0, 9] = 9.0
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    logits[4, 299] = 9.0
    assert rows.greedy(logits).tolist() == [5, -1, -1, -1, 299]
    assert fused.greedy(logits).tolist() == [5, -1, -1, -1, 299]


@pytest.mark.parametrize(
    ("sigmoid", "count", "groups", "kept", "choices"),
    [(True, 8, 4, 2, 3), (False, 8, 4, 2, 3), (False, 64, 1, 1, 6), (True, 10, 1, 1, 2), (True, 9, 3, 2, 4)],
)
def test_route(sigmoid: bool, count: int, groups: int, kept: int, choices: int) -> None:
    logits = torch.randn(4, count)
    bias = torch.randn(count) / 10 if sigmoid else None
    shares, chosen = experts.route(logits, bias, choices, groups, kept, sigmoid, 2.5)
    scores = logits.softmax(dim=-1) if bias is None else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if kept < groups:
        grouped = choice.view(4, groups, -1)
        best = grouped.topk(2 if sigmoid else 1, dim=-1).values.sum(dim=-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(kept).indices, True)
        choice = grouped.masked_fill(~keep[..., None], float("-inf") if sigmoid else 0.0).flatten(1)
    expected = choice.topk(choices, dim=-1).indices
    weights = scores.gather(1, expected)
    assert torch.equal(chosen.long(), expected)
    close(shares, 2.5 * (weights / weights.sum(dim=-1, keepdim=True) if sigmoid else weights))


def test_route_of_nan_names_real_experts() -> None:
    logits = torch.full((1, 10), float("nan"))
    assert sorted(experts.route(logits, None, 3, 1, 1, False, 1.0)[1][0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "choices", "count", "hidden", "width"),
    [(1, 2, 4, 64, 40), (5, 3, 5, 136, 24), (2, 1, 1, 8, 516), (40, 2, 3, 40, 72)],
)
def test_experts(tokens: int, choices: int, count: int, hidden: int, width: int) -> None:
    x, shared = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    w_in = torch.randn(count, 2 * width, hidden) / hidden**0.5
    w_out = torch.randn(count, hidden, width) / width**0.5
    chosen = torch.stack([torch.randperm(count)[:choices] for _ in range(tokens)]).int()
    shares = torch.rand(tokens, choices)
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for expert, share in zip(chosen[token], shares[token], strict=True):
            gate, up = (w_in[expert] @ x[token]).chunk(2)
            expected[token] += share * (w_out[expert] @ (F.silu(gate) * up))
    close(experts.routed_experts(x, w_in, w_out, chosen, shares, shared), expected + shared)
    if tokens == 1:
        inner, weight = torch.randn(1, 30), torch.randn(hidden, 30)
        close(gemv.chosen_experts(x, w_in, w_out, chosen, shares, inner, weight), expected + inner @ weight.T)


def test_products_of_one_row() -> None:
    x, delta, norm = torch.randn(1, 60), torch.randn(1, 60), torch.rand(60)
    weight, router = torch.randn(92, 60), torch.randn(7, 60)
    h = normed(x + delta, norm)
    out, total = gemv.linear(x, weight, delta=delta, norm=norm, eps=EPS)
    close(out, h @ weight.T)
    close(total, x + delta)
    close(gemv.linear(x, weight)[0], x @ weight.T)
    gate, up = (h @ weight.T).chunk(2, dim=-1)
    out, total, logits, seen = gemv.linear_and_router(x, weight, delta, norm, EPS, router)
    close(out, F.silu(gate) * up)
    close(total, x + delta)
    close(logits, h @ router.T)
    close(seen, h)


def test_a_row_longer_than_a_tile() -> None:
    x, weight, norm = torch.randn(1, 5000), torch.randn(10, 5000), torch.rand(5000)
    close(gemv.linear(x, weight, norm=norm, eps=EPS)[0], normed(x, norm) @ weight.T)


def test_a_whole_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "v3-yarn")
    engine = Engine.load(tmp_path, backend="reference", kv_cache_dtype="float32")
    prompts = [[9, 3, 4], [5, 6]]
    together = [c.token_ids for c in engine.generate(prompts, 3, ignore_eos=True)]
    monkeypatch.setattr(fused, "TRITON_DEVICES", ["cpu"])
    assert [c.token_ids for c in engine.generate(prompts, 3, ignore_eos=True)] == together
    assert engine.generate(prompts[:1], 3, ignore_eos=True)[0].token_ids == together[0]
