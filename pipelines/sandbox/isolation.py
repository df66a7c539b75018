"""Give a command its own /opt/ml: by bubblewrap, else by unshare, else by the variable MLA_ML_ROOT.

The first that works on this machine is taken; Docker's default seccomp profile and Ubuntu 24.04 forbid user
namespaces to some users, which is what the last one is for (steps/job.py and container/serving read the
variable).
"""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ML_ROOT_VARIABLE = "MLA_ML_ROOT"


@dataclass(frozen=True)
class Command:
    """What to run: arguments, variables to add, and whether paths given as read-only really are."""

    argv: list[str]
    environment: dict[str, str]


class Bubblewrap:
    """A mount and process namespace by ``bwrap``; about 12 ms. The command's children end with it."""

    name = "bubblewrap"
    protects_inputs = True

    def wrap(self, argv: Sequence[str], root: Path, read_only: Sequence[str]) -> Command:
        """``root`` becomes /opt/ml; the paths ``read_only`` (relative to it) cannot be written."""
        return Command(["bwrap", *self._mounts(root, read_only), "--", *argv], {})

    def _mounts(self, root: Path, read_only: Sequence[str]) -> list[str]:
        # --tmpfs /opt lets /opt/ml be made without touching the host; what the host has there is bound again
        mounts = ["--dev-bind", "/", "/", "--proc", "/proc", "--tmpfs", "/opt"]
        for entry in _siblings():
            mounts += ["--dev-bind", str(entry), str(entry)]
        mounts += ["--bind", str(root), "/opt/ml"]
        for path in read_only:
            mounts += ["--ro-bind", str(root / path), f"/opt/ml/{path}"]
        return [*mounts, "--unshare-pid", "--die-with-parent"]


class Unshare:
    """A mount namespace by util-linux' ``unshare``, with a user namespace so that no privilege is needed."""

    name = "unshare"
    protects_inputs = True

    def wrap(self, argv: Sequence[str], root: Path, read_only: Sequence[str]) -> Command:
        """``root`` becomes /opt/ml; the paths ``read_only`` (relative to it) cannot be written."""
        hold = "/mnt"  # covers nothing the command needs, and holds the mounts while /opt is covered
        script = [
            "set -e",
            f"mount -t tmpfs none {hold}",
            f"mkdir {hold}/opt && mount --rbind /opt {hold}/opt",
            f"mkdir {hold}/ml && mount --bind {shlex.quote(str(root))} {hold}/ml",
            "mount -t tmpfs none /opt && mkdir /opt/ml",
            f"mount --bind {hold}/ml /opt/ml",
        ]
        for entry in _siblings():
            target = shlex.quote(str(entry))
            make = f"mkdir {target}" if entry.is_dir() else f"touch {target}"
            script.append(f"{make} && mount --rbind {shlex.quote(f'{hold}/opt/{entry.name}')} {target}")
        for path in read_only:
            target = shlex.quote(f"/opt/ml/{path}")
            script.append(f"mount --bind {target} {target} && mount -o remount,bind,ro {target}")
        script.append('exec "$@"')
        # user namespaces reset the parent-death signal, so it is set again inside
        inner = ["setpriv", "--pdeathsig", "KILL", "--", *argv] if shutil.which("setpriv") else list(argv)
        return Command(["unshare", "-Urm", "sh", "-c", "\n".join(script), "sh", *inner], {})


class RootVariable:
    """No namespace: the command is told its root by MLA_ML_ROOT, and gets copies of its inputs."""

    name = "environment"
    protects_inputs = False

    def wrap(self, argv: Sequence[str], root: Path, read_only: Sequence[str]) -> Command:
        """``root`` is named by MLA_ML_ROOT; ``read_only`` is not enforced."""
        del read_only
        tie = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        return Command([*tie, *argv], {ML_ROOT_VARIABLE: str(root)})


Isolation = Bubblewrap | Unshare | RootVariable


def choose(name: str | None = None) -> Isolation:
    """The strongest isolation that works here, or the named one.

    Raises:
        ValueError: the named one does not exist or does not work on this machine.
    """
    kinds: dict[str, Isolation] = {k.name: k for k in (Bubblewrap(), Unshare(), RootVariable())}
    if name is None:
        return next(kind for kind in kinds.values() if _works(kind.name))
    if name not in kinds:
        raise ValueError(f"isolation '{name}' does not exist; there are: {', '.join(kinds)}")
    if not _works(name):
        raise ValueError(f"isolation '{name}' does not work on this machine")
    return kinds[name]


@functools.lru_cache(maxsize=3)
def _works(name: str) -> bool:
    if name == RootVariable.name:
        return True
    kind = Bubblewrap() if name == Bubblewrap.name else Unshare()
    if (
        sys.platform != "linux"
        or not Path("/opt").is_dir()
        or not shutil.which(kind.wrap([], Path(), []).argv[0])
    ):
        return False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        test = "test -d /opt/ml/in && echo x > /opt/ml/out && ! echo x > /opt/ml/in/x"
        command = kind.wrap(["sh", "-c", test], root, ["in"])
        done = subprocess.run(command.argv, capture_output=True, timeout=20, check=False)
        return done.returncode == 0 and (root / "out").exists()


def _siblings() -> list[Path]:
    return sorted(p for p in Path("/opt").iterdir() if p.name != "ml")
