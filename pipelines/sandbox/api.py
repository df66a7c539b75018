"""The table of emulated SageMaker actions: check a request, run it, refuse what is not emulated.

The HTTP front and the pipeline interpreter both call through here, so a step's request meets the very checks
that a client's request meets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipelines.sandbox import shapes
from pipelines.sandbox.calls import CallLog
from pipelines.sandbox.errors import ServiceError, invalid, not_emulated
from pipelines.sandbox.faults import Faults

Action = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Account:
    """Where the emulated resources live."""

    region: str = "us-east-1"
    account_id: str = "123456789012"

    def arn(self, resource: str) -> str:
        """``pipeline/x`` -> the full SageMaker ARN."""
        return f"arn:aws:sagemaker:{self.region}:{self.account_id}:{resource}"


@dataclass
class Api:
    """The emulated actions by name. Thread-safe to call; components register at start-up."""

    account: Account
    actions: dict[str, Action] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    _note: Callable[[str, dict[str, Any]], None] = lambda action, params: None

    def register(self, actions: dict[str, Action]) -> None:
        """Add a component's actions; a name belongs to one component."""
        for name, action in actions.items():
            if name in self.actions:
                raise ValueError(f"two components answer {name}")
            self.actions[name] = action

    def noting(self, calls: CallLog, caller: str) -> Api:
        """The same actions for a caller inside the sandbox, whose calls are logged."""
        return Api(
            self.account,
            self.actions,
            self.faults,
            lambda action, params: calls.add(caller, "sagemaker", action, params),
        )

    def call(self, action: str, params: dict[str, Any]) -> dict[str, Any]:
        """Run one action.

        Raises:
            ServiceError: what the service would answer; ``UnsupportedOperation`` names an action not
                emulated.
        """
        self._note(action, params)
        handler = self.actions.get(action)
        if handler is None:
            if not shapes.knows(action):
                raise ServiceError("UnknownOperationException", f"SageMaker has no action {action}.")
            raise not_emulated(f"sagemaker:{action}", f"It emulates: {', '.join(sorted(self.actions))}.")
        if fault := self.faults.of_call(action):
            raise fault
        found = [p for p in shapes.problems(action, params) if not p.startswith("Unknown Argument member")]
        if found:
            raise invalid(shapes.validation_message(found))
        return handler({k: v for k, v in params.items() if v is not None}) or {}


class Tags:
    """Tags of any emulated resource, by ARN (AddTags, ListTags, DeleteTags)."""

    def __init__(self) -> None:
        self._tags: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def actions(self) -> dict[str, Action]:
        """The actions answered here."""
        return {"AddTags": self._add, "ListTags": self._list, "DeleteTags": self._delete}

    def set(self, arn: str, tags: Iterable[dict[str, str]]) -> None:
        """Add or overwrite tags of a resource."""
        with self._lock:
            self._tags.setdefault(arn, {}).update({t["Key"]: t["Value"] for t in tags})

    def get(self, arn: str) -> list[dict[str, str]]:
        """The tags of a resource, as the API lists them."""
        with self._lock:
            return [{"Key": k, "Value": v} for k, v in self._tags.get(arn, {}).items()]

    def _add(self, params: dict[str, Any]) -> dict[str, Any]:
        self.set(params["ResourceArn"], params["Tags"])
        return {"Tags": self.get(params["ResourceArn"])}

    def _list(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"Tags": self.get(params["ResourceArn"])}

    def _delete(self, params: dict[str, Any]) -> None:
        with self._lock:
            for key in params["TagKeys"]:
                self._tags.get(params["ResourceArn"], {}).pop(key, None)


def now() -> float:
    """Time stamps travel as seconds since 1970 in the JSON protocol."""
    return time.time()


def page(items: list[dict[str, Any]], params: dict[str, Any], key: str) -> dict[str, Any]:
    """One page of a list answer: ``NextToken`` is the offset of the next page."""
    token = params.get("NextToken", "0")
    if not token.isdigit():
        raise invalid(f"Invalid NextToken: {token}")
    start, size = int(token), int(params.get("MaxResults", 100))
    answer: dict[str, Any] = {key: items[start : start + size]}
    if start + size < len(items):
        answer["NextToken"] = str(start + size)
    return answer


def ordered(
    items: list[dict[str, Any]], params: dict[str, Any], keys: dict[str, str], default: str
) -> list[dict]:
    """Sort by ``SortBy`` (``keys``: its values to members) and ``SortOrder`` (default Descending)."""
    member = keys[params.get("SortBy", default)]
    return sorted(
        items, key=lambda i: i[member], reverse=params.get("SortOrder", "Descending") == "Descending"
    )


def created_within(item_time: float, params: dict[str, Any], prefix: str = "Created") -> bool:
    """Whether a time lies between ``<prefix>After`` and ``<prefix>Before`` of a list request."""
    after, before = params.get(f"{prefix}After"), params.get(f"{prefix}Before")
    return (after is None or item_time > float(after)) and (before is None or item_time < float(before))
