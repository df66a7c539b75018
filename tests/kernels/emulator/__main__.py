"""`python -m tests.kernels.emulator`: the hopper target's cases under many orders of events."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from kernels.checks import run_case
from tests.kernels.emulator import EmulatedFailure, Emulator, build
from tests.kernels.hopper_cases import BF16, CASES, FP8, row_tiles


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line a case, and what is wrong with it; 1 when anything is."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.emulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="orders of events tried for each")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them")
    parser.add_argument(
        "--multiprocessors", type=int, default=8, metavar="N", help="of the device, at most 63"
    )
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument(
        "--fault",
        default="",
        metavar="FILE:LINE",
        help="leave this synchronisation out (!FILE:LINE: invert the parity)",
    )
    options = parser.parse_args(arguments)
    library = build()
    cases = [dataclasses.replace(case, name=f"{case.name}, 16 bits") for case in CASES]
    cases += [
        dataclasses.replace(case, name=f"{case.name}, fp8", q_dtype=BF16, kv_dtype=FP8) for case in CASES
    ]
    wrong = 0
    for case in sorted(cases, key=row_tiles):
        if options.cases not in case.name:
            continue
        started = time.perf_counter()
        for seed in range(options.first, options.first + options.seeds):
            emulator = Emulator(library, options.multiprocessors, seed, options.fault)
            try:
                result = run_case(emulator, case, seed=1)
                text = "" if result.passed else str(result)
            except EmulatedFailure as error:
                text = str(error)
            if options.fault and options.fault.removeprefix("!") not in emulator.synchronisations():
                text = text or f"no run has come by a synchronisation at {options.fault}"
            if text:
                wrong += 1
                print(f"{case.name}, seed {seed}: {text}", flush=True)
        print(f"{case.name}: {options.seeds} runs, {time.perf_counter() - started:.1f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
