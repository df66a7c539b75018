"""The job contract, as SageMaker sees it: a process, its files, its exit code and its message."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps import job as job_module
from steps.job import MESSAGE_LIMIT, Job, StepError, redact

REPOSITORY = Path(__file__).parents[2]
HEADER = """
import argparse, os, sys, time
from steps.job import Job, StepError, run
def arguments(parser):
    parser.add_argument("--backend", default="auto", choices=["auto", "cpu"])
"""


class Finished:
    def __init__(self, root: Path, process: subprocess.CompletedProcess) -> None:
        self.code, self.log, self.root = process.returncode, process.stdout + process.stderr, root

    @property
    def message(self) -> str:
        return (self.root / "output" / "message").read_text()

    @property
    def outputs(self) -> list[str]:
        folder = self.root / "processing" / "output"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def command(root: Path, body: str) -> list[str]:
    root.mkdir(exist_ok=True)
    script = root / "step_under_test.py"
    script.write_text(
        HEADER
        + "def main(job):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\nrun(main, arguments)\n"
    )
    return [sys.executable, str(script)]


def execute(root: Path, body: str, *args: str, **env: str) -> Finished:
    environment = os.environ | {"MLA_ML_ROOT": str(root), "PYTHONPATH": str(REPOSITORY)} | env
    process = subprocess.run(
        [*command(root, body), *args], env=environment, capture_output=True, text=True, timeout=60
    )
    return Finished(root, process)


def test_success_publishes_every_output(tmp_path):
    (tmp_path / "processing" / "output" / "kernel").mkdir(parents=True)  # SageMaker makes the folders itself
    done = execute(
        tmp_path,
        """
        job.write_json("kernel", "sub/index.json", {"backend": job.args.backend})
        (job.output("notes") / "a.txt").write_text("a")
        assert not (job.root / "processing" / "output" / "kernel" / "sub").exists()
        """,
        "--backend",
        "cpu",
    )
    assert (done.code, done.outputs) == (0, ["kernel/sub/index.json", "notes/a.txt"]), done.log
    assert "done in" in done.log
    assert not (tmp_path / "output" / "message").exists()


def test_a_step_error_leaves_no_output_and_says_cause_and_remedy(tmp_path):
    done = execute(
        tmp_path,
        'job.write_json("kernel", "index.json", {})\nraise StepError("No g++ on PATH.", "Install g++.")',
    )
    assert (done.code, done.outputs, done.message) == (1, [], "No g++ on PATH. Install g++.")
    assert "Traceback" in done.log


def test_an_unexpected_error_names_itself_and_points_to_the_log(tmp_path):
    done = execute(tmp_path, '(job.output("x") / "f").write_text("half")\n{}["absent"]')
    assert done.code == 1
    assert done.outputs == []
    assert done.message.startswith("step_under_test failed unexpectedly: KeyError: 'absent'")
    assert "Traceback" not in done.message
    assert "Traceback" in done.log


def test_a_bad_command_line_names_the_argument(tmp_path):
    done = execute(tmp_path, "pass", "--backend", "tpu")
    assert done.code == 1
    assert "--backend" in done.message
    assert "'tpu'" in done.message


def test_the_message_keeps_its_beginning_within_the_limit(tmp_path):
    done = execute(tmp_path, 'raise StepError("cause" + "x" * 5000, "remedy")')
    assert len(done.message) == MESSAGE_LIMIT
    assert done.message.startswith("causexxx")


def test_secrets_are_printed_nowhere(tmp_path):
    done = execute(
        tmp_path,
        """
        from steps.job import log
        log.info("token %s at %s", os.environ["DATABRICKS_TOKEN"], "https://me:pass@example.com/x")
        raise StepError("refused " + os.environ["DATABRICKS_TOKEN"])
        """,
        DATABRICKS_TOKEN="dapi-0123456789",
    )
    assert "dapi-0123456789" not in done.log + done.message
    assert "me:pass" not in done.log
    assert "https://***@example.com/x" in done.log


def test_sigterm_stops_the_step_and_removes_its_output(tmp_path):
    body = """
    (job.output("x") / "f").write_text("half")
    print("ready", flush=True)
    try:
        time.sleep(30)
    except Exception:
        pass
    """
    environment = os.environ | {"MLA_ML_ROOT": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command(tmp_path, body), env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        while "ready" not in process.stdout.readline():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Stopped from outside" in (tmp_path / "output" / "message").read_text()
    assert not list((tmp_path / "processing" / "output").iterdir())


def test_a_missing_channel_or_document_is_named(tmp_path):
    job = Job("x", None, root=tmp_path)
    with pytest.raises(StepError, match="channel 'model' is missing"):
        job.input("model")
    (tmp_path / "processing" / "input" / "model").mkdir(parents=True)
    with pytest.raises(StepError, match=r"has no a\.json"):
        job.read_json("model", "a.json")
    (tmp_path / "processing" / "input" / "model" / "a.json").write_text("{")
    with pytest.raises(StepError, match="is not JSON"):
        job.read_json("model", "a.json")


def test_publishing_fills_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    """As with an output that SageMaker mounted: rename answers EBUSY."""

    def refuse(self, target):
        raise OSError(16, "Device or resource busy")

    job = Job("x", None, root=tmp_path)
    job.write_json("kernel", "cpu/manifest.json", {})
    with monkeypatch.context() as patched:
        patched.setattr(job_module.Path, "rename", refuse)
        job.publish()
    assert (tmp_path / "processing/output/kernel/cpu/manifest.json").is_file()
    assert not (tmp_path / "processing/output/.kernel.partial").exists()


def test_json_that_jsonget_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        Job("x", None, root=tmp_path).write_json("e", "e.json", {"gate": float("nan")})


@given(before=st.text(), secret=st.text("abcdef0123456789", min_size=8), after=st.text())
def test_a_secret_never_survives_redaction(before, secret, after):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLA_TEST_TOKEN", secret)
        assert secret not in redact(before + secret + after)


@pytest.mark.parametrize(
    "key",
    ["X-Amz-Signature", "X-Amz-Security-Token", "x-amz-signature", "sig", "X-Goog-Signature", "Signature"],
)
@pytest.mark.parametrize("mark", ["?", "&", "%20"])
def test_a_signed_url_cannot_be_used_by_who_reads_the_log(key, mark):
    url = f"https://store.example/model{mark}a=1&{key}=Ab%2Bcd%3D%3D&X-Amz-Expires=900"
    assert redact(f'GET "{url}" failed') == f'GET "{url}" failed'.replace("Ab%2Bcd%3D%3D", "***")
    assert redact(f"{url[: url.index('&X-Amz-E')]} failed").endswith(f"{key}=*** failed")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at https://me:p@ss@w0rd@host/x", "at https://***@host/x"),
        ("Authorization: Bearer eyJhbGciOi.JSUzI1NiJ9-x_y", "Authorization: Bearer ***"),
        ("Basic bWU6dmVyeS1zZWNyZXQ=", "Basic ***"),
        ('{"access_token": "eyJhbGciOiJSUzI1NiJ9"}', '{"access_token": "***"}'),
        ("body client_secret=dose0123456789abcdef&x", "body client_secret=***&x"),
        ("refused dapi0123456789abcdef0123456789abcdef.", "refused ***."),
    ],
)
def test_what_no_variable_holds_is_masked_by_its_form(text, left):
    assert redact(text) == left


def test_a_secret_as_a_url_writes_it(monkeypatch):
    monkeypatch.setenv("MLA_TEST_TOKEN", "two words/&+")
    assert redact("a=two%20words/%26%2B b=two%20words%2F%26%2B c=two+words%2F%26%2B") == "a=*** b=*** c=***"


@pytest.mark.parametrize(
    "text",
    [
        "design=4 config=2 the sig = 3 of X-Amz-Signature",
        "models:/main.ml.tiny@champion in https://host/#/models/a@b",
        "Store client_id and client_secret, or token; Basic authentication; Bearer token",
        "The signature: {'inputs': []}",
    ],
)
def test_words_that_only_look_like_a_secret_stay(text):
    assert redact(text) == text


def test_mlflow_logs_through_the_job(tmp_path):
    """Its own handler would write to standard error, past what masks secrets."""
    done = execute(
        tmp_path,
        """
        import logging, mlflow
        logging.getLogger("mlflow.tracking").warning("token %s", os.environ["DATABRICKS_TOKEN"])
        """,
        DATABRICKS_TOKEN="dapi-0123456789",
    )
    assert "WARNING" in done.log
    assert "dapi-0123456789" not in done.log
