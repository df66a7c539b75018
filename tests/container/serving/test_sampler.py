"""Token choice: the distributions asked for, reproducible, and each row for itself."""

import pytest
import torch

from container.serving import sampler
from container.serving.fused import greedy
from container.serving.sampler import Choice
from container.serving.sequence import BadRequest, Sampling, Sequence
from container.serving.tokenizer import Detokenizer, Tokenizer

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])
DRAWS = 1500


def sequence(seed: int = 0, **settings: object) -> Sequence:
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return Sequence(0, [1], sampling, Detokenizer(Tokenizer(None)), generator)


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    return sampler.choose(logits, sequences, greedy(logits))


def frequencies(**settings: object) -> torch.Tensor:
    one = sequence(**settings)
    tokens = [choose(LOGITS[None], [one])[0].token_id for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, 5),
        ({"temperature": 2.5}, 5),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_p": 0.7}, 2),  # 0.63 + 0.23 crosses 0.7
        ({"temperature": 1.0, "top_p": 0.01}, 1),
        ({"temperature": 1.0, "top_p": 1e-60}, 1),  # no float32 above 0
        ({"temperature": 1.0, "top_k": (1 << 31) - 1}, 5),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.99}, 2),
    ],
)
def test_draws_from_the_distribution_asked_for(settings: dict[str, float], kept: int) -> None:
    p = (LOGITS / settings["temperature"]).softmax(dim=-1)
    allowed = torch.zeros(5, dtype=torch.bool)
    allowed[LOGITS.argsort(descending=True)[:kept]] = True
    expected = p * allowed / (p * allowed).sum()
    drawn = frequencies(**settings)
    # four standard deviations of a frequency over 1500 draws are at most 0.052
    assert torch.allclose(drawn, expected, atol=0.052)
    assert drawn[~allowed].sum() == 0


def test_greedy_takes_the_maximum() -> None:
    assert choose(LOGITS[None], [sequence()])[0].token_id == 1


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    settings: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
    ]
    alone = [choose(rows[i : i + 1], [sequence(i, **s)])[0].token_id for i, s in enumerate(settings)]
    together = choose(rows, [sequence(i, **s) for i, s in enumerate(settings)])
    assert [c.token_id for c in together] == alone


def test_a_row_that_is_not_finite_fails_alone() -> None:
    rows = LOGITS.repeat(3, 1)
    rows[1, 2] = float("nan")
    assert [c.token_id for c in choose(rows, [sequence() for _ in rows])] == [1, None, 1]


def test_logprobs() -> None:
    choice = choose(LOGITS[None], [sequence(logprobs=2, temperature=0.5)])[0]
    expected = LOGITS.log_softmax(dim=-1)
    assert choice.logprob is not None
    assert choice.logprob.logprob == pytest.approx(expected[choice.token_id].item())
    assert [i for i, _ in choice.logprob.top] == [1, 2]
    assert choice.logprob.top[0][1] == pytest.approx(expected[1].item())


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"top_k": 1 << 31},
        {"stop": ("",)},
        {"stop": ("a" * 257,)},
        {"logprobs": 21},
        {"seed": 2**63},
    ],
)
def test_refuses_settings_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(BadRequest) as caught:
        Sampling(**bad)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(bad))
