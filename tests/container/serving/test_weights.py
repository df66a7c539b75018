"""Weights that are sharded, incomplete, damaged or not finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from container.serving.engine import Engine
from container.serving.weights import WeightError
from tests.container.serving.conftest import write_checkpoint

TOKENS = [5, 9, 200, 3]


def load(folder: Path) -> Engine:
    return Engine.load(folder, backend="reference", kv_cache_dtype="float32")


@pytest.fixture
def copy(reference, tmp_path: Path) -> Path:
    """A private copy of a checkpoint to break."""
    return Path(shutil.copytree(reference("v3-yarn").folder, tmp_path / "copy"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path) | tensors
    save_file({k: v for k, v in stored.items() if v is not None}, path, metadata={"format": "pt"})


def test_shards_equal_one_file(reference, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v3-yarn", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path).logits(TOKENS), load(reference("v3-yarn").folder).logits(TOKENS))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v3-yarn", max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(WeightError, match=lost.name):
        load(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v3-yarn", max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(WeightError, match=r"model\.extra"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, "v3-yarn", max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match=r"index\.json .*download it again"):
        load(tmp_path)


def test_experts_in_one_tensor(reference, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v3-yarn", save_original_format=False)
    # the mapped file is aligned in another way than the copies of single experts, so sums may differ in order
    expected = load(reference("v3-yarn").folder).logits(TOKENS)
    assert torch.allclose(load(tmp_path).logits(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_a_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        load(copy)


def test_a_missing_tensor(copy: Path) -> None:
    change(copy, **{"model.norm.weight": None})
    with pytest.raises(WeightError, match=r"no tensor model\.norm\.weight"):
        load(copy)


def test_a_wrong_shape(copy: Path) -> None:
    change(copy, **{"model.norm.weight": torch.ones(61)})
    with pytest.raises(WeightError, match=r"model\.norm\.weight .* shape \(61,\), config\.json says \(60,\)"):
        load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"])
def test_weights_that_are_not_finite(copy: Path, name: str, value: float) -> None:
    tensor = load_file(copy / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    change(copy, **{name: tensor})
    with pytest.raises(WeightError, match=f"{name} .* NaN or infinity"):
        load(copy)


def quantize(folder: Path, block: tuple[int, int]) -> None:
    """Turns the projections of a checkpoint into DeepSeek-V3's FP8 form, and says so in its config.json."""
    stored = load_file(folder / "model.safetensors")
    for name, weight in list(stored.items()):
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            continue
        rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        padded = torch.zeros(rows * block[0], columns * block[1])
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.view(rows, block[0], columns, block[1])
        scale = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-12) / 448  # the largest e4m3
        coded = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
        stored[name] = coded.to(torch.float8_e4m3fn).contiguous()
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*block]}
    (folder / "config.json").write_text(json.dumps(config))


def test_fp8_weights_are_multiplied_by_their_blocks_scales(reference, copy: Path) -> None:
    quantize(copy, (32, 16))  # neither divides every size
    exact, coded = load(reference("v3-yarn").folder), load(copy)
    for name in ("w_in", "w_kv", "w_out"):
        before = getattr(exact.model.layers[1].attention, name)
        after = getattr(coded.model.layers[1].attention, name)
        # e4m3 has three bits after the leading one: up to 1/16 of a value, 0.03 of the whole measured
        assert 0.01 < (after - before).norm() / before.norm() < 0.05
    assert torch.isfinite(coded.logits(TOKENS)).all()


def test_fp8_weights_without_their_scale(copy: Path) -> None:
    quantize(copy, (128, 128))
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    change(copy, **{name: None})
    with pytest.raises(WeightError, match=f"no tensor {name}"):
        load(copy)


def test_loading_reports_progress(reference) -> None:
    seen: list[float] = []
    Engine.load(reference("v3-yarn").folder, backend="reference", progress=seen.append)
    assert seen == sorted(seen)
    assert 0.98 < seen[-1] <= 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_the_mapped_file(reference) -> None:
    """On the CPU a tensor that needs no rearranging is not copied."""
    engine = load(reference("v3-yarn").folder)
    address = engine.model.embedding.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith("model.safetensors")
            return
    pytest.fail("the embedding is in no mapping")
