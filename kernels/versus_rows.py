"""What a comparison measured, as values and as the lines of a file that grows with the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from kernels.auto import AGREEMENT
from kernels.grid import GridCase
from kernels.limits import Limits
from kernels.timing import Timing

PLANNED = " planned"  # suffix of a peer whose schedule was made before the timed call
NOTHING = "nothing"  # a graph of one trivial kernel: what the measurement itself costs
Times = Mapping[str, Timing]


@dataclass(frozen=True)
class Comparison:
    """What all rows of a run share; `ours` names our backend among a row's times."""

    ours: str
    machine: str
    peers: tuple[str, ...]  # with their versions
    pool_bytes: int
    limits: Limits


@dataclass(frozen=True)
class Row:
    """One case: times by name, with a cold and with a warm L2, and how far outputs are from our first one."""

    case: GridCase
    cold: Times
    warm: Times
    differences: Mapping[str, float]  # relative, in the 2-norm
    failures: Mapping[str, str] = field(default_factory=dict)  # who was not measured, and why

    @property
    def disagreeing(self) -> list[str]:
        """Names whose output is not ours: their times compare different work."""
        return [name for name, error in self.differences.items() if not error <= AGREEMENT[torch.bfloat16]]


def write_line(file: TextIO, item: Comparison | Row) -> None:
    """Append the run, and then each row once it is measured: what ends the process leaves the ones before."""
    file.write(json.dumps(dataclasses.asdict(item)) + "\n")
    file.flush()


def read(path: Path) -> tuple[Comparison, list[Row]]:
    """The run and its rows. Raises ValueError for a file that `write_line` did not write, naming the line."""
    items: list[Any] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            items.append(_row(json.loads(line)) if items else _run(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number} is no line of `kernels.bench --peers --out`: {error!r}"
            ) from error
    if not items:
        raise ValueError(f"{path} is empty, expected what `kernels.bench --peers --out` wrote")
    return items[0], items[1:]


def _run(values: dict[str, Any]) -> Comparison:
    return Comparison(**values | {"peers": tuple(values["peers"]), "limits": Limits(**values["limits"])})


def _row(values: dict[str, Any]) -> Row:
    case = GridCase(**values["case"] | {"lengths": tuple(values["case"]["lengths"])})
    cold, warm = (
        {name: Timing(**timing) for name, timing in values[label].items()} for label in ("cold", "warm")
    )
    return Row(case, cold, warm, values["differences"], values["failures"])
