"""Chooses tokens from logits: greedy, or by temperature, top-k and top-p with a generator a request."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from container.serving.sequence import Logprob, Sequence


@dataclass(frozen=True)
class Choice:
    """The token of one row; None when its logits were not finite."""

    token_id: int | None
    logprob: Logprob | None = None


def choose(logits: Tensor, sequences: Many[Sequence], best: Tensor) -> list[Choice]:
    """One token for each row of logits float32 [R, vocabulary]; a row's outcome depends on no other row.

    `best` is `greedy(logits)`, on whatever device. A sampled token is argmax(p / e) with e exponential from
    the sequence's own generator, which draws from p.
    """
    tokens = best.tolist()
    sampled = [row for row, s in enumerate(sequences) if s.sampling.temperature > 0 and tokens[row] >= 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        probabilities = _probabilities(logits[rows], [sequences[row] for row in sampled])
        noise = torch.empty_like(probabilities)
        for row, target in zip(sampled, noise, strict=True):
            target.exponential_(generator=sequences[row].generator)
        drawn = (probabilities / noise.clamp_min(1e-20)).argmax(dim=-1)
        for row, token in zip(sampled, drawn.tolist(), strict=True):
            tokens[row] = token
    choices = []
    for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True)):
        if token < 0:
            choices.append(Choice(None))
        elif sequence.sampling.logprobs is None:
            choices.append(Choice(token))
        else:
            choices.append(Choice(token, _logprob(logits[row], token, sequence.sampling.logprobs)))
    return choices


def _probabilities(logits: Tensor, sequences: Many[Sequence]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    settings = [s.sampling for s in sequences]
    logits = logits / column([max(s.temperature, 1e-5) for s in settings])
    if all(s.top_k == 0 and s.top_p == 1 for s in settings):
        return logits.softmax(dim=-1)
    size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(size, device=logits.device)
    outside = rank >= column([s.top_k or size for s in settings])
    p = ordered.masked_fill(outside, float("-inf")).softmax(dim=-1)
    # the token that crosses top_p stays: what precedes it is below top_p
    p = p.masked_fill(p.cumsum(dim=-1) - p >= column([s.top_p for s in settings]), 0.0)
    return torch.zeros_like(p).scatter_(1, order, p)


def _logprob(logits: Tensor, token: int, alternatives: int) -> Logprob:
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, logprobs.numel()))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprob(token, logprobs[token].item(), top)
