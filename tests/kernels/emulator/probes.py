"""Run the kernels of probes.cu, each wrong in one way."""

from __future__ import annotations

import ctypes

import torch

from tests.kernels.emulator.backend import configure
from tests.kernels.emulator.build import EMULATOR, build


class Probes:
    """The compiled probes."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build(source=EMULATOR / "probes.cu")))
        self._library.probe.restype = ctypes.c_char_p
        self._library.probe.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]

    def run(self, name: str, seed: int) -> str:
        """What the emulator says of the probe; nothing when it passes."""
        data, given = torch.zeros(64, dtype=torch.int32), torch.zeros(16384, dtype=torch.uint8)
        configure(self._library, seed, 2, {"data": data, "bytes": given}, {"data"})
        said: bytes = self._library.probe(name.encode(), data.data_ptr(), given.data_ptr())
        return said.decode()
