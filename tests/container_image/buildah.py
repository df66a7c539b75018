"""Build and run the images without a daemon: buildah builds in a chroot, bubblewrap starts what was built.

A small Debian of the host's own release, made by mmdebstrap, stands in for the Dockerfile's bases by
their names. The host's pip configuration goes into the build, so that an index or wheels of its own
are found there too; nothing of it stays in the image.
"""

from __future__ import annotations

import configparser
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "container" / "Dockerfile"
SWITCH = "MLA_IMAGE_TESTS"
PIP_SETTINGS = ("cert", "constraint", "extra-index-url", "find-links", "index-url", "timeout")
# What Docker gives a container and the images use.
CAPABILITIES = (
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_DAC_OVERRIDE",
    "CAP_CHOWN",
    "CAP_FOWNER",
    "CAP_KILL",
)


def obstacle() -> str | None:
    """Why images cannot be built and run here, for a person; None when they can."""
    if os.environ.get(SWITCH) != "1":
        return f"set {SWITCH}=1 to build both images (minutes of CPU and about 5 GB of disk)"
    if os.geteuid() != 0:
        return "mmdebstrap and the chroot isolation need root"
    missing = [tool for tool in ("buildah", "mmdebstrap", "bwrap") if not shutil.which(tool)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install buildah mmdebstrap bubblewrap)"
    if "VERSION_CODENAME" not in platform.freedesktop_os_release():
        return "the host's release has no name that mmdebstrap could take"
    return None


@dataclass
class Engine:
    """A private store of images under `folder`; `close` removes it."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")]

    def buildah(self, *arguments: str) -> str:
        """Run buildah on the store; its output. Raises CalledProcessError with everything it said."""
        command, *rest = arguments
        return _run(["buildah", *self._store, command, *rest])

    def make_base(self, names: Sequence[str]) -> None:
        """A minimal system of the host's release, under every name."""
        archive = self.folder / "base.tar"
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        _run(["mmdebstrap", "--variant=minbase", "--include=ca-certificates", release, str(archive)])
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(archive))
        self.buildah("commit", "--quiet", container, "localhost/base")
        self.buildah("rm", container)
        self.buildah("tag", "localhost/base", *names)
        archive.unlink()

    def build(self, target: str) -> str:
        """Build a target of the Dockerfile; the image's name."""
        image = f"localhost/mla-{target}"
        volumes = [f"--volume={source}:{inside}:ro" for source, inside in self._pip_volumes().items()]
        options = ["--isolation=chroot", "--pull-never", "--layers", f"--target={target}", f"--tag={image}"]
        self.buildah("bud", *options, *volumes, f"--file={DOCKERFILE}", str(REPOSITORY))
        return image

    def start(
        self,
        image: str,
        *command: str,
        volumes: Mapping[Path, str],
        environment: Mapping[str, str],
        log: Path,
    ) -> subprocess.Popen[bytes]:
        """Start the image as `docker run IMAGE command` would: its entry point, environment and folder.

        volumes: folder here to absolute path inside. Output goes to `log`.
        """
        container = self.buildah("from", "--pull-never", image).strip()
        root = Path(self.buildah("mount", container).strip())
        config = json.loads(self.buildah("inspect", "--type=image", image))["OCIv1"]["config"]
        inside = dict(entry.split("=", 1) for entry in config.get("Env", ())) | dict(environment)
        for path in volumes.values():
            (root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        arguments = [
            *("bwrap", "--bind", str(root), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
            *(part for source, path in volumes.items() for part in ("--bind", str(source), path)),
            *("--unshare-pid", "--as-pid-1", "--die-with-parent", "--chdir", config.get("WorkingDir") or "/"),
            *(part for one in CAPABILITIES for part in ("--cap-add", one)),
            "--clearenv",
            *(part for name, value in inside.items() for part in ("--setenv", name, value)),
            *(config.get("Entrypoint") or ()),
            *(command or config.get("Cmd") or ()),
        ]
        with log.open("wb") as output:
            return subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)

    def labels(self, image: str) -> dict[str, str]:
        """The image's labels."""
        config = json.loads(self.buildah("inspect", "--type=image", image))["OCIv1"]["config"]
        return dict(config.get("Labels") or {})

    def close(self) -> None:
        """Remove containers, images and the store."""
        self.buildah("rm", "--all")
        # buildah binds the folder of its layers onto itself; taking it away whole is faster than `rmi --all`
        layers = self.folder / "root" / "overlay"
        if any(
            line.split()[4] == str(layers) for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ):
            _run(["umount", str(layers)])
        shutil.rmtree(self.folder)

    def _pip_volumes(self) -> dict[Path, str]:
        """The host's pip settings as one file, and every local file or folder that they name."""
        listing = _run([sys.executable, "-m", "pip", "config", "list"])
        settings = dict(re.findall(r"^\S*?\.([a-z-]+)='(.*)'$", listing, re.MULTILINE))
        settings = {key: value for key, value in settings.items() if key in PIP_SETTINGS}
        volumes: dict[Path, str] = {}
        if certificates := settings.get("cert"):
            settings["cert"] = "/etc/ssl/host-certificates.pem"  # the image's own bundle stays writable
            volumes[Path(certificates)] = settings["cert"]
        for key in ("constraint", "extra-index-url", "find-links", "index-url"):
            for word in settings.get(key, "").replace("\\n", " ").split():
                path = Path(word.removeprefix("file://"))
                if path.is_absolute() and path.exists():
                    shared = (
                        path.parent if key.endswith("index-url") else path
                    )  # an index links to its siblings
                    volumes[shared] = str(shared)
        parser = configparser.RawConfigParser()
        parser["global"] = settings
        configuration = self.folder / "pip.conf"
        with configuration.open("w") as file:
            parser.write(file)
        return {**volumes, configuration: "/etc/pip.conf"}


def bases() -> list[str]:
    """Names of the Dockerfile's base images: the defaults of its leading ARGs."""
    return re.findall(r"^ARG \w+_BASE=(\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)


def _run(command: Sequence[str]) -> str:
    environment = os.environ | {"TMPDIR": "/var/tmp"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    return result.stdout
