"""An endpoint update: new instances up, traffic moved in steps, alarms watched, old ones away or all back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.sandbox.errors import invalid

POLL_S = 0.05
AlarmStates = Callable[[list[str]], dict[str, str]]


@dataclass(frozen=True)
class Plan:
    """How traffic moves to the new fleet.

    Attributes:
        shares: the new fleet's share of the traffic after each shift, the last is 1.
        rolling: instances move with the traffic; otherwise both fleets are whole until the end.
        way_back: the share that moves at once when a rolling update is undone.
        bake_s: how long alarms are watched after each shift.
        termination_wait_s: how long the old fleet is kept after the last.
        timeout_s: the whole update may take this long.
        alarms: an alarm of these in state ALARM rolls the update back.
    """

    shares: tuple[float, ...] = (1.0,)
    bake_s: float = 0.0
    termination_wait_s: float = 0.0
    timeout_s: float = 8 * 3600.0
    alarms: tuple[str, ...] = ()
    rolling: bool = False
    way_back: float = 1.0

    def back_from(self, share: float) -> list[float]:
        """The new fleet's shares while the update is undone, from ``share`` down to 0."""
        shares = []
        while share > 0:
            share = max(0.0, share - self.way_back)
            shares.append(share if share > 1e-9 else 0.0)
            share = shares[-1]
        return shares


class RolledBack(Exception):
    """Why an update was undone."""


def plan(config: dict[str, Any] | None, instances: int, alarm_states: AlarmStates) -> Plan:
    """The plan that a DeploymentConfig asks for, with ``instances`` in the new fleet.

    Raises:
        ServiceError: ValidationException: sizes the service refuses, or an alarm that does not exist.
    """
    config = config or {}
    alarms = tuple(a["AlarmName"] for a in config.get("AutoRollbackConfiguration", {}).get("Alarms", []))
    missing = sorted(set(alarms) - set(alarm_states(list(alarms))))
    if missing:
        raise invalid(f"The alarms {missing} in AutoRollbackConfiguration do not exist.")
    if "BlueGreenUpdatePolicy" in config and "RollingUpdatePolicy" in config:
        raise invalid("Only one of BlueGreenUpdatePolicy and RollingUpdatePolicy can be given.")
    if "RollingUpdatePolicy" in config:
        policy = config["RollingUpdatePolicy"]
        step = _share(policy["MaximumBatchSize"], instances, "MaximumBatchSize", 0.05, 0.5)
        timeout = policy.get("MaximumExecutionTimeoutInSeconds", Plan.timeout_s)
        back = policy.get("RollbackMaximumBatchSize")
        way_back = _share(back, instances, "RollbackMaximumBatchSize", 0.0, 1.0) if back else 1.0
        wait = policy["WaitIntervalInSeconds"]
        return Plan(_staircase(step), wait, 0.0, timeout, alarms, rolling=True, way_back=way_back)
    policy = config.get("BlueGreenUpdatePolicy")
    if policy is None:
        return Plan(alarms=alarms)
    routing = policy["TrafficRoutingConfiguration"]
    return Plan(
        _blue_green(routing, instances),
        routing["WaitIntervalInSeconds"],
        policy.get("TerminationWaitInSeconds", 0),
        policy.get("MaximumExecutionTimeoutInSeconds", Plan.timeout_s),
        alarms,
    )


def _blue_green(routing: dict[str, Any], instances: int) -> tuple[float, ...]:
    kind, size = routing["Type"], {"CANARY": "CanarySize", "LINEAR": "LinearStepSize"}.get(routing["Type"])
    for member in ("CanarySize", "LinearStepSize"):
        if (member in routing) != (member == size):
            raise invalid(
                f"TrafficRoutingConfiguration of type {kind} needs {size or 'neither size'} and no other."
            )
    if kind == "ALL_AT_ONCE":
        return (1.0,)
    if kind == "CANARY":
        return _share(routing["CanarySize"], instances, "CanarySize", 0.0, 0.5), 1.0
    return _staircase(_share(routing["LinearStepSize"], instances, "LinearStepSize", 0.1, 0.5))


def _share(size: dict[str, Any], instances: int, member: str, low: float, high: float) -> float:
    share = size["Value"] / (100 if size["Type"] == "CAPACITY_PERCENT" else instances)
    if not low <= share <= high:
        raise invalid(
            f"{member} of {size['Value']} ({size['Type']}) is {share:.0%} of {instances} instance(s); "
            f"it must be {low:.0%} to {high:.0%}."
        )
    return share


def _staircase(step: float) -> tuple[float, ...]:
    count = int(1 / step + 1e-9)
    shares = tuple(min(1.0, step * (i + 1)) for i in range(count))
    return shares if shares[-1] > 1 - 1e-9 else (*shares, 1.0)


class Watch:
    """Waits while nothing speaks against the update: no alarm, no timeout, no deletion, no dead container.

    Args:
        trouble: says why the new fleet can no longer serve, or None.
        cancelled: whether the endpoint is being taken down.
    """

    def __init__(
        self,
        wanted: Plan,
        alarm_states: AlarmStates,
        trouble: Callable[[], str | None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._plan, self._alarm_states = wanted, alarm_states
        self._trouble, self._cancelled = trouble, cancelled
        self._deadline = time.monotonic() + wanted.timeout_s

    def check_alarms(self) -> None:
        """Raises RolledBack when an alarm rings."""
        states = self._alarm_states(list(self._plan.alarms))
        ringing = sorted(name for name, state in states.items() if state == "ALARM")
        if ringing:
            raise RolledBack(f"Alarms in state ALARM during the deployment: {', '.join(ringing)}.")

    def check(self) -> None:
        """Raises RolledBack when the update must be undone."""
        self.check_alarms()
        if time.monotonic() > self._deadline:
            raise RolledBack(f"The deployment took longer than {self._plan.timeout_s:g} s.")
        if self._cancelled():
            raise RolledBack("The deployment was cancelled.")
        trouble = self._trouble()
        if trouble:
            raise RolledBack(trouble)

    def wait(self, seconds: float) -> None:
        """Wait, checking all the while.

        Raises:
            RolledBack: the update must be undone.
        """
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
            self.check()
