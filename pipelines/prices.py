"""Estimates in US dollars from the dated tables config/prices/<region>.yaml; the bill counts, not these."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines.settings import CONFIG

HOURS_A_MONTH = 730


@dataclass(frozen=True)
class Prices:
    """On-demand prices of one region. hour: instance type to dollars an hour; empty without a table."""

    region: str
    read: datetime.date | None
    hour: dict[str, float]

    @classmethod
    def load(cls, region: str, folder: Path = CONFIG / "prices") -> Prices:
        """The region's table, an empty one when there is none: an estimate then says so."""
        path = folder / f"{region}.yaml"
        if not path.is_file():
            return cls(region, None, {})
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(region, table["read"], {name: float(one) for name, one in table["instance_hour"].items()})

    def of(self, instance_type: str, hours: float, count: int = 1) -> float | None:
        """Dollars for `count` instances over `hours`; None when the type has no price."""
        price = self.hour.get(instance_type)
        return None if price is None else price * hours * count

    def source(self) -> str:
        """Where the figures come from, for a person."""
        if self.read is None:
            return f"no price table for {self.region}: add config/prices/{self.region}.yaml"
        return f"on demand, {self.region}, table of {self.read}"


@dataclass(frozen=True)
class Cost:
    """One line of an estimate; dollars None when a price is missing."""

    what: str
    dollars: float | None
    unit: str
    basis: str

    def __str__(self) -> str:
        figure = "unpriced" if self.dollars is None else f"{self.dollars:.2f} USD"
        return f"{self.what}: {figure} {self.unit} ({self.basis})"


def per_million_tokens(dollars_an_hour: float, tokens_a_second: float) -> float:
    """Dollars for a million generated tokens of a server that is always busy."""
    return dollars_an_hour / (tokens_a_second * 3600) * 1e6
