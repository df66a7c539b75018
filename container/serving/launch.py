"""Programmatic dependent launch for the decode kernels: a kernel starts while the one before it still ends.

Every program of such a kernel first fetches what no earlier kernel writes (weights), then waits for the
kernel before it, and only then reads or writes anything else. Waiting for one kernel is waiting for all of
them, because that one has waited, too.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def _supported() -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


# arguments of a launch; empty where the device has no such thing
DEPENDENT = {"DEPENDENT": True, "launch_pdl": True} if _supported() else {"DEPENDENT": False}


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    if DEPENDENT:
        gdc_wait()


@triton.jit
def release_dependents(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lets the next kernel start once every program of this one has come here."""
    if DEPENDENT:
        gdc_launch_dependents()
