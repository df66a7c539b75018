"""The batch example's own work: what it reads and refuses. That it runs the kernel: test_accelerated.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def batch_inference():
    sys.path.insert(0, str(ROOT / "examples"))
    import batch_inference

    return batch_inference


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.csv", 'id,prompt\n1,a\n2,"b,\nc"\n', ["a", "b,\nc"]),
        ("P.CSV", "\ufeffprompt\r\na\r\n", ["a"]),
        ("empty.csv", "prompt\n", []),
        ("long.csv", "prompt\n" + "x" * 200_000 + "\n", ["x" * 200_000]),
        ("p.txt", "\ufeffone\r\n\r\n  two\n", ["one", "  two"]),
        ("empty", "", []),
    ],
)
def test_what_is_read(name: str, content: str, prompts: list, batch_inference, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert batch_inference.read_prompts(path) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", b"id,prompt\n1,a\n2\n", "row 2 has no prompt"),
        ("p.csv", b"text\na\n", "expected one named prompt"),
        ("p.csv", b"", "expected one named prompt"),
        ("p.txt", "Größe".encode("latin-1"), "cannot read"),
        ("absent/p.txt", None, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, content, words: str, batch_inference, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        batch_inference.read_prompts(path)


@pytest.mark.parametrize("option", [["--batch", "0"], ["--batch", "-1"], ["--max-new-tokens", "x"]])
def test_a_size_that_would_drop_prompts_silently(option: list, batch_inference, capsys) -> None:
    with pytest.raises(SystemExit):
        batch_inference.parse_arguments(["--model", "m", "--prompt", "p", *option])
    assert "is no whole number of at least 1" in capsys.readouterr().err


def test_help_without_a_registry() -> None:
    command = [sys.executable, str(ROOT / "examples" / "batch_inference.py"), "--help"]
    assert "spark" in subprocess.run(command, capture_output=True, text=True, check=True).stdout.lower()
