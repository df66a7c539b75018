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
    p = logits.softmax(dim=-1)
    # only the rows that ask for it, so that the rest come out the same whoever their neighbours are
    limited = [row for row, s in enumerate(settings) if s.top_k or s.top_p < 1]
    if limited:
        rows = torch.tensor(limited, device=logits.device)
        size = logits.shape[-1]
        top_k = column([settings[row].top_k or size for row in limited])
        p[rows] = _limited(logits[rows], top_k, column([settings[row].top_p for row in limited]))
    return p


def _limited(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities [R, vocabulary] of the likeliest tokens, the rest 0; top_k and top_p [R, 1]."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    p = ordered.masked_fill(rank >= top_k, float("-inf")).softmax(dim=-1)
    # the token that crosses top_p stays: what precedes it is below top_p; the first always stays
    p = p.masked_fill((p.cumsum(dim=-1) - p >= top_p) & (rank > 0), 0.0)
    return torch.zeros_like(p).scatter_(1, order, p)


def _logprob(logits: Tensor, token: int, alternatives: int) -> Logprob:
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, logprobs.numel()))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprob(token, logprobs[token].item(), top)
