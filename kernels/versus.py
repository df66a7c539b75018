"""`kernels.bench --peers`: our backends and the peers on the grid, side by side, each call a CUDA graph."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
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
from kernels.limits import Limits
from kernels.limits import measured as measured_limits
from kernels.machine import device_name
from kernels.package import LIBRARY, KernelPackage, file_sha256
from kernels.pool import PagePool
from kernels.timing import Repeatable, in_turn, repeatable
from kernels.versus_rows import NOTHING, PLANNED, Comparison, Row, read, write_line
from kernels.versus_table import RATE_BYTES, render
from kernels.workloads import Inputs

RESULTS = Path(__file__).with_name("RESULTS.md")
FLUSH_BYTES = 256 << 20  # five times an H100's L2 cache
Calls = Mapping[str, Callable[[], tuple[Tensor, Tensor]]]


def against_peers(options: argparse.Namespace, heads: str) -> int:
    """Measure the chosen cases, print them, and write RESULTS.md when they were the whole grid.

    options: the command line of kernels.bench; heads: its default. With --rows nothing is measured. Raises
    ValueError without a Hopper GPU or a case, or when the pool of pages does not fit. Returns 1 when an
    output disagrees with ours or something was not measured, else 0.
    """
    if options.rows:
        run, rows = read(options.rows)
        return publish(run, rows, options.results)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ValueError("--peers needs a GPU of compute capability 9.0")
    if options.workload:
        cases = shapes(options.workload, options.heads or heads, options.kv_dtype == "fp8_ds_mla")
    else:
        cases = select(full_grid(), options.cases) if options.cases else full_grid()
    ours: dict[str, Backend] = {name: library_backend(path) for name, path in options.library}
    ours = ours or {"hopper": get_backend("hopper", options.kernel_dir)}
    reasons = {name: peers.unavailable(name) for name in peers.PEERS}
    names = [name for name, reason in reasons.items() if reason is None]
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is not measured: {reason}", file=sys.stderr)
    partial = options.cases or options.workload or options.library or any(reasons.values())
    device = torch.device("cuda", torch.cuda.current_device())
    return measure(options, ours, names, cases, device, whole=not partial)


def measure(
    options: argparse.Namespace, ours: Mapping[str, Backend], names: Sequence[str], cases: Sequence[GridCase],
    device: torch.device, whole: bool,
) -> int:  # fmt: skip
    """Compare on `cases`, print each and append it to --out as it is measured, then publish the page.

    Without --results the page goes to RESULTS.md if `cases` are the `whole` grid with every peer and all of
    them were tried. Returns as `against_peers`.
    """
    pool = PagePool(cases, device, int(options.pool_gib * 2**30))
    machine = f"{device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    versions = tuple(peers.PEERS[name].version() for name in names)
    limits = measured_limits(pool.memory[:RATE_BYTES])
    run = Comparison(next(iter(ours)), machine, versions, pool.bytes, limits)
    rows: list[Row] = []
    with options.out.open("w") if options.out else contextlib.nullcontext() as file:
        if file:
            write_line(file, run)
        try:
            for row in compare(ours, names, cases, options.rounds, pool):
                rows.append(row)
                print(json.dumps(medians(row, limits)), flush=True)
                if file:
                    write_line(file, row)
        except (KeyboardInterrupt, Exception) as error:  # what was measured is worth a page
            print(f"stopped after {len(rows)} of {len(cases)} cases: {error!r}", file=sys.stderr)
    tried = len(rows) == len(cases)
    return publish(run, rows, options.results or (RESULTS if whole and tried else None)) or int(not tried)


def publish(run: Comparison, rows: Sequence[Row], results: Path | None) -> int:
    """Print the page, and write it to `results`. Returns as `against_peers`."""
    if not any(run.ours in row.cold for row in rows):
        print("nothing was measured", file=sys.stderr)
        return 1
    page = render(run, rows)
    print(page)
    if results:
        results.write_text(page)
    return int(any(row.disagreeing or row.failures for row in rows))


def compare(
    ours: Mapping[str, Backend], names: Sequence[str], cases: Sequence[GridCase], rounds: int, pool: PagePool
) -> Iterator[Row]:
    """Measure each case with `ours` and the peers `names`; peers take no FP8 cache, so they miss its cases.

    All read pages of `pool`. The whole operation is timed, the schedule included; a peer is also timed with
    its schedule made before. On a GPU a call is a CUDA graph. Who runs out of memory misses that case, and
    the row says so.
    """
    device = pool.device
    flush = torch.zeros(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    counter = torch.zeros(1, device=device)
    nothing = repeatable(functools.partial(counter.add_, 1), device)
    gc.freeze()  # with torch's modules among what is collected, each case would take a tenth of a second more
    try:
        for case in cases:
            yield measured(case, ours, () if case.fp8 else names, rounds, pool, flush, nothing)
            recover(device)
    finally:
        gc.unfreeze()


def measured(
    case: GridCase, ours: Mapping[str, Backend], names: Sequence[str], rounds: int, pool: PagePool,
    flush: Tensor, nothing: Repeatable,
) -> Row:  # fmt: skip
    """One case: what runs on it, first once for its output, then made repeatable, then all in turn."""
    inputs = pool.inputs(case)
    repeatables: dict[str, Repeatable] = {}
    differences: dict[str, float] = {}
    failures: dict[str, str] = {}
    first: Tensor | None = None
    for name, prepare in prepared(inputs, pool.room(case), ours, names).items():
        try:
            for name, call in prepare().items():  # a peer's two calls have names of their own
                out = call()[0]
                if first is None:
                    first = out
                else:
                    differences[name] = relative(out, first)
                repeatables[name] = repeatable(call, pool.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failures[name] = "out of memory"
        if name in failures:  # not above, where the error still holds what was allocated
            recover(pool.device)
    if not set(ours) & set(repeatables):  # then there is nothing to compare with
        return Row(case, {}, {}, {}, failures)
    repeatables[NOTHING] = nothing
    cold, warm = (in_turn(repeatables, pool.device, rounds, how) for how in (flush, None))
    return Row(case, cold, warm, differences, failures)


def prepared(
    inputs: Inputs, room: Tensor, ours: Mapping[str, Backend], names: Sequence[str]
) -> Mapping[str, Callable[[], Calls]]:
    """For everything that runs on `inputs`, ours first, what makes its calls: a peer has two."""

    def of_backend(name: str, backend: Backend) -> Calls:
        return {name: functools.partial(backend, *inputs.arguments())}

    def of_peer(name: str) -> Calls:
        whole, planned = peers.prepare(name, inputs, room)
        return {name: whole, name + PLANNED: planned}

    makers = {name: functools.partial(of_backend, name, backend) for name, backend in ours.items()}
    return makers | {name: functools.partial(of_peer, name) for name in names}


def relative(out: Tensor, first: Tensor) -> float:
    """How far an output is from the first one, in the 2-norm."""
    return float((out.float() - first.float()).norm() / first.float().norm())


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, or that of a library which allocates by itself."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def recover(device: torch.device) -> None:
    """Give back what the last case took: a capture cannot, and would run out of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def medians(row: Row, limits: Limits) -> dict[str, object]:
    """A row in short, for a line of output."""
    cold, warm = (
        {name: round(timing.p50_us, 1) for name, timing in times.items()} for times in (row.cold, row.warm)
    )
    shown = {"case": row.case.name, "floor": round(row.case.floor_us(limits), 1), "cold": cold, "warm": warm}
    return shown | ({"failed": dict(row.failures)} if row.failures else {})


def library_backend(path: Path) -> Backend:
    """The hopper target from a library that was not packaged, such as one compiled by hand."""
    folder = Path(tempfile.mkdtemp(prefix="mla-library-"))
    (folder / LIBRARY).symlink_to(path.resolve())
    return CompiledBackend(KernelPackage(folder, "hopper", file_sha256(path), {}))
