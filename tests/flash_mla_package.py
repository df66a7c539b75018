"""A small package with flash_mla's Python interface on CPU tensors, as sources, wheel and archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

# torch is imported in the functions, so that looking at the module costs no second.
MODULE = """
def get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k):
    import torch

    return torch.zeros(1, 8, dtype=torch.int32), torch.zeros(len(cache_seqlens) + 1, dtype=torch.int32)


def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
    softmax_scale=None, causal=False,
):
    import torch

    if q.device.type != "cpu":
        raise RuntimeError("this flash_mla runs on a CPU only")
    b, s_q, h_q, _ = q.shape
    out = torch.zeros(b, s_q, h_q, head_dim_v, dtype=q.dtype)
    lse = torch.full((b, h_q, s_q), float("inf"))
    for row in range(b):
        for i in range(s_q):
            n = int(cache_seqlens[row]) - (s_q - 1 - i if causal else 0)
            if n <= 0:
                continue
            pages = k_cache[block_table[row, : (n + 63) // 64].long(), :, 0]
            keys = pages.flatten(0, 1)[:n].float()
            scores = q[row, i].float() @ keys.T * softmax_scale
            lse[row, :, i] = torch.logsumexp(scores, -1)
            out[row, i] = (torch.softmax(scores, -1) @ keys[:, :head_dim_v]).to(q.dtype)
    return out, lse
"""
NAME, VERSION = "cpu-flash-mla", "1.2"
WHEEL = "cpu_flash_mla-1.2-py3-none-any.whl"
PYPROJECT = f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{NAME}"
version = "{VERSION}"
dependencies = ["a-package-that-is-nowhere"]

[tool.setuptools]
packages = ["flash_mla"]
"""


def wheel(folder: Path, module: str = MODULE, package: str = "flash_mla") -> Path:
    """The package as a wheel in `folder`."""
    info = "cpu_flash_mla-1.2.dist-info"
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/__init__.py", module)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        names = [f"{package}/__init__.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def sources(module: str = MODULE, pyproject: str = PYPROJECT) -> dict[str, str]:
    """The package's files, in one folder as a repository's archive has them."""
    return {"flash-mla/pyproject.toml": pyproject, "flash-mla/flash_mla/__init__.py": module}


def tar_gz(files: dict[str, str]) -> bytes:
    """`files` as a .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def zipped(files: dict[str, str]) -> bytes:
    """`files` as a .zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()
