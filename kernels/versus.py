"""`kernels.bench --peers`: our backends and the peers on the grid, side by side, each call a CUDA graph."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import peers
from kernels.backends import Backend, get_backend
from kernels.compiled import CompiledBackend
from kernels.grid import GridCase, full_grid, select, shapes
from kernels.machine import device_name
from kernels.package import LIBRARY, KernelPackage, file_sha256
from kernels.timing import captured, replayed
from kernels.versus_table import NOTHING, PLANNED, Row, render
from kernels.workloads import make_inputs

RESULTS = Path(__file__).with_name("RESULTS.md")
FLUSH_BYTES = 256 << 20  # five times an H100's L2 cache
SCALE = 192**-0.5  # DeepSeek's
Calls = Mapping[str, Callable[[], tuple[Tensor, Tensor]]]


def against_peers(options: argparse.Namespace, heads: str) -> int:
    """Measure the chosen cases, print them, and write RESULTS.md when they were the whole grid.

    options: the command line of kernels.bench; heads: its default. Raises ValueError without a Hopper GPU or
    a case. Returns 1 when an output disagrees with ours or a case was not measured, else 0.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ValueError("--peers needs a GPU of compute capability 9.0")
    if options.workload:
        cases = shapes(options.workload, options.heads or heads, options.kv_dtype == "fp8_ds_mla")
    else:
        cases = select(full_grid(), options.cases) if options.cases else full_grid()
    libraries = dict(text.split("=", 1) for text in options.library)
    ours: dict[str, Backend] = {name: library_backend(Path(path)) for name, path in libraries.items()}
    ours = ours or {"hopper": get_backend("hopper", options.kernel_dir)}
    reasons = {name: peers.unavailable(name) for name in peers.PEERS}
    names = [name for name, reason in reasons.items() if reason is None]
    rows: list[Row] = []
    try:
        for row in compare(ours, names, cases, options.rounds):
            rows.append(row)
            print(json.dumps(medians(row)), flush=True)
    except (KeyboardInterrupt, RuntimeError) as error:  # what was measured is worth a page
        print(f"stopped after {len(rows)} of {len(cases)} cases: {error!r}", file=sys.stderr)
    if not rows:
        return 1
    machine = f"{device_name(torch.device('cuda'))}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    page = render(rows, next(iter(ours)), machine, [peers.PEERS[name].version() for name in names])
    print(page)
    for name, reason in reasons.items():
        if reason:
            print(f"{name} was not measured: {reason}", file=sys.stderr)
    if options.out:
        options.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    partial = options.cases or options.workload or libraries or any(reasons.values())
    whole = not partial and len(rows) == len(cases)
    if results := options.results or (RESULTS if whole else None):
        results.write_text(page)
    return int(len(rows) < len(cases) or any(row.disagreeing for row in rows))


def compare(
    ours: Mapping[str, Backend], names: Sequence[str], cases: Sequence[GridCase], rounds: int
) -> Iterator[Row]:
    """Measure each case with `ours` and the peers `names`; peers take no FP8 cache, so they miss its cases.

    The whole operation is timed, the schedule included; a peer is also timed with its schedule made before.
    """
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    counter = torch.zeros(1, device="cuda")
    nothing = captured(functools.partial(counter.add_, 1))
    for case in cases:
        calls = prepared(case, ours, () if case.fp8 else names)
        differences = compared(calls)
        graphs = {name: captured(call) for name, call in calls.items()} | {NOTHING: nothing}
        yield Row(case, replayed(graphs, rounds, flush), replayed(graphs, rounds), differences)
        del calls, graphs  # before the next case takes as much memory
        torch.cuda.empty_cache()  # a capture cannot: the largest cases were out of memory without it


def prepared(case: GridCase, ours: Mapping[str, Backend], names: Sequence[str]) -> Calls:
    """Everything that runs on `case`, by name, ours first."""
    inputs = make_inputs(
        case.lengths, s_q=case.s_q, h_q=case.h_q, kv_dtype=case.kv_dtype, causal=case.s_q > 1,
        softmax_scale=SCALE, device="cuda", poison=False,
    )  # fmt: skip
    calls: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        name: functools.partial(backend, *inputs.arguments()) for name, backend in ours.items()
    }
    for name in names:
        calls[name], calls[name + PLANNED] = peers.prepare(name, inputs)
    return calls


def compared(calls: Calls) -> dict[str, float]:
    """How far each call's output is from the first one's."""
    outputs = {name: call()[0].float() for name, call in calls.items()}
    first = outputs.pop(next(iter(outputs)))
    return {name: float((out - first).norm() / first.norm()) for name, out in outputs.items()}


def medians(row: Row) -> dict[str, object]:
    """A row in short, for a line of output."""
    cold, warm = (
        {name: round(timing.p50_us, 1) for name, timing in times.items()} for times in (row.cold, row.warm)
    )
    return {"case": row.case.name, "floor": round(row.case.floor_us(), 1), "cold": cold, "warm": warm}


def library_backend(path: Path) -> Backend:
    """The hopper target from a library that was not packaged, such as one compiled by hand."""
    folder = Path(tempfile.mkdtemp(prefix="mla-library-"))
    (folder / LIBRARY).symlink_to(path.resolve())
    return CompiledBackend(KernelPackage(folder, "hopper", file_sha256(path), {}))
