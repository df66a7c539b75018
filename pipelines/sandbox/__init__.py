"""AWS on loopback: moto for most services, and real executions of pipelines, jobs and endpoints.

``Sandbox`` is the whole of it; any client reaches it by AWS_ENDPOINT_URL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.sandbox.server import PortTaken, Sandbox

__all__ = ["PortTaken", "Sandbox"]


def __getattr__(name: str) -> object:
    if name in __all__:  # moto and werkzeug cost a second to import, and most commands need neither
        from pipelines.sandbox import server

        return getattr(server, name)
    raise AttributeError(name)
