"""For all tests: what has to be set before torch or triton is imported, and one fixture."""

import os
import shutil
import sys
from collections.abc import Iterator

import pytest

# OpenMP's threads of several test processes would spin while they wait for each other's cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if not shutil.which("nvidia-smi"):
    # Triton reads it once, when its own library is imported: kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fresh_flash_mla() -> Iterator[None]:
    """Forget the module flash_mla afterwards: a process loads only one, and tests install several."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_mla"]:
        del sys.modules[name]
