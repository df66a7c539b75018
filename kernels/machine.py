"""The names of what figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.is_file() else ""
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor_name() -> str:
    """The processor's own name, else the kind of machine."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, for the head of a table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
