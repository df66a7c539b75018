"""Errors meant for a person: what is wrong, where, and what to do about it, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that its reader can remedy; printed as `what: where; do this`, without a traceback."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what + (f": {where}" if where else "") + (f"; {fix}" if fix else "")
        super().__init__(message)


def choose(name: str, known: Iterable[str]) -> str:
    """Words for a name that is not among the known ones: `did you mean 'a'? known: a, b`."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}known: {', '.join(names)}" if names else "none is known"
