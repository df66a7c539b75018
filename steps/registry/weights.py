"""What a model's files really are: pickles refused, safetensors checked against their headers."""

from __future__ import annotations

import bz2
import json
import lzma
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Set
from pathlib import Path

from steps.job import StepError

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"}

_PROTOCOLS = tuple(b"\x80" + bytes([version]) for version in range(2, 6))
_OPCODES = {opcode.code for opcode in pickletools.opcodes}
_IMPORTS = {"GLOBAL", "INST", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "EXT1", "EXT2", "EXT4"}
_TEXT_PICKLE_LIMIT = 16 << 20  # protocols 0 and 1 have no magic number; parsing bigger files costs too much
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit on its header, bytes
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def check_pickle_names(paths: list[str], allow_pickle: bool) -> None:
    """Refuse pickles by their names, before a byte is downloaded. Raises StepError."""
    named = [path for path in paths if Path(path).suffix.lower() in PICKLE_SUFFIXES]
    if named and not allow_pickle:
        raise _pickle_error(named[0], "by its name", len(named))


def check_weights(folder: Path, allow_pickle: bool) -> None:
    """Check every file below `folder` (the downloaded model).

    Raises:
        StepError: a file is a pickle (by content), a safetensors file is truncated or malformed, or an index
            names a tensor that its shard does not hold.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    tensors: dict[Path, Set[str]] = {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        if not allow_pickle and (reason := pickle_reason(file)):
            raise _pickle_error(name, reason, 1)
        if file.suffix == ".safetensors":
            tensors[file] = check_safetensors(file, name)
    for file in files:
        if file.name.endswith(".safetensors.index.json"):
            _check_index(file, file.relative_to(folder).as_posix(), tensors)


def pickle_reason(file: Path) -> str | None:
    """Why `file` counts as a pickle, judged by content alone; None when it does not."""
    with file.open("rb") as stream:
        head = stream.read(256)
    if head.startswith(_PROTOCOLS) and head[2:3].decode("latin-1") in _OPCODES:
        return "its content begins as a pickle"
    if (
        head.startswith(b"PK\x03\x04") and file.suffix != ".whl"
    ):  # a wheel may hold pickles as its tests' data
        try:
            with zipfile.ZipFile(file) as archive:
                pickled = [name for name in archive.namelist() if Path(name).suffix in {".pkl", ".pickle"}]
        except zipfile.BadZipFile:
            return None
        return f"it is a PyTorch archive with {pickled[0]}" if pickled else None
    if (inner := _decompressed(head)) and inner.startswith(_PROTOCOLS):
        return "it is a compressed pickle"
    if (
        head[:1] in b"(cl]}S"
        and file.stat().st_size <= _TEXT_PICKLE_LIMIT
        and _is_text_pickle(file.read_bytes())
    ):
        return "its content is a pickle of protocol 0 or 1"
    return None


def check_safetensors(file: Path, name: str) -> Set[str]:
    """Compare a safetensors file with its own header: every tensor's bytes, and their sum, must be there.

    Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps
    (https://github.com/huggingface/safetensors, section Format).

    Args:
        file: the file.
        name: how to call it in an error.

    Returns:
        the names of its tensors.

    Raises:
        StepError: truncated, or the header contradicts the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _HEADER_LIMIT or 8 + length > size:
            raise _safetensors_error(
                name, f"has {size} bytes, which cannot hold its header of {length} bytes"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            spans = sorted((*_span(value), key) for key, value in tensors.items())
            needed = {key: _tensor_bytes(value) for key, value in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _safetensors_error(name, "has a header that is no table of tensors") from None
    position = 0
    for begin, end, key in spans:
        if begin != position or end < begin:
            raise _safetensors_error(name, f"leaves a gap or an overlap before tensor {key!r:.100}")
        if end - begin != needed[key]:
            raise _safetensors_error(
                name, f"has {end - begin} bytes for {key!r:.100}, not what its shape needs"
            )
        position = end
    if 8 + length + position != size:
        state = "truncated" if size < 8 + length + position else "longer than it should be"
        raise _safetensors_error(name, f"is {state}: {size} bytes, its header says {8 + length + position}")
    return tensors.keys()


def _span(entry: dict) -> tuple[int, int]:
    begin, end = map(_count, entry["data_offsets"])
    return begin, end


def _tensor_bytes(entry: dict) -> int:
    """Bytes that shape and type need; -1 for a type that safetensors does not have."""
    values = math.prod(map(_count, entry["shape"]))
    bits = _ITEM_BITS.get(str(entry["dtype"]))
    return -1 if bits is None else (values * bits + 7) // 8


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _check_index(file: Path, name: str, tensors: dict[Path, Set[str]]) -> None:
    """Compare an index with its shards; `tensors` holds the names in each safetensors file of the model."""
    try:
        entries = sorted(json.loads(file.read_text(encoding="utf-8"))["weight_map"].items())
        shards = {shard: file.parent / shard for _, shard in entries}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _safetensors_error(name, "is no safetensors index (weight_map)") from None
    for tensor, shard in entries:
        if shards[shard] not in tensors:
            raise _safetensors_error(name, f"names the shard {shard!r:.200}, which the model does not hold")
        if tensor not in tensors[shards[shard]]:
            raise _safetensors_error(
                name, f"says that {shard!r:.200} holds {tensor!r:.200}, which it does not"
            )


def _is_text_pickle(data: bytes) -> bool:
    if not data.rstrip().endswith(b"."):
        return False
    try:
        return any(opcode.name in _IMPORTS for opcode, _, _ in list(pickletools.genops(data)))
    except Exception:  # genops raises whatever the first malformed argument provokes: not a pickle
        return False


def _decompressed(head: bytes) -> bytes:
    openers: dict[bytes, Callable[[], object]] = {
        b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
        b"BZh": bz2.BZ2Decompressor,
        b"\xfd7zXZ": lzma.LZMADecompressor,
        b"x": zlib.decompressobj,
    }
    for magic, opener in openers.items():
        if head.startswith(magic):
            try:
                return opener().decompress(head)  # type: ignore[attr-defined]
            except (zlib.error, lzma.LZMAError, OSError):
                return b""
    return b""


def _pickle_error(name: str, reason: str, count: int) -> StepError:
    others = f" (and {count - 1} more)" if count > 1 else ""
    return StepError(
        f"The model holds a pickle, {name}{others}: {reason}; loading a pickle runs whatever code it holds.",
        "Log the weights as safetensors or, if you trust their author, set mlflow.allow_pickled_weights: "
        "true in the environment's configuration (the step's --allow-pickle true).",
    )


def _safetensors_error(name: str, what: str) -> StepError:
    return StepError(f"{name} {what}.", "Log the model again, or copy the complete file into the registry.")
