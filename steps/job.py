"""The contract of a SageMaker Processing job: where a step reads, writes and logs, and how it fails.

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--backend", default="auto")

    def main(job: Job) -> None:
        kernel = job.input("kernel")              # <root>/processing/input/kernel
        job.write_json("evaluation", "evaluation.json", {...})

    if __name__ == "__main__":
        run(main, arguments)

What a step writes under `job.output(name)` appears in <root>/processing/output/<name> only after `main`
returned; a step that fails leaves no output. SageMaker shows <root>/output/message as the job's ExitMessage,
a pipeline as its FailureReason: cause and remedy come first there, the traceback goes to the log only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

ROOT_VARIABLE = "MLA_ML_ROOT"
MESSAGE_LIMIT = 1024  # ExitMessage and FailureReason hold no more characters (SageMaker API reference)

log = logging.getLogger("steps")

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_NOT_SECRET_NAME = re.compile(r"_ARN$|_URI$|_FILE$|TOKENIZERS_PARALLELISM", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]+@")  # a password may hold an @ of its own
_SIGNATURES = re.compile(
    r"""\b(X-(?:Amz|Goog)-Signature|X-Amz-Security-Token|Signature|sig)=[^&\s"'<>]+""", re.IGNORECASE
)
# what a server or client may quote that no variable holds: tokens it has just got, a Databricks token
_TOKENS = re.compile(
    r"""\b(Bearer |Basic |(?:access_token|refresh_token|client_secret)["']?\s*[=:]\s*["']?)[\w.~+/=-]{16,}"""
    r"|\bdapi[0-9a-f]{32}\b"
)


class StepError(Exception):
    """A failure a person can act on.

    Args:
        what: what is wrong and where: the thing, its value, what was expected.
        fix: what to do about it; one sentence.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what} {fix}".strip())


class Job:
    """Paths and arguments of the running job.

    Attributes:
        name: the step, e.g. "evaluate".
        root: /opt/ml, or MLA_ML_ROOT where the process cannot have its own /opt/ml.
        args: the parsed command line.
    """

    def __init__(self, name: str, args: argparse.Namespace, root: Path | None = None) -> None:
        self.name, self.args = name, args
        self.root = root or ml_root()
        self._staged: dict[str, Path] = {}

    def input(self, name: str) -> Path:
        """Folder of the input channel `name`. Raises StepError when the job was started without it."""
        folder = self.root / "processing" / "input" / name
        if not folder.is_dir():
            raise StepError(
                f"input channel '{name}' is missing: {folder} is no folder.",
                f"Give the step a ProcessingInput '{name}' with this LocalPath.",
            )
        return folder

    def output(self, name: str) -> Path:
        """Folder to write output `name` into. It is published as a whole when the step succeeds."""
        if name not in self._staged:
            # Beside its destination, so that publishing is a rename on the same file system.
            staged = self._output_root / f".{name}.partial"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            self._staged[name] = staged
        return self._staged[name]

    def read_json(self, channel: str, file: str) -> Any:
        """The JSON document `file` of input `channel`. Raises StepError when it is absent or no JSON."""
        path = self.input(channel) / file
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StepError(
                f"input '{channel}' has no {file} ({path}).", "Rerun the step that writes it."
            ) from None
        except ValueError as error:
            raise StepError(f"{path} is not JSON: {error}.", "Rerun the step that writes it.") from error

    def write_json(self, output: str, file: str, document: Any) -> Path:
        """Write `document` as `file` of `output`. NaN and infinity are refused: JsonGet cannot read them."""
        path = self.output(output) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def publish(self) -> None:
        """Move every staged output to its place. On an error nothing stays published."""
        try:
            for name, staged in self._staged.items():
                _move_into_place(staged, self._output_root / name)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove every output of this job, staged or published."""
        for name, staged in self._staged.items():
            shutil.rmtree(staged, ignore_errors=True)
            _empty(self._output_root / name)

    @property
    def _output_root(self) -> Path:
        return self.root / "processing" / "output"


def ml_root() -> Path:
    """The folder SageMaker calls /opt/ml."""
    return Path(os.environ.get(ROOT_VARIABLE) or "/opt/ml")


def run(
    main: Callable[[Job], None],
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
) -> NoReturn:
    """Run a step and end the process: exit code 0, or 1 with the reason in <root>/output/message.

    Args:
        main: the step's work.
        arguments: adds the step's options to the parser; `job.args` holds their values.
        argv: the command line without the program's name; default sys.argv[1:].
    """
    name = Path(main.__code__.co_filename).stem  # __name__ is "__main__" here
    _log_to_stdout(name)
    signal.signal(signal.SIGTERM, _stopped)  # StopProcessingJob: SIGTERM, then SIGKILL after 120 s
    started = time.monotonic()
    job: Job | None = None
    try:
        parser = _Parser(prog=f"python -m steps.{name}", description=(main.__doc__ or "").strip())
        if arguments:
            arguments(parser)
        job = Job(name, parser.parse_args(argv))
        log.info("started: %s", " ".join(f"{key}={value}" for key, value in sorted(vars(job.args).items())))
        main(job)
        job.publish()
    except (StepError, _Stopped) as error:
        _fail(job, str(error), error)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".rstrip(".: ")
        _fail(job, f"{name} failed unexpectedly: {text}. Read the traceback in the step's log.", error)
    log.info("done in %.1f s", time.monotonic() - started)
    sys.exit(0)


def redact(text: str) -> str:
    """`text` without secrets.

    These are the values of secret-looking environment variables (as they are, or as a URL writes them),
    credentials in URLs, tokens in headers and answers, and what signs a URL of S3 (X-Amz-Signature,
    X-Amz-Security-Token), of Google (X-Goog-Signature, Signature) or of Azure (sig): whoever has it reads the
    file.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and not _NOT_SECRET_NAME.search(name):
            for form in (value, quote(value), quote(value, safe=""), quote_plus(value)):
                text = text.replace(form, "***")
    text = _TOKENS.sub(lambda match: f"{match[1] or ''}***", _URL_CREDENTIALS.sub("***@", text))
    return _SIGNATURES.sub(r"\1=***", text)


class _Stopped(BaseException):
    """SIGTERM. No Exception, so that no library's `except Exception` swallows it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise StepError(f"Bad command line: {message}.", f"Correct ContainerArguments; {usage}")


class _UtcFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _log_to_stdout(name: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_UtcFormatter(f"%(asctime)s %(levelname)s {name}: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # libraries speak only when something is wrong
    log.setLevel(logging.INFO)
    # mlflow would give its loggers a handler of their own, which masks no secret
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")


def _stopped(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped("Stopped from outside (SIGTERM). Start the pipeline again when it should run.")


def _fail(job: Job | None, message: str, error: BaseException) -> NoReturn:
    log.error("%s", message, exc_info=error)
    if job:
        job.discard()
    path = ml_root() / "output" / "message"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_short(redact(message)), encoding="utf-8")
    sys.exit(1)


def _short(message: str, limit: int = MESSAGE_LIMIT) -> str:
    """`message` in at most `limit` characters; what is cut is the end, since cause and remedy come first."""
    return message if len(message) <= limit else message[: limit - 1] + "…"


def _move_into_place(staged: Path, destination: Path) -> None:
    _empty(destination)
    try:
        staged.rename(destination)  # replaces an empty folder
    except OSError:  # the destination is a mount point: SageMaker may mount each output by itself
        destination.mkdir(parents=True, exist_ok=True)
        for entry in list(staged.iterdir()):
            shutil.move(entry, destination / entry.name)
        staged.rmdir()


def _empty(folder: Path) -> None:
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
