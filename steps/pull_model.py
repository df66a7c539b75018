"""PullModel: bring one model version from the MLflow registry into the pipeline, whole and verified.

Outputs: `model/`, the MLflow model folder unchanged, and `provenance/provenance.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import time
from pathlib import Path

from steps.job import Job, StepError, run
from steps.registry.access import connect, resolve
from steps.registry.download import download
from steps.registry.errors import explained
from steps.registry.paths import check_paths
from steps.registry.progress import Progress
from steps.registry.provenance import describe_model, provenance, read_mlmodel
from steps.registry.requirements import check as check_requirements
from steps.registry.requirements import table
from steps.registry.uris import parse_model_uri
from steps.registry.weights import check_pickle_names, check_weights

log = logging.getLogger("steps.pull_model")

RESUME_VARIABLE = "MLA_DOWNLOAD_DIR"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the step."""
    parser.add_argument(
        "--model-uri", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/PATH"
    )
    parser.add_argument(
        "--allow-pickle", choices=("true", "false"), default="false", help="accept pickled weights"
    )
    parser.add_argument(
        "--allow-requirement-conflicts",
        choices=("true", "false"),
        default="false",
        help="go on although the serving image has other versions than the model asks for",
    )
    parser.add_argument("--workers", type=_workers, default=8, help="transfers at a time, 1 to 64")


def _workers(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text} is not within 1 and 64")
    return int(text)


def main(job: Job) -> None:
    """Download a registered MLA model and write its provenance."""
    uri = parse_model_uri(job.args.model_uri)
    allow_pickle = job.args.allow_pickle == "true"
    registry = connect()
    model = resolve(registry, uri)
    with explained(registry, f"The files of '{uri.text}'"):
        files = model.store.list()
    if not any(file.path == "MLmodel" for file in files):
        raise StepError(
            f"ModelUri '{uri.text}' points to {len(files)} files, but to no MLmodel.",
            "Name the folder that log_model wrote, or register the model again.",
        )
    paths = [file.path for file in files]
    check_paths(paths)
    check_pickle_names(paths, allow_pickle)
    log.info(
        "%s is version %s: %d files by %s", uri.text, model.version or "-", len(files), model.store.describe
    )

    folder, started = job.output("model"), time.monotonic()
    progress = Progress(sum(file.bytes or 0 for file in files))
    with explained(registry, f"The files of '{uri.text}'"):
        downloaded = download(
            model.store,
            files,
            folder,
            workers=job.args.workers,
            resume_dir=_resume_dir(model.name or model.run_id, model.version or uri.text),
            progress=progress,
        )
    seconds = time.monotonic() - started
    log.info(
        "downloaded %d bytes in %.1f s, %.0f MB/s",
        progress.fetched,
        seconds,
        progress.fetched / seconds / 1e6,
    )
    read_mlmodel(folder)
    check_weights(folder, allow_pickle)
    parity = check_requirements(folder, job.args.allow_requirement_conflicts == "true")
    log.info("requirements, model against serving image:\n%s", table(parity))
    document = provenance(registry, model, describe_model(folder), downloaded, parity)
    job.write_json("provenance", "provenance.json", document)
    log.info("%(name)s version %(version)s: %(total_bytes)d bytes, checkpoint %(checkpoint)s", document)


def _resume_dir(name: str, version: str) -> Path | None:
    """Where unfinished files of this version wait for the next attempt; None: only within this process."""
    base = os.environ.get(RESUME_VARIABLE)
    if not base:
        return None
    return Path(base) / hashlib.sha256(f"{name}\0{version}".encode()).hexdigest()[:16]


if __name__ == "__main__":
    run(main, arguments)
