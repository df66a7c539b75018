"""Pickles by content, whatever their name; safetensors against their own header."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from steps.job import StepError
from steps.registry.weights import check_pickle_names, check_safetensors, check_weights, pickle_reason


class Harmful:
    """Its pickle names a function to call."""

    def __reduce__(self):
        return (print, ("loaded",))


def torch_archive(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return stream.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_recognised(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "innocent.txt"
    file.write_bytes(pickle.dumps(Harmful(), protocol))
    assert pickle_reason(file)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bz2.compress, lzma.compress])
def test_compressed_pickles_are_recognised(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(pack(pickle.dumps(Harmful())))
    assert pickle_reason(file) == "it is a compressed pickle"


def test_a_torch_archive_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(torch_archive("archive/data.pkl", "archive/data/0"))
    assert "archive/data.pkl" in (pickle_reason(file) or "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"(a list of words).",
        b"import this\nx.",
        b"cat sat on the mat.",
        save({"a": np.zeros(3, np.float32)}),
        torch_archive("notes.txt"),
        gzip.compress(b"text"),
        b"\x80\x02" + bytes(range(200, 256)),
        b"PK\x03\x04 not really a zip",
    ],
)
def test_other_content_is_not_taken_for_one(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert pickle_reason(file) is None


@given(st.text(max_size=200))
def test_text_is_never_taken_for_one(text: str) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as stream:
        stream.write(text.encode())
        stream.flush()
        assert pickle_reason(Path(stream.name)) is None


@pytest.mark.parametrize(
    "name", ["w.bin", "W.BIN", "a/m.pt", "m.pth", "m.ckpt", "python_model.pkl", "s.joblib"]
)
def test_names(name: str) -> None:
    with pytest.raises(StepError, match="--allow-pickle true"):
        check_pickle_names(["MLmodel", name], allow_pickle=False)
    check_pickle_names([name], allow_pickle=True)


def good() -> bytes:
    return save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)})


def with_header(change: Callable[[dict], None]) -> bytes:
    blob = good()
    length = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob[8 + length :]


def test_a_good_file_passes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for blob in (good(), with_header(lambda h: h.update(__metadata__={"format": "pt"})), save({})):
        file.write_bytes(blob)
        check_safetensors(file, "w")


@given(st.integers(0, len(good()) - 1))
def test_any_truncation_is_seen(length: int) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as stream:
        stream.write(good()[:length])
        stream.flush()
        with pytest.raises(StepError, match=r"truncated|cannot hold|no table"):
            check_safetensors(Path(stream.name), "w")


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (good() + b"x", "longer than it should be"),
        (b"<html>502 Bad Gateway</html>", "cannot hold its header"),
        (struct.pack("<Q", 4) + b"[1]]", "no table of tensors"),
        (struct.pack("<Q", 2) + b"[]", "no table of tensors"),
        (with_header(lambda h: h["a"].update(shape=[2, 4])), "not what its shape needs"),
        (with_header(lambda h: h["a"].update(dtype="F12")), "not what its shape needs"),
        (with_header(lambda h: h["a"].update(shape=[-2, -3])), "no table of tensors"),
        (with_header(lambda h: h["a"].pop("shape")), "no table of tensors"),
        (with_header(lambda h: h["a"].update(data_offsets=[0, 24, 34])), "no table of tensors"),
        (with_header(lambda h: h["b"].update(data_offsets=[25, 35])), "gap or an overlap"),
    ],
)
def test_a_header_that_contradicts_the_file(blob: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(blob)
    with pytest.raises(StepError, match=words):
        check_safetensors(file, "w")


def test_shards_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(good())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StepError, match="model-00002-of-00002"):
        check_weights(tmp_path, allow_pickle=False)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(good())
    check_weights(tmp_path, allow_pickle=False)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "w-1.safetensors", "c": "w-2.safetensors"}, "says that 'w-2.safetensors' holds 'c'"),
        ({"a": "../other/w.safetensors"}, "names the shard '../other"),
        ({"a": "/etc/hostname"}, "names the shard '/etc/hostname'"),
        ({"a": "config.json"}, "names the shard 'config.json'"),
        ({"a": 1}, "is no safetensors index"),
        (["a"], "is no safetensors index"),
    ],
)
def test_an_index_that_lies(weight_map: object, words: str, tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for file in (model / "w-1.safetensors", model / "w-2.safetensors", other / "w.safetensors"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(good())
    (model / "config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(StepError, match=words):
        check_weights(model, allow_pickle=False)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", ""]),
    _JSON,
)
def test_any_header_is_accepted_or_explained(key: str, field: str, value: object) -> None:
    """And what is accepted, the safetensors library reads."""
    import tempfile

    def change(header: dict) -> None:
        if field and key in header:
            header[key][field] = value
        else:
            header[key] = value

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as stream:
        stream.write(with_header(change))
        stream.flush()
        try:
            names = check_safetensors(Path(stream.name), "w")
        except StepError:
            return
        if key != "__metadata__":
            with safe_open(stream.name, "np") as opened:
                assert names == set(opened.keys())


def test_a_wheel_may_hold_pickles_as_data(tmp_path: Path) -> None:
    (tmp_path / "numpy-2.4.6-cp311-cp311-linux_x86_64.whl").write_bytes(torch_archive("numpy/tests/old.pkl"))
    check_weights(tmp_path, allow_pickle=False)
