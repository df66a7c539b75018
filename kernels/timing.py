"""Measure callables side by side: interleaved, so that drift of the machine touches all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Call = Callable[[], object]
# The device waits these cycles out, while the host queues what is timed: a call, the replay of a graph.
CALL_CYCLES, REPLAY_CYCLES = 1_000_000, 150_000


@dataclass(frozen=True)
class Timing:
    """Quantiles of one callable's time, microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float
    p90_us: float
    p99_us: float
    samples: int


@dataclass(frozen=True)
class Captured:
    """A call as a CUDA graph, and the call: the graph reads the memory of the tensors that it holds."""

    graph: torch.cuda.CUDAGraph
    call: Call

    def replay(self) -> None:
        """Run the call once more."""
        self.graph.replay()


Repeatable = Call | Captured


def one_call_us(call: Call, device: torch.device) -> float:
    """Microseconds of one call: on a CPU wall time, on a GPU the device's own.

    The host is ahead of the GPU, as it is where a CUDA graph is replayed; what a call makes the GPU wait for
    the host, such as reading lengths there, counts.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(CALL_CYCLES)
            begin.record()
            call()
            end.record()
            end.synchronize()
        return 1e3 * begin.elapsed_time(end)
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def best_seconds(call: Call, device: torch.device, repeats: int = 5) -> float:
    """The fastest of `repeats` calls after one warm-up, seconds; enough to choose between kernels."""
    one_call_us(call, device)
    return min(one_call_us(call, device) for _ in range(repeats)) / 1e6


def quantile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks of sorted values."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples_us: list[float]) -> Timing:
    """Quantiles of samples in microseconds."""
    ordered = sorted(samples_us)
    p20, p80, p90, p99 = (quantile(ordered, fraction) for fraction in (0.2, 0.8, 0.9, 0.99))
    return Timing(p20, statistics.median(ordered), p80, p90, p99, len(ordered))


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float = 1.0, least: int = 5, most: int = 200
) -> dict[str, Timing]:
    """Time every callable in turn, round after round, until `seconds` are spent or `most` rounds are done.

    Three untimed rounds come first. The order is rotated each round, so that none always runs in another's
    wake.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(3):
        for name in names:
            one_call_us(calls[name], device)
    deadline = time.perf_counter() + seconds
    for rounds in range(most):
        if rounds >= least and time.perf_counter() > deadline:
            break
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(one_call_us(calls[name], device))
    return {name: summarize(values) for name, values in samples.items()}


def repeatable(call: Call, device: torch.device) -> Repeatable:
    """What `in_turn` repeats: on a GPU the call as a CUDA graph, on a CPU the call."""
    return captured(call) if device.type == "cuda" else call


def in_turn(
    calls: Mapping[str, Repeatable], device: torch.device, rounds: int, flush: Tensor | None
) -> dict[str, Timing]:
    """Times of `calls`, round after round; `flush` as in `replayed`, without effect on a CPU."""
    if device.type == "cuda":
        return replayed(cast(Mapping[str, Captured], calls), rounds, flush)
    return interleaved(cast(Mapping[str, Call], calls), device, seconds=0, least=rounds, most=rounds)


def captured(call: Call) -> Captured:
    """`call` as a CUDA graph, after two runs on its stream that allocate and compile what it needs.

    The context manager torch.cuda.graph would empty torch's cache first, and gigabytes of inputs be allocated
    anew for the next graph.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
        call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return Captured(graph, call)


def replayed(graphs: Mapping[str, Captured], rounds: int, flush: Tensor | None = None) -> dict[str, Timing]:
    """Device time of every graph, interleaved in a random order each round.

    Before each replay `flush`, larger than the L2 cache, is overwritten; without it the graph itself is
    replayed, untimed, so that it finds in the L2 what it left there.
    """
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for number in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if flush is None:
                graphs[name].replay()
            else:
                flush.fill_(number % 2)
            torch.cuda._sleep(REPLAY_CYCLES)
            begin.record()
            graphs[name].replay()
            end.record()
            pairs[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: summarize([1e3 * a.elapsed_time(b) for a, b in some]) for name, some in pairs.items()}
