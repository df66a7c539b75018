"""CompileKernel: build the decode kernel on the kind of machine that will measure and serve it.

With KernelSource somebody else's package with flash_mla's interface is installed beside it, as the backend
flash_mla.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kernels.build import BuildError, build, write_index
from kernels.package import FLASH_MLA, LOG, FlashMlaPackage, KernelIndex
from kernels.targets import RECIPES
from steps.job import Job, StepError, log, run
from steps.kernel_source import BUILTIN, KernelSource

# Backends that bring no compiled code of ours: the artifact records that nothing had to be built.
NOT_COMPILED = {
    "triton": "compiled at run time by Triton",
    FLASH_MLA: "the package installed in the image, if there is one",
    "reference": "written in torch",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", choices=["auto", *RECIPES, *NOT_COMPILED])
    parser.add_argument("--kernel-source", default=BUILTIN, help="builtin, pip requirement, or s3:// archive")


def main(job: Job) -> None:
    """Compile the decode kernel into kernel/; what cannot be built is recorded with its reason."""
    backend: str = job.args.backend
    source = KernelSource.parse(job.args.kernel_source)
    if source and backend not in ("auto", FLASH_MLA):
        raise StepError(
            f"KernelSource '{source.text}' would not be measured: KernelBackend is '{backend}'.",
            f"Set KernelBackend to auto or {FLASH_MLA}, or KernelSource to {BUILTIN}.",
        )
    kernel = job.output("kernel")
    installed = source.install(kernel) if source else None
    report(make_index(backend, kernel, installed))


def make_index(backend: str, kernel: Path, installed: FlashMlaPackage | None) -> KernelIndex:
    """Build what `backend` asks for, and index it together with the installed package."""
    packages: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    if backend in NOT_COMPILED:
        skipped[backend] = NOT_COMPILED[backend]
    else:
        try:
            built = build(backend, kernel)
        except BuildError as error:
            cause, _, compiler_output = str(error).partition(
                "\n"
            )  # the remedy has to fit into the exit message
            raise StepError(
                f"No kernel for backend '{backend}': {cause.rstrip('.:')}.",
                f"Correct the job's image, or start with another KernelBackend. {compiler_output}".rstrip(),
            ) from error
        packages = {target: {"sha256": package.sha256} for target, package in built.packages.items()}
        skipped = dict(built.skipped)
    if installed:
        recorded = ("sha256", "source", "name", "version", "wheel")
        packages[FLASH_MLA] = {key: installed.manifest[key] for key in recorded}
        skipped.pop(FLASH_MLA, None)
    return write_index(kernel, backend, packages, skipped)


def report(index: KernelIndex) -> None:
    """Log each package's manifest and its compiler's output, and why the others were not built."""
    for target, package in index.packages.items():
        for line in (package.folder / LOG).read_text(errors="replace").splitlines():
            log.info("%s compiler: %s", target, line)
        manifest = package.manifest
        log.info(
            "%s: %d bytes by %s in %.1f s, sha256 %s",
            target,
            manifest["bytes"],
            manifest["compiler"],
            manifest["build_seconds"],
            package.sha256,
        )
        log.info("%s flags: %s", target, json.dumps(manifest["flags"]))
    if other := index.flash_mla:
        log.info("flash_mla: %s, %d bytes, sha256 %s", other.label, other.manifest["bytes"], other.sha256)
    for target, reason in index.skipped.items():
        log.info("%s: not built: %s", target, reason)
    log.info("kernel artifact %s", index.sha256)


if __name__ == "__main__":
    run(main, arguments)
