"""The machine and the software that the figures belong to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from kernels.machine import cpuinfo, processor_name
from kernels.package import KernelIndex

# Flags of /proc/cpuinfo that decide which code path of the cpu kernel runs.
VECTOR_UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
}


def machine(device: torch.device, ml_root: Path) -> dict[str, str | int | float | None]:
    """Processor, memory, accelerator and SageMaker instance type (None outside SageMaker)."""
    cpu = cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    accelerator = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector_units": ", ".join(name for flag, name in VECTOR_UNITS.items() if flag in flags) or None,
        "memory_gb": round(pages * page_bytes / 1e9, 1),
        "accelerator": accelerator.name if accelerator else None,
        "accelerator_memory_gb": round(accelerator.total_memory / 1e9, 1) if accelerator else None,
        "instance_type": _instance_type(ml_root),
        "operating_system": f"{platform.system()} {platform.release()}",
    }


def free_bytes(device: torch.device) -> int:
    """Memory that a model can take on `device` now, bytes; on a CPU what the page cache gives back counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    fields = (
        dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.is_file() else {}
    )
    if "MemAvailable" in fields:
        return int(fields["MemAvailable"].split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def versions(index: KernelIndex, backend: str) -> dict[str, str | None]:
    """Versions of what took part; `compiler` made the winning kernel, `flash_mla` is KernelSource's."""
    package = index.packages.get(backend)
    return {
        "mla_pipeline": _version("mla-pipeline"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "compiler": package.manifest.get("compiler") if package else None,
        "kernel_flags": " ".join(package.manifest.get("flags", [])) if package else None,
        "flash_mla": index.flash_mla.label if index.flash_mla else None,
    }


def _instance_type(ml_root: Path) -> str | None:
    """SageMaker writes it into every job's container."""
    path = ml_root / "config" / "resourceconfig.json"
    return json.loads(path.read_text()).get("current_instance_type") if path.is_file() else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
