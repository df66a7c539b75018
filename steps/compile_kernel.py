"""CompileKernel: build the decode kernel on the kind of machine that will measure and serve it."""

from __future__ import annotations

import argparse
import json

from kernels.build import BuildError, build
from kernels.package import INDEX, LOG, SCHEMA_VERSION, KernelIndex, combined_sha256
from kernels.targets import RECIPES
from steps.job import Job, StepError, log, run

# Backends that bring no compiled code of ours: the artifact records that nothing had to be built.
NOT_COMPILED = {
    "triton": "compiled at run time by Triton",
    "flash_mla": "the peer's own wheel, installed in the image",
    "reference": "written in torch",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", choices=["auto", *RECIPES, *NOT_COMPILED])


def main(job: Job) -> None:
    """Compile the decode kernel into kernel/; what cannot be built is recorded with its reason."""
    backend: str = job.args.backend
    if backend in NOT_COMPILED:
        job.write_json("kernel", INDEX, empty_index(backend))
        log.info("%s needs no compilation: %s", backend, NOT_COMPILED[backend])
        return
    try:
        index = build(backend, job.output("kernel"))
    except BuildError as error:
        cause, _, compiler_output = str(error).partition("\n")  # the remedy has to fit into the exit message
        raise StepError(
            f"No kernel for backend '{backend}': {cause.rstrip('.:')}.",
            f"Correct the job's image, or start with another KernelBackend. {compiler_output}".rstrip(),
        ) from error
    report(index)


def empty_index(backend: str) -> dict[str, object]:
    """index.json of an artifact without compiled packages."""
    return {
        "schema_version": SCHEMA_VERSION,
        "requested": backend,
        "packages": {},
        "skipped": {backend: NOT_COMPILED[backend]},
        "sha256": combined_sha256({}),
    }


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
    for target, reason in index.skipped.items():
        log.info("%s: not built: %s", target, reason)
    log.info("kernel artifact %s", index.sha256)


if __name__ == "__main__":
    run(main, arguments)
