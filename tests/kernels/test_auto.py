"""The auto backend: what it measures, what it leaves out, and its choice on a Hopper GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from kernels import Backend, available_backends, get_backend
from kernels.auto import AutoBackend
from kernels.reference import mla_decode_reference
from kernels.workloads import make_inputs


def test_auto_takes_a_correct_backend_once_a_class() -> None:
    auto = AutoBackend()
    inputs = make_inputs([70, 3, 0], h_q=4)
    out, _ = auto(*inputs.arguments())
    expected, _ = mla_decode_reference(*inputs.arguments())
    assert float((out.double() - expected).norm() / expected.norm()) < 4 * 2.0**-9
    assert auto.choose(*inputs.arguments()).name == "cpu"


def test_auto_leaves_a_wrong_backend_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name = "cpu"

        def unsupported(self, problem: object) -> None:
            return None

        def __call__(self, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = get_backend("reference")(*arguments)
            return out * 1.1, lse

    found = {"cpu": Wrong(), "reference": get_backend("reference")}
    monkeypatch.setattr("kernels.auto.available_backends", lambda *_: found)
    with pytest.raises(RuntimeError, match="agrees with the reference"):
        AutoBackend()(*make_inputs([70], h_q=4).arguments())


def test_auto_passes_over_a_backend_that_refuses_the_call(
    cpu: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As hopper refuses some strides, which no problem describes."""

    class Refusing:
        name = "hopper"

        def unsupported(self, problem: object) -> None:
            return None

        def __call__(self, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
            raise NotImplementedError("q_stride_seq=576 is not taken")

    found = {"hopper": Refusing(), "cpu": cpu, "reference": get_backend("reference")}
    monkeypatch.setattr("kernels.auto.available_backends", lambda *_: found)
    assert AutoBackend().choose(*make_inputs([70], h_q=4).arguments()) is cpu
    assert "hopper does not run" in caplog.text
    assert "q_stride_seq=576 is not taken" in caplog.text
    found.pop("cpu")
    assert AutoBackend().choose(*make_inputs([70], h_q=4).arguments()).name == "reference"


def test_auto_checks_as_many_rows_as_memory_allows(cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gathers the cache in float32; beside a server's cache there is no room for all of it."""
    rows: list[int] = []
    reference = get_backend("reference")

    class Counting:
        def __call__(self, q: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
            rows.append(len(q))
            return reference(q, *arguments)

        def unsupported(self, problem: object) -> None:
            return None

    found = {"cpu": cpu, "reference": Counting()}
    monkeypatch.setattr("kernels.auto.available_backends", lambda *_: found)
    inputs = make_inputs([70, 3, 0, 100], h_q=4)
    for allowed, checked in ((1 << 30, 4), (2 * 3 * 64 * 3 * 4 * (576 + 4), 2), (1, 1)):
        monkeypatch.setattr("kernels.auto.CHECK_BYTES", allowed)
        assert AutoBackend().choose(*inputs.arguments()) is cpu
        assert rows.pop() == checked


def test_auto_falls_back_to_the_reference() -> None:
    inputs = make_inputs([70], h_q=4, kv_lora_rank=24, rope_dim=8)
    assert AutoBackend().choose(*inputs.arguments()).name == "reference"


@pytest.mark.gpu
def test_auto_measures_every_backend_of_a_hopper_gpu(caplog: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    names = available_backends(None, torch.device("cuda", 0)).keys() - {"reference"}
    assert names >= {"hopper", "triton"}
    auto, inputs = AutoBackend(), make_inputs([4096] * 4, h_q=16, device="cuda")
    with caplog.at_level(logging.INFO, "kernels.auto"):
        chosen = auto.choose(*inputs.arguments())
    assert chosen.name == "hopper"
    (line,) = caplog.messages
    assert all(f"'{name}': " in line for name in names)
    out, _ = auto(*inputs.arguments())
    assert torch.equal(out, chosen(*inputs.arguments())[0])
