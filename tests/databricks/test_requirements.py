"""Model requirements against the serving image: verdicts, the step's refusal, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.job import StepError
from steps.registry import cuda, requirements
from steps.registry.requirements import compare, image_requirements, image_versions
from steps.registry.wanted import model_requirements
from tests.databricks.conftest import NAME, Pull
from tests.databricks.models import write_model_folder
from tests.databricks.runner import failed
from tests.databricks.workspace import Workspace

IMAGE = {"python": "3.12.3", "numpy": "2.4.6", "torch": "2.13.0", "tokenizers": "0.22.1", "triton": "3.5.0"}


def verdict(name: str, specifier: str, torch_cuda: str | None = "13.0") -> str:
    return compare({name: (specifier, "requirements.txt")}, IMAGE, torch_cuda)[0].verdict


@pytest.mark.parametrize(
    ("name", "specifier", "expected"),
    [
        ("torch", "==2.13.0", "same"),
        ("torch", "==2.13.0+cu130", "same"),
        ("torch", "==2.11.0", "compatible"),
        ("torch", ">=2.11", "compatible"),
        ("torch", "", "compatible"),
        ("torch", "==2.*", "compatible"),
        ("torch", "==1.13.1", "conflicting"),
        ("torch", "<2.13", "conflicting"),
        ("numpy", "==1.26.4", "conflicting"),
        ("tokenizers", "==0.22.0", "compatible"),
        ("tokenizers", "==0.21.0", "conflicting"),
        ("python", "==3.10.3", "compatible"),
        ("mlflow", "==3.17.2", "missing"),
        ("torch", "===2.13.0", "compatible"),
        ("torch", "==2.13.0+cu126", "compatible"),
        ("torch", "==2.13.0+cpu", "same"),
        ("torch", " @ git+https://host/torch", "conflicting"),
        ("cuda", "==13.1", "compatible"),
        ("cuda", "==12.1", "conflicting"),
        ("nvidia-cudnn-cu12", "==9.1", "conflicting"),
        ("nvidia-cudnn-cu13", "==9.1", "missing"),
    ],
)
def test_verdicts(name: str, specifier: str, expected: str) -> None:
    assert verdict(name, specifier) == expected


@given(
    st.sampled_from(["==", ">=", "<=", "~=", "!="]),
    st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){1,2}", fullmatch=True),
)
def test_every_specifier_gets_a_verdict(operator: str, version: str) -> None:
    assert verdict("torch", f"{operator}{version}") in ("same", "compatible", "conflicting")


def test_the_three_files(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(
        "--extra-index-url x\n# comment\nTorch==2.13.0  # why\nwin; sys_platform == 'win32'\n"
        "flash @ https://host/flash.whl\n"
    )
    conda = "dependencies:\n- python=3.11.9\n- pip<=24\n- pip:\n  - torch==1.0\n  - pandas>=2\n"
    (tmp_path / "conda.yaml").write_text(conda)
    (tmp_path / "python_env.yaml").write_text(
        "python: 3.11.8\ndependencies:\n- -r requirements.txt\n- rich\n"
    )
    assert model_requirements(tmp_path) == {
        "torch": ("==2.13.0", "requirements.txt"),
        "flash": (" @ https://host/flash.whl", "requirements.txt"),
        "pandas": (">=2", "conda.yaml"),
        "python": ("==3.11.9", "conda.yaml"),
        "rich": ("", "python_env.yaml"),
    }


@pytest.mark.parametrize(
    ("line", "name", "specifier"),
    [
        ("wheels/numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.whl", "numpy", "==1.26.4"),
        ("/Volumes/a/b/My_Code-2.1+db1-py3-none-any.whl", "my-code", "==2.1+db1"),
        ("https://host/simple/my-code-3.0.tar.gz", "my-code", "==3.0"),
        ("torch @ https://host/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl", "torch", "==2.13.0+cpu"),
        ("git+https://host/org/flash-attention.git@v2", "flash-attention", " @ git+https://host/org/"),
        ("-e git+ssh://git@host/x.git#egg=My_Egg", "my-egg", " @ git+ssh://***@host/x.git"),
        ("lib @ git+https://robot:s3cr3t@host/lib", "lib", " @ git+https://***@host/lib"),
        ("./code", "code", " @ ./code"),
        ("numpy==1.26.4 --hash=sha256:00 --hash=sha256:01", "numpy", "==1.26.4"),
        ("numpy==1.26.4 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01", "numpy", "==1.26.4"),
        ("numpy [extra] >= 1 ; python_version > '3'  # why", "numpy", ">=1"),
        ("\ufeffnumpy", "numpy", ""),
        ("-c constraints.txt\nnumpy", "numpy", "==1.26.4"),
        ("--constraint=constraints.txt\nnumpy>=1,<2", "numpy", "==1.26.4"),
        ("-c constraints.txt\nnumpy==1.25.0", "numpy", "==1.25.0"),
        ("-c constraints.txt\npandas>=2", "pandas", ">=2,<3"),
        ("-r more.txt", "rich", "==14"),
    ],
)
def test_what_pip_takes_is_taken(line: str, name: str, specifier: str, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(f"{line}\n", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("numpy==1.26.4\npandas<3\nunused==1\n")
    (tmp_path / "more.txt").write_text("rich==14\n-r requirements.txt\n-r ../../secret.txt\n")
    [(found, (wanted, _))] = model_requirements(tmp_path).items()
    assert found == name
    assert wanted.startswith(specifier)
    assert bool(wanted) == bool(specifier)


@pytest.mark.parametrize(
    ("entry", "name", "specifier"),
    [
        ("numpy=1.26.4", "numpy", "==1.26.4"),
        ("conda-forge::numpy=1.26.4=py311h64a7726_0", "numpy", "==1.26.4"),
        ("numpy 1.26.*", "numpy", "==1.26.*"),
        ("numpy >=1.20, <2", "numpy", ">=1.20,<2"),
        ("numpy", "numpy", ""),
        ("pytorch::pytorch==2.1.0", "torch", "==2.1.0"),
        ("pytorch-cuda=12.1", "cuda", "==12.1"),
        ("python=3.10", "python", "==3.10"),
    ],
)
def test_what_conda_brings_counts_too(entry: str, name: str, specifier: str, tmp_path: Path) -> None:
    """MLflow writes only pip's part of a conda environment to requirements.txt."""
    (tmp_path / "conda.yaml").write_text(f"dependencies:\n- {entry}\n- pip=24\n")
    assert {key: value[0] for key, value in model_requirements(tmp_path).items()} == {name: specifier}


