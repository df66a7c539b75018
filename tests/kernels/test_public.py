"""Backends that can be had, workloads and the bench."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from kernels import Backend, Problem, available_backends
from kernels.bench import main, measure
from kernels.compiled import hopper_unsupported
from kernels.reference import (
    dequantize_fp8_ds_mla,
    mla_decode_absorbed,
    mla_decode_reference,
    quantize_fp8_ds_mla,
)
from kernels.timing import interleaved, summarize
from kernels.workloads import PRESETS, Case, make_inputs, parse_workload


def test_hopper_says_before_the_call_which_dtypes_its_library_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    bf16, fp16, fp8 = torch.bfloat16, torch.float16, torch.uint8

    def reason(q: torch.dtype, cache: torch.dtype) -> str | None:
        return hopper_unsupported(Problem("cuda", q, cache, 4, 1, 16, 512, 64, 64))

    assert [reason(*pair) for pair in ((bf16, bf16), (fp16, fp16), (bf16, fp8))] == [None] * 3
    assert "fp8_ds_mla cache with bfloat16 queries, got torch.float16" in (reason(fp16, fp8) or "")
    assert "float16 (as q) or fp8_ds_mla cache, got torch.bfloat16" in (reason(fp16, bf16) or "")
    assert "bfloat16 and float16 queries, got torch.float32" in (reason(torch.float32, fp8) or "")


def test_available_backends_of_a_cpu() -> None:
    assert set(available_backends(None, torch.device("cpu"))) == {"cpu", "reference"}


@pytest.mark.parametrize("lengths", [[70, 3, 0], [128, 128]])
@pytest.mark.parametrize("causal", [False, True])
def test_absorbed_form_is_the_definition(lengths: list[int], causal: bool) -> None:
    inputs = make_inputs(lengths, h_q=3, s_q=2, causal=causal, q_dtype=torch.float32, kv_dtype=torch.float32)
    out, lse = mla_decode_absorbed(*inputs.arguments())
    expected, expected_lse = mla_decode_reference(*inputs.arguments())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    if len(set(lengths)) == 1:  # then it may be told
        told = mla_decode_absorbed(*inputs.arguments(), length=lengths[0])
        assert all(torch.equal(a, b) for a, b in zip(told, (out, lse), strict=True))


def test_fp8_layout_round_trip() -> None:
    cache = torch.randn(3, 64, 1, 576)
    packed = quantize_fp8_ds_mla(cache)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 64, 1, 656)
    unpacked = dequantize_fp8_ds_mla(packed)
    assert (
        float((unpacked - cache)[..., :512].norm() / cache[..., :512].norm()) < 0.04
    )  # e4m3: 3 fraction bits
    assert torch.equal(unpacked[..., 512:], cache[..., 512:].bfloat16().float())
    with pytest.raises(ValueError, match="656"):
        dequantize_fp8_ds_mla(cache)


def test_workloads() -> None:
    assert parse_workload("1x512,8x4096, 16x1024x2") == [Case(1, 512), Case(8, 4096), Case(16, 1024, 2)]
    assert [case.name for case in parse_workload("8x4096,16x1024x2")] == ["8x4096", "16x1024x2"]
    for preset in PRESETS:
        assert parse_workload(preset)
    for bad in ("", "fast", "8", "8x", "0x512", "1x512,", "1x512x99"):
        with pytest.raises(ValueError, match="workload"):
            parse_workload(bad)


def test_measure_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu: Backend) -> None:
    (result,) = measure({"cpu": cpu}, [Case(2, 100)], h_q=4, seconds_per_case=0.05, limit_gbps=10.0)
    assert result.name == "2x100"
    assert result.p50_us <= result.p90_us <= result.p99_us
    assert math.isclose(result.speedup, result.baseline_p50_us / result.p50_us)
    assert math.isclose(result.fraction_of_limit, result.gbps / 10)
    file = tmp_path / "bench.json"
    arguments = [
        "--workload",
        "1x64",
        "--heads",
        "4",
        "--seconds",
        "0.05",
        "--backends",
        "cpu",
        "--no-compile",
    ]
    assert main([*arguments, "--device", "cpu", "--out", str(file)]) == 0
    assert "geometric mean" in capsys.readouterr().out
    assert json.loads(file.read_text())["measurements"][0]["backend"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "0"], "'0' is no list of head counts"),
        (["--heads", "4,"], "'4,' is no list of head counts"),
        (["--threads", "0"], "'0' is no positive number"),
        (["--device", "nope"], "'nope' cannot be used"),
        (["--out", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--peers", "--library", "x"], "'x' is not NAME=FILE"),
        (["--peers", "--rounds", "0"], "'0' is no positive number"),
        (["--workload", "fast"], "'fast' is neither a preset"),
        (["--backends", "tpu"], "unknown backend 'tpu'; known: auto, cpu"),
        (["--kernel-dir", "/nowhere"], "/nowhere/index.json is missing"),
    ],
)
def test_command_says_what_it_cannot_do_before_it_measures(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):  # argparse's end, and the command's
        sys.exit(main(["--device", "cpu", *arguments]))
    said = capsys.readouterr()
    assert words in said.err
    assert not said.out


def test_command_says_who_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workload", "1x64", "--heads", "4", "--seconds", "0", "--no-compile", "--device", "cpu"]
    assert main([*arguments, "--backends", "triton,cpu", "--kv-dtype", "fp8_ds_mla"]) == 1
    assert "triton was not measured: triton takes q and cache of one dtype" in capsys.readouterr().err


def test_interleaved_runs_every_call_equally() -> None:
    order: list[str] = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    timings = interleaved(calls, torch.device("cpu"), seconds=0, least=4, most=4)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 4, "b": 4}
    assert order[6:] == list("abbaabba")
    assert summarize([1.0, 2.0, 3.0]).p50_us == 2.0
