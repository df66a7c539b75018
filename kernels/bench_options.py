"""The command line of kernels.bench: what can be checked before minutes of measuring is checked here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.versus import RESULTS

WORKLOAD, HEADS = "interactive", "4,16,64,128"


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """What both commands read; argparse ends the process with a message for what is no such thing."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workload", help=f"preset or batch x length [x queries], ...; default: {WORKLOAD}")
    add("--heads", type=_heads, help=f"query heads, comma separated; default: {HEADS}")
    add("--backends", default="", help="names, comma separated; default: all that can be had here")
    add("--kernel-dir", type=Path, help="kernel artifact; default: build into the cache")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--kv-dtype", choices=["bfloat16", "float16", "float32", "fp8_ds_mla"], help="default: --dtype")
    add("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=1.0, help="time for each case")
    add("--threads", type=_positive, help="torch threads, which the cpu target uses too")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time torch.compile's baseline too",
    )
    add(
        "--out",
        type=_file,
        help="write the measurements as JSON; with --peers a line a case, as it is measured",
    )
    add = parser.add_argument_group("--peers").add_argument
    add("--peers", action="store_true", help="the hopper target beside FlashMLA and FlashAttention-3")
    add(
        "--cases",
        help='parts of names of the grid\'s cases, comma separated, such as "b4 s8192 q1 h16"; or markers',
    )
    add("--rows", type=Path, help="measure nothing, write the page of an earlier run from its --out")
    add(
        "--library",
        type=_library,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a compiled library instead; repeatable",
    )
    add("--rounds", type=_positive, default=21, help="replays of every graph")
    add(
        "--pool-gib",
        type=float,
        default=16.0,
        help="GiB of the one cache that all cases take their pages from, more if a case needs it; "
        "default: %(default)s",
    )
    add(
        "--results",
        type=_file,
        help=f"where to write the page; default: {RESULTS.name}, if all of it was measured",
    )
    return parser.parse_args(arguments)


def _heads(text: str) -> str:
    """For argparse: "4,16", which both commands read."""
    if all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no list of head counts such as 4,16")


def _device(text: str) -> torch.device:
    """For argparse: a device that is here."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None


def _positive(text: str) -> int:
    """For argparse."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no positive number")


def _library(text: str) -> tuple[str, Path]:
    """For argparse: a name and a file that is there."""
    name, _, file = text.partition("=")
    if name and Path(file).is_file():
        return name, Path(file)
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE with a file that is there")


def _file(text: str) -> Path:
    """For argparse: a file whose folder is there, before minutes of measuring."""
    if (path := Path(text)).parent.is_dir():
        return path
    raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