def test_what_only_conda_knows_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "conda.yaml").write_text("dependencies:\n- libgcc-ng=13.2.0\n- numpy=1.26.4\n")
    assert [row.name for row in compare(model_requirements(tmp_path), IMAGE, None)] == ["numpy"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("requirements.txt", b"torch=2\n", "torch=2"),
        ("requirements.txt", "torch==2\n".encode("utf-16"), "no UTF-8"),
        ("conda.yaml", b"dependencies: numpy\n", "'numpy' where a list belongs"),
        ("python_env.yaml", b"python: [\n", "no YAML"),
    ],
)
def test_a_file_that_is_none(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StepError, match=words):
        model_requirements(tmp_path)


def test_a_version_in_yaml_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "python_env.yaml").write_text("python: 3.10\n")
    assert model_requirements(tmp_path)["python"][0] == "==3.10"


@given(st.text(max_size=60))
def test_any_line_is_taken_or_explained(line: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "requirements.txt").write_text(line, encoding="utf-8")
        try:
            rows = compare(model_requirements(Path(folder)), IMAGE, "13.0")
        except StepError:
            return
        assert all(row.name for row in rows)


def test_no_password_gets_into_the_provenance(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "private")
    lines = "--extra-index-url https://robot:hunter2@host/simple\nlib @ git+https://robot:hunter2@host/lib\n"
    (folder / "requirements.txt").write_text(lines)
    outcome = pull(f"models:/{NAME}/{workspace.add_model(NAME, folder)}")
    assert outcome.code == 0, outcome.message
    text = (outcome.output("provenance") / "provenance.json").read_text()
    assert "git+https://***@host/lib" in text
    assert "hunter2" not in text


def test_the_image_has_the_serve_extra_and_what_it_pulls_in() -> None:
    versions = image_versions()
    assert {"python", "torch", "uvicorn", "starlette", "safetensors"} <= versions.keys()
    assert not {"mlflow", "sagemaker", "pytest", "moto"} & versions.keys()


def test_the_image_requirements_are_what_is_lacking() -> None:
    rows = compare(
        {
            "numpy": ("==1.26.4", ""),
            "pandas": (">=2", ""),
            "torch": ("==2.13.0", ""),
            "python": ("==2.7", ""),
            "cuda": ("==11.8", ""),
        },
        IMAGE,
        "13.0",
    )
    assert image_requirements(rows) == "numpy==1.26.4\npandas>=2\n"


