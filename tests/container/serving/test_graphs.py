"""Steps that start on tokens still on the device: the same tokens whatever ends in between, no page lost.

On a CPU the steps of the graphs run at once instead of being replayed; all else is what a GPU runs.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from container.serving.batch import Span
from container.serving.cache import PAGE
from container.serving.engine import Engine
from container.serving.fused import greedy
from container.serving.graphs import DecodeGraphs, StepInputs, every_eighth
from container.serving.sequence import Sampling, State


class Immediate(DecodeGraphs):
    """Graphs that are run, not captured. `early` counts the steps started on unread tokens."""

    early = 0

    def _capture_all(self) -> None:
        pass

    def start(self, spans: Any, after: Any = None) -> Any:
        self.early += after is not None
        return super().start(spans, after)

    def _replay(self, size: int) -> tuple[Tensor, Tensor]:
        logits = self._forward(self._inputs.batch(size))
        return logits, greedy(logits)

    def _mark(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)


@pytest.fixture
def ahead(tiny_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        engine = tiny_engine(**options)
        pages = -(-engine.max_model_len // PAGE)
        engine._graphs = Immediate(
            engine._eager, every_eighth(engine.options.max_batch), pages, torch.device("cpu")
        )
        return engine

    return make


PROMPTS = [[5] * n for n in (1, 9, 60, 64, 130)]


def test_the_same_tokens(ahead: Callable[..., Engine], tiny_engine: Callable[..., Engine]) -> None:
    engine = ahead(max_batch=6)
    got = engine.generate(PROMPTS, 70, ignore_eos=True)
    assert [c.token_ids for c in got] == [
        c.token_ids for c in tiny_engine().generate(PROMPTS, 70, ignore_eos=True)
    ]
    assert engine._graphs.early > 60
    assert engine.allocator.used == 0


def test_ends_that_come_as_a_surprise(
    ahead: Callable[..., Engine], tiny_engine: Callable[..., Engine]
) -> None:
    whole = tiny_engine().generate(PROMPTS, 40, ignore_eos=True)
    engine = ahead(max_batch=6)
    engine.config = replace(engine.config, eos_token_ids=(whole[1].token_ids[7],))
    stop = whole[2].text[12:15]
    sampling = [Sampling(40), Sampling(40), Sampling(40, stop=(stop,)), Sampling(13), Sampling(40, seed=1)]
    sequences = [engine.add(p, s) for p, s in zip(PROMPTS, sampling, strict=True)]
    while engine.busy:
        engine.step()
        if len(sequences[0].output) == 20:
            engine.abort(sequences[0])
    for sequence, completion in zip(sequences, whole, strict=True):
        assert sequence.output == completion.token_ids[: len(sequence.output)]
        assert sequence.state is State.FINISHED
    assert len(sequences[0].output) in (20, 21)
    assert sequences[1].finish_reason == "stop"
    assert len(sequences[3].output) <= 13
    assert engine.allocator.used == 0
    again = engine.generate(PROMPTS, 40, ignore_eos=True)  # a step of the last ones was still under way
    assert [c.token_ids for c in again] == [c.token_ids for c in whole]


def test_newcomers_join(ahead: Callable[..., Engine], tiny_engine: Callable[..., Engine]) -> None:
    engine = ahead(max_batch=3)
    first = engine.add(PROMPTS[1], Sampling(30, ignore_eos=True))
    for _ in range(10):
        engine.step()
    others = [engine.add(p, Sampling(30, ignore_eos=True)) for p in PROMPTS[2:]]
    while engine.busy:
        engine.step()
    expected = tiny_engine().generate(PROMPTS[1:], 30, ignore_eos=True)
    assert [s.output for s in (first, *others)] == [c.token_ids for c in expected]


def test_sampling_and_logprobs_wait_for_their_logits(
    ahead: Callable[..., Engine], tiny_engine: Callable[..., Engine]
) -> None:
    for settings in ({"temperature": 1.0, "seed": 3}, {"logprobs": 2}):
        engine = ahead()
        got = engine.generate(PROMPTS[:2], 20, ignore_eos=True, **settings)  # type: ignore[arg-type]
        expected = tiny_engine().generate(PROMPTS[:2], 20, ignore_eos=True, **settings)  # type: ignore[arg-type]
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]
        assert engine._graphs.early == 0


def test_rows_change_hands() -> None:
    """What a row held before does not show, however its page table is kept."""
    inputs = StepInputs(4, 8, torch.device("cpu"))
    first, second = [3, 4], [7]
    steps = [
        [Span([1], 70, first), Span([2], 5, second)],
        [Span([1], 71, first)],
        [Span([9], 6, second), Span([1], 72, first)],
        [Span([9], 7, second), Span([1], 128, first)],
    ]
    for step in steps:
        if step[-1].start == 128:
            first.append(5)
        inputs.set(step, 4, None)
        batch = inputs.batch(4)
        for row, span in enumerate(step):
            assert batch.rows.block_table[row, : len(span.pages)].tolist() == span.pages
            page, offset = divmod(span.start, PAGE)
            assert batch.slots[row] == span.pages[page] * PAGE + offset
            assert batch.rows.lengths[row] == span.start + 1
        assert batch.rows.lengths[len(step) :].tolist() == [0] * (4 - len(step))
    inputs.set(steps[0], 2, torch.tensor([8, -1], dtype=torch.int32))
    assert inputs.batch(2).tokens.tolist() == [8, 0]
