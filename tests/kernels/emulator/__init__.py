"""An emulator of what the Hopper kernels use of a GPU: it runs their own sources on a CPU.

`build` compiles kernels/csrc/hopper with the host's C++ compiler, ptx.cuh, mma.cuh and wgmma.cuh replaced by
those in device/ and CUDA's headers by those in cuda/; `Emulator` calls the result on CPU tensors.
"""

from tests.kernels.emulator.backend import EmulatedFailure, Emulator
from tests.kernels.emulator.build import build

__all__ = ["EmulatedFailure", "Emulator", "build"]