def test_conflicts_fail_the_pull_unless_allowed(workspace: Workspace, pull: Pull, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "old")
    (folder / "requirements.txt").write_text("torch==1.13.1\nnumpy==1.26.4\nmlflow==3.17.2\n")
    version = workspace.add_model(NAME, folder)
    uri = f"models:/{NAME}/{version}"
    failed(pull(uri), "torch ==1.13.1", "numpy ==1.26.4", "AllowRequirementConflicts = true")
    outcome = pull(uri, "--allow-requirement-conflicts", "true")
    assert outcome.code == 0, outcome.message
    document = json.loads((outcome.output("provenance") / "provenance.json").read_text())
    verdicts = {row["name"]: row["verdict"] for row in document["requirement_parity"]}
    assert verdicts == {"torch": "conflicting", "numpy": "conflicting", "mlflow": "missing"}


def test_the_command_reads_no_weights(workspace: Workspace, tmp_path: Path, capsys) -> None:
    out = tmp_path / "requirements-image.txt"
    assert requirements.main([f"models:/{NAME}@champion", "--write", str(out)]) == 0
    assert "mlflow" in capsys.readouterr().out
    assert out.read_text() == "mlflow==3.17.2\n"
    assert not workspace.count("safetensors")
    assert not workspace.count("GET .*/fs/files/.*(config|example|model.py)")


def test_the_command_explains_failures(workspace: Workspace, capsys) -> None:
    assert requirements.main([f"models:/{NAME}@absent"]) == 2
    assert "no alias 'absent'" in capsys.readouterr().err


def test_the_command_prints_json_and_fails_on_conflicts(tmp_path: Path, capsys) -> None:
    (tmp_path / "requirements.txt").write_text("torch==1.13.1\n")
    assert requirements.main([str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "conflicting"


# CUDA


def test_driver_and_kernel_against_torch(tmp_path: Path) -> None:
    (tmp_path / "hopper").mkdir()
    (tmp_path / "hopper" / "manifest.json").write_text('{"compiler": "nvcc 12.8.93"}')
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "manifest.json").write_text('{"compiler": "g++ 13.0.1"}')
    rows = {
        row.name: row.verdict for row in cuda.check("13.0", tmp_path, "al2-ami-sagemaker-inference-gpu-3-1")
    }
    assert rows == {
        "cuda (kernel hopper)": "conflicting",
        "driver (torch, CUDA 13.0)": "conflicting",
        "driver (kernel hopper, CUDA 12.8)": "compatible",
    }
    good = cuda.check("13.0", None, "al2023-ami-sagemaker-inference-gpu-4-1")
    assert [row.verdict for row in good] == ["compatible"]
    assert cuda.check("13.0", None, "my-ami")[0].note.startswith("'my-ami' is not in the table")


def test_what_no_table_knows_is_said() -> None:
    [row] = cuda.check("14.0", None, "my-ami")
    assert (row.verdict, row.wanted, row.note) == ("missing", "", "CUDA 14.0 is not in the table")
    assert cuda.check(None, None, "my-ami") == []


def test_what_is_written_is_for_pip(tmp_path: Path, monkeypatch) -> None:
    """A driver that is too old is in the table, not in the file."""
    monkeypatch.setattr(cuda, "torch_cuda", lambda: "13.0")
    (tmp_path / "requirements.txt").write_text("numpy==1.26.4\n")
    out = tmp_path / "out.txt"
    ami = ["--ami", "al2-ami-sagemaker-inference-gpu-2"]
    assert requirements.main([str(tmp_path), "--write", str(out), *ami]) == 1
    assert out.read_text() == "numpy==1.26.4\n"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_kernel_that_is_none(content: str | None, tmp_path: Path, capsys) -> None:
    if content:
        (tmp_path / "hopper").mkdir()
        (tmp_path / "hopper" / "manifest.json").write_text(content)
    assert requirements.main([str(tmp_path), "--kernel", str(tmp_path)]) == 2
    assert ("cannot be read" if content else "holds no kernel") in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    assert requirements.main([str(tmp_path), "--write", str(tmp_path / "absent" / "out.txt")]) == 2
    assert "Cannot write" in capsys.readouterr().err


def test_the_table_covers_every_gpu_ami_that_botocore_knows() -> None:
    import botocore.loaders

    model = botocore.loaders.Loader().load_service_model("sagemaker", "service-2")
    known = model["shapes"]["ProductionVariantInferenceAmiVersion"]["enum"]
    assert {name for name in known if "gpu" in name} == cuda.AMI_DRIVER.keys()


def test_cuda_of_the_installed_torch_without_importing_it() -> None:
    import torch

    assert cuda.torch_cuda() == torch.version.cuda
