"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes."""

import os
from importlib.metadata import entry_points
from pathlib import Path

from kernels import Backend, get_backend

GROUP = "vllm.general_plugins"
ATTENTION = "container.serving.vllm_engine.attention.MlaKernelBackend"
# Those that CUDA graphs can capture. "auto" measures while it runs, which a capture cannot.
BACKENDS = ("hopper", "triton")


def register() -> None:
    """Makes `--attention-backend CUSTOM` of vLLM mean our kernel; imports neither the kernel nor torch."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, ATTENTION)


def check_installed() -> None:
    """Raises RuntimeError when vLLM would not find `register`: a copied source tree has no entry points."""
    if not any(point.value.startswith(f"{__name__}:") for point in entry_points(group=GROUP)):
        raise RuntimeError(
            f"this package's entry point in {GROUP} is not installed, so vLLM cannot find the kernel; "
            "run `pip install --no-deps --editable .` in the source tree"
        )


def kernel_backend(name: str | None = None, kernel_dir: Path | None = None) -> Backend:
    """The backend that decodes: arguments, else MLA_KERNEL_BACKEND and MLA_KERNEL_DIR, else `hopper`.

    "auto" takes `hopper`. Raises ValueError for one that CUDA graphs cannot capture, BackendError when the
    artifact lacks it, KernelPackageError when it is damaged.
    """
    name = name or os.environ.get("MLA_KERNEL_BACKEND") or "auto"
    folder = os.environ.get("MLA_KERNEL_DIR")
    if name == "auto":
        name = BACKENDS[0]
    if name not in BACKENDS:
        raise ValueError(
            f"backend {name!r} cannot decode inside vLLM, which captures CUDA graphs; "
            f"set MLA_KERNEL_BACKEND to {' or '.join(BACKENDS)}, or serve with engine: native"
        )
    return get_backend(name, kernel_dir or (Path(folder) if folder else None))
