"""For all tests: what is set before torch or triton is imported, and what ends with each."""

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


def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# Steps and the local run set variables for the libraries they call, as a process of their own may.
_after_each_file = pytest.fixture(autouse=True, scope="module", name="_file_environment")(
    _restored_environment
)
_after_each_test = pytest.fixture(autouse=True, name="_test_environment")(_restored_environment)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """A bytes parameter is named by its argument, not its content.

    An archive made while tests are collected holds the time, so that two pytest-xdist workers whose clocks
    stand a second apart would collect different names, and refuse to run.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def fresh_flash_mla() -> Iterator[None]:
    """Forget the module flash_mla afterwards: a process loads only one, and tests install several."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_mla"]:
        del sys.modules[name]
