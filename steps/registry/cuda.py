"""CUDA, driver and torch: which versions run together, from tables with their sources."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from steps.job import StepError

# CUDA major version -> oldest driver branch that runs all its minor versions.
# Source: NVIDIA, "CUDA Compatibility", Minor Version Compatibility, table 1
# (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}

# InferenceAmiVersion -> driver branch on the endpoint's host.
# Source: SageMaker API, ProductionVariant.InferenceAmiVersion, as documented in botocore 1.44.5.
AMI_DRIVER = {
    "al2-ami-sagemaker-inference-gpu-2": 535,
    "al2-ami-sagemaker-inference-gpu-2-1": 535,
    "al2-ami-sagemaker-inference-gpu-3-1": 550,
    "al2023-ami-sagemaker-inference-gpu-4-1": 580,
}

# "nvcc 13.0.88", or nvcc's own "Cuda compilation tools, release 13.0, V13.0.88"
_NVCC = re.compile(r"(?:nvcc|cuda compilation tools, release)\D{0,12}(\d+\.\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class CudaRow:
    """One line of the comparison, in the form of requirements.Row."""

    name: str
    wanted: str
    image: str
    verdict: str
    note: str = ""


def torch_cuda() -> str | None:
    """CUDA version of the torch wheel in this environment ("13.0"), None for a CPU build or none at all.

    Read from torch/version.py: importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if (
            isinstance(target, ast.Name)
            and target.id == "cuda"
            and isinstance(node, ast.AnnAssign | ast.Assign)
        ):
            return ast.literal_eval(node.value) if node.value is not None else None
    return None


def check(torch: str | None, kernel: Path | None = None, ami: str | None = None) -> list[CudaRow]:
    """Compare the image's torch, a compiled kernel and the endpoint's host.

    Args:
        torch: CUDA version of torch, see torch_cuda.
        kernel: kernel artifact folder; its manifests say which compiler built each target.
        ami: InferenceAmiVersion of the endpoint.

    Raises:
        StepError: the folder holds no kernel, or a manifest that cannot be read.
    """
    rows = []
    needs = [("torch", torch)] if torch else []
    manifests = sorted(kernel.glob("*/manifest.json")) if kernel else []
    if kernel and not manifests:
        raise StepError(f"{kernel} holds no kernel: no */manifest.json.", "Name CompileKernel's output.")
    for manifest in manifests:
        try:
            compiler = str(json.loads(manifest.read_text(encoding="utf-8")).get("compiler", ""))
        except (ValueError, AttributeError, OSError) as error:
            raise StepError(f"{manifest} cannot be read: {error}.", "Build the kernel again.") from None
        if match := _NVCC.search(compiler):
            needs.append((f"kernel {manifest.parent.name}", match[1]))
    if torch:
        for name, version in needs[1:]:
            same = version.split(".")[0] == torch.split(".")[0]
            rows.append(
                CudaRow(
                    f"cuda ({name})",
                    f"=={version}",
                    torch,
                    "compatible" if same else "conflicting",
                    "torch's",
                )
            )
    if ami:
        rows += [_driver_row(name, version, ami) for name, version in needs]
    return rows


def wheel_note(name: str, torch: str | None) -> str:
    """Why a CUDA wheel that the model pins cannot go with the image's torch; "" when it can."""
    match = re.fullmatch(r"nvidia-.*-cu(\d+)", name)
    if match and torch and match[1] != torch.split(".")[0]:
        return f"for CUDA {match[1]}, the image's torch is built for CUDA {torch}"
    return ""


def local_note(local: str, torch: str | None) -> str:
    """What the local version of a pinned build ("cu126") says against the image's torch; "" for nothing."""
    match = re.fullmatch(r"cu(\d+)\d", local)
    if match and torch and match[1] != torch.split(".")[0]:
        return f"a build for CUDA {match[1]}, the image's torch is built for CUDA {torch}"
    return ""


def _driver_row(name: str, version: str, ami: str) -> CudaRow:
    minimum = MINIMUM_DRIVER.get(int(version.split(".")[0]))
    driver = AMI_DRIVER.get(ami)
    label = f"driver ({name}, CUDA {version})"
    if minimum is None:
        return CudaRow(label, "", str(driver or ""), "missing", f"CUDA {version} is not in the table")
    if driver is None:
        known = ", ".join(AMI_DRIVER)
        return CudaRow(label, f">={minimum}", "", "missing", f"'{ami}' is not in the table: {known}")
    if driver >= minimum:
        return CudaRow(label, f">={minimum}", str(driver), "compatible", ami)
    return CudaRow(
        label,
        f">={minimum}",
        str(driver),
        "conflicting",
        f"{ami}; runs only with CUDA's compatibility libraries",
    )
