"""A fleet: the serving containers of one endpoint configuration, and how requests are spread over them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.sandbox.serving import Replica

NewReplica = Callable[[dict[str, Any], dict[str, Any]], Replica]
"""Variant of the configuration and container of its model -> a replica, not yet started."""


@dataclass
class Variant:
    """A running production variant: one process stands for all its instances."""

    config: dict[str, Any]
    image: str
    replica: Replica
    weight: float
    instances: int  # as wanted; `running` of them are up
    running: int

    @property
    def name(self) -> str:
        """The variant's name."""
        return str(self.config["VariantName"])

    def summary(self, status: str | None, words: str, since: float) -> dict[str, Any]:
        """As DescribeEndpoint lists it; ``status`` is what it is doing, in ``words``, None when it serves."""
        found: dict[str, Any] = {
            "VariantName": self.name,
            "DeployedImages": [
                {"SpecifiedImage": self.image, "ResolvedImage": self.image, "ResolutionTime": since}
            ],
            "CurrentWeight": self.weight,
            "DesiredWeight": self.weight,
            "CurrentInstanceCount": self.running,
            "DesiredInstanceCount": self.instances,
        }
        if status:
            found["VariantStatus"] = [{"Status": status, "StatusMessage": words, "StartTime": since}]
        return found


class Fleet:
    """The containers of one endpoint configuration.

    Args:
        config: the endpoint configuration's record.
        find_container: container of a model, by the model's name.
    """

    def __init__(
        self,
        config: dict[str, Any],
        find_container: Callable[[str], dict[str, Any]],
        new_replica: NewReplica,
    ) -> None:
        self.config = config
        self.variants: list[Variant] = []
        self._spread = Spread()
        for variant in config["ProductionVariants"]:
            container = find_container(variant["ModelName"])
            replica = new_replica(variant, container)
            weight = float(variant.get("InitialVariantWeight", 1.0))
            instances = variant["InitialInstanceCount"]
            self.variants.append(Variant(variant, container["Image"], replica, weight, instances, instances))

    @property
    def name(self) -> str:
        """Name of the endpoint configuration."""
        return str(self.config["EndpointConfigName"])

    @property
    def instances(self) -> int:
        """Instances of all variants."""
        return sum(v.instances for v in self.variants)

    @property
    def running(self) -> int:
        """Instances of all variants that are up."""
        return sum(v.running for v in self.variants)

    def run(self, share: float) -> None:
        """Have this share of each variant's instances up."""
        for variant in self.variants:
            variant.running = round(variant.instances * share)

    def retain(self, other: Fleet, dropped: set[str]) -> None:
        """Take over weights and instance counts of the other fleet's variants, but for the ``dropped``."""
        known = {v.name: v for v in other.variants}
        for variant in self.variants:
            if variant.name in known and "DesiredWeight" not in dropped:
                variant.weight = known[variant.name].weight
            if variant.name in known and "DesiredInstanceCount" not in dropped:
                variant.instances = variant.running = known[variant.name].instances

    def start(self, startup_s: float | None, cancelled: threading.Event) -> None:
        """Start every variant and wait until all are healthy.

        Raises:
            ContainerFailure: the first that failed; the caller stops the fleet.
        """

        def bring_up(variant: Variant) -> None:
            variant.replica.start()
            variant.replica.wait_healthy(startup_s, cancelled)

        with ThreadPoolExecutor(len(self.variants)) as pool:
            for outcome in [pool.submit(bring_up, v) for v in self.variants]:
                outcome.result()

    def stop(self) -> None:
        """Stop every variant."""
        with ThreadPoolExecutor(len(self.variants)) as pool:
            list(pool.map(lambda v: v.replica.stop(), self.variants))

    def pick(self, name: str | None) -> Variant:
        """The variant for one request: the named one, else by weight.

        Raises:
            LookupError: no variant of this name, or all weights are 0.
        """
        if name is not None:
            found = next((v for v in self.variants if v.name == name), None)
            if found is None:
                raise LookupError(f"there is no variant '{name}': {[v.name for v in self.variants]}")
            return found
        return self.variants[self._spread.next([v.weight for v in self.variants])]


class Spread:
    """Spreads requests by weight without chance: after n requests each share is right to within one request.

    Smooth weighted round robin, as nginx does it.
    """

    def __init__(self) -> None:
        self._credit: list[float] = []
        self._lock = threading.Lock()

    def next(self, weights: list[float]) -> int:
        """Index of the weight whose turn it is.

        Raises:
            LookupError: all weights are 0.
        """
        total = sum(weights)
        if total <= 0:
            raise LookupError("every variant has weight 0")
        with self._lock:
            if len(self._credit) != len(weights):
                self._credit = [0.0] * len(weights)
            self._credit = [c + w for c, w in zip(self._credit, weights, strict=True)]
            turn = max(range(len(weights)), key=lambda i: (self._credit[i], -i))
            self._credit[turn] -= total
        return turn


_numbers = itertools.count(1)


def next_number() -> int:
    """A number no other replica of this process has."""
    return next(_numbers)
