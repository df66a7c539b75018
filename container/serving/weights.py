"""Weights of a checkpoint folder, read from memory-mapped safetensors one at a time, no second copy."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from container.serving.config_json import NotMlaModel, read_json

log = logging.getLogger(__name__)


class WeightError(ValueError):
    """The weight files cannot be used; says which file or tensor, and what is wrong with it."""


class Checkpoint:
    """Tensors of a folder of *.safetensors, sharded or not, by their Hugging Face names.

    Files stay memory mapped, so opening a checkpoint reads only its headers. With `fp8_block` (rows, columns)
    e4m3 weights are multiplied by their block's scale, `<name>_scale_inv`, as they are read.
    Raises WeightError for a missing or damaged shard.
    """

    def __init__(self, folder: Path, fp8_block: tuple[int, int] | None = None):
        self.folder, self._fp8_block = Path(folder), fp8_block
        self.bytes_read = 0
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            files = sorted(set(weight_map.values()))
            missing = [name for name in files if not (self.folder / name).is_file()]
            if missing:
                raise WeightError(f"{index} names {len(missing)} missing shards: {', '.join(missing)}")
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if not files:
                raise WeightError(f"{self.folder} holds no *.safetensors")
        self._handles = {}
        self._file_of: dict[str, str] = {}
        for name in files:
            try:
                self._handles[name] = safe_open(str(self.folder / name), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise WeightError(f"{self.folder / name} is damaged ({error}); download it again") from None
            self._file_of.update(dict.fromkeys(self._handles[name].keys(), name))
        if index.is_file() and (absent := weight_map.keys() - self._file_of.keys()):
            raise WeightError(f"{index} names tensors that no shard has, {min(absent)} for one")

    @property
    def total_bytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum((self.folder / name).stat().st_size for name in self._handles)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor on the CPU: a view of the mapped file in the dtype it is stored in, float32 for FP8."""
        tensor = self._stored(name, shape)
        if self._fp8_block is not None and tensor.dtype == torch.float8_e4m3fn:
            rows, columns = self._fp8_block
            grid = (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
            scale = self._stored(f"{name}_scale_inv", grid).float()
            scale = scale.repeat_interleave(rows, 0)[: tensor.shape[0]]
            scale = scale.repeat_interleave(columns, 1)[:, : tensor.shape[1]]
            return tensor.float() * scale
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise WeightError(f"{name} is stored as {tensor.dtype}; convert the checkpoint to bfloat16")
        return tensor

    def _stored(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._file_of:
            raise WeightError(f"{self.folder} has no tensor {name}; the checkpoint is incomplete")
        tensor = self._handles[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise WeightError(
                f"{name} in {self.folder / self._file_of[name]} has shape {tuple(tensor.shape)}, "
                f"config.json says {tuple(shape)}"
            )
        self.bytes_read += tensor.nbytes
        return tensor


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names and the shards that hold them."""
    try:
        found = read_json(index).get("weight_map")
    except NotMlaModel as error:
        raise WeightError(f"{error}; download it again") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise WeightError(f"{index} has no 'weight_map' of tensors to shards; download it again")
    return found


Rows = tuple[str, tuple[int, ...]]  # name and shape of a stored tensor


class Loader:
    """Places tensors on a device in the model's dtype, checks that they are finite and reports progress."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[float], None] | None = None,
    ):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._progress = progress or LogProgress(checkpoint.total_bytes)
        self._total = max(checkpoint.total_bytes, 1)

    def one(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One stored tensor. On the CPU in its own dtype this is the mapped file itself."""
        source = self.checkpoint.tensor(name, shape)
        return self._checked(name, source.to(self.device, dtype or self.dtype))

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def optional(self, name: str, *shape: int) -> Tensor | None:
        return self.one(name, *shape) if name in self else None

    def joined(self, *parts: Rows) -> Tensor:
        """Stored tensors one below the other along the first dimension, in one allocation."""
        rows = sum(shape[0] for _, shape in parts)
        target = torch.empty(rows, *parts[0][1][1:], dtype=self.dtype, device=self.device)
        start = 0
        for name, shape in parts:
            source = self.checkpoint.tensor(name, shape)
            self._checked(name, target[start : start + shape[0]].copy_(source))
            start += shape[0]
        return target

    def stacked(self, groups: Sequence[Sequence[Rows]]) -> Tensor:
        """[len(groups), rows, columns]: each group joined along the rows."""
        rows = sum(shape[0] for _, shape in groups[0])
        target = torch.empty(len(groups), rows, *groups[0][0][1][1:], dtype=self.dtype, device=self.device)
        for row, group in zip(target, groups, strict=True):
            start = 0
            for name, shape in group:
                source = self.checkpoint.tensor(name, shape)
                self._checked(name, row[start : start + shape[0]].copy_(source))
                start += shape[0]
        return target

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        low, high = torch.aminmax(tensor)  # both are NaN if any value is
        if not torch.isfinite(low + high):
            raise WeightError(
                f"{name} in {self.checkpoint.folder} holds NaN or infinity as {tensor.dtype}; "
                "train or convert the checkpoint again"
            )
        self._progress(min(1.0, self.checkpoint.bytes_read / self._total))
        return tensor


class LogProgress:
    """Logs the loading of weights, at most once in two seconds."""

    def __init__(self, total_bytes: int, every: float = 2.0):
        self._total, self._every = total_bytes, every
        self._start = self._last = time.monotonic()

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = fraction * self._total / (now - self._start) / 1e9
        log.info("loading weights: %.0f%% of %.2f GB, %.2f GB/s", 100 * fraction, self._total / 1e9, rate)
