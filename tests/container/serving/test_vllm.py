"""The vLLM engine without vLLM: the kernel's arguments, the checks, and the engine over a stand-in client.

The stand-in answers as vLLM's LLMEngine does, with tokens that the native engine chooses, so everything on
this side of vLLM's client is compared with the native engine itself.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from container.serving.__main__ import load
from container.serving.checkpoint import ModelConfig, find_checkpoint
from container.serving.engine import Engine
from container.serving.sequence import Sampling
from container.serving.settings import ServerSettings, SettingsError
from container.serving.vllm_engine import arguments, plugin
from container.serving.vllm_engine.arguments import VllmOptions
from container.serving.vllm_engine.decode import decode
from container.serving.vllm_engine.engine import EngineStats, VllmEngine
from kernels import BackendError, get_backend
from kernels.build import build
from kernels.reference import mla_decode_reference

RANK, ROPE, PAGE = 512, 64, 64


class Client:
    """vLLM's LLMEngine over a native engine; gives up to two new tokens of a request at once."""

    def __init__(self, engine: Engine, together: int = 2):
        self.engine, self.together = engine, together
        self.model_config = SimpleNamespace(max_model_len=engine.max_model_len)
        self.engine_core = SimpleNamespace(shutdown=lambda timeout: None)
        self.sequences: dict[str, Any] = {}
        self.sent: dict[str, int] = {}
        self.ended: list[str] = []

    def add_request(self, name: str, prompt: dict[str, Any], params: dict[str, Any]) -> None:
        if params["seed"] == 13:
            raise ValueError("seed 13 is unlucky")
        assert prompt["type"] == "token"
        sampling = Sampling(
            max_tokens=params["max_tokens"],
            temperature=params["temperature"],
            top_k=params["top_k"],
            top_p=params["top_p"],
            seed=params["seed"],
            logprobs=params["logprobs"],
            ignore_eos=not params["stop_token_ids"],
        )
        self.sequences[name] = self.engine.add(prompt["prompt_token_ids"], sampling)
        self.sent[name] = 0

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.engine.abort(self.sequences.pop(name))
            self.ended.append(name)

    def step(self) -> list[Any]:
        for _ in range(self.together):
            self.engine.step()
        outputs = []
        for name, sequence in list(self.sequences.items()):
            start, self.sent[name] = self.sent[name], len(sequence.output)
            if start == len(sequence.output) and not sequence.finish_reason:
                continue
            logprobs = None
            if sequence.sampling.logprobs is not None:
                fresh = len(sequence.output) - start
                logprobs = [self._entries(entry) for entry in sequence.logprobs[-fresh:]]  # as vLLM slices
            completion = SimpleNamespace(
                token_ids=sequence.output[start:], logprobs=logprobs, finish_reason=sequence.finish_reason
            )
            finished = sequence.finish_reason is not None
            if finished:
                del self.sequences[name]
            outputs.append(
                SimpleNamespace(
                    request_id=name,
                    outputs=[completion],
                    finished=finished,
                    num_cached_tokens=sequence.reused,
                )
            )
        return outputs

    @staticmethod
    def _entries(entry: Any) -> dict[int, Any]:
        """{token id: logprob and rank}, the chosen token first, as vLLM orders them."""
        ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
        chosen = {entry.token_id: (entry.logprob, ranks.get(entry.token_id, len(ranks) + 7))}
        both = chosen | {token: (value, ranks[token]) for token, value in entry.top}
        return {token: SimpleNamespace(logprob=value, rank=rank) for token, (value, rank) in both.items()}


@pytest.fixture
def pair(tiny_engine: Callable[..., Engine]) -> tuple[VllmEngine, Engine, Client]:
    """The vLLM engine over a client, a native engine to compare with, and the client."""
    client = Client(tiny_engine())
    native = tiny_engine()
    engine = VllmEngine(client, dict, native.config, native.tokenizer, "hopper", EngineStats())
    return engine, native, client


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.9},
        {"logprobs": 3},
        {"logprobs": 0},
        {"ignore_eos": True},
    ],
)
def test_completions_are_the_native_engines(
    pair: tuple[VllmEngine, Engine, Client], sampling: dict[str, Any]
) -> None:
    engine, native, _ = pair
    prompts = ["Once", "a longer prompt than that", "x"]
    got = engine.generate(prompts, 21, **sampling)
    assert got == native.generate(prompts, 21, **sampling)
    assert not engine.busy


def test_a_stop_string_ends_the_request_in_vllm_too(pair: tuple[VllmEngine, Engine, Client]) -> None:
    engine, native, client = pair
    text = native.generate(["abc"], 30)[0].text
    stop = text[5:8]
    (got,) = engine.generate(["abc"], 30, stop=(stop,))
    (expected,) = native.generate(["abc"], 30, stop=(stop,))
    assert (got.text, got.finish_reason) == (expected.text, "stop")
    assert got.token_ids == expected.token_ids
    assert len(client.ended) == 1
    assert not client.sequences


def test_abort_ends_one_request_and_no_other(pair: tuple[VllmEngine, Engine, Client]) -> None:
    engine, native, _ = pair
    gone = engine.add("goes away", Sampling(max_tokens=200))
    stays = engine.add("stays", Sampling(max_tokens=30))
    engine.step()
    engine.abort(gone)
    engine.abort(gone)
    assert gone.finish_reason == "abort"
    while engine.busy:
        engine.step()
    assert stays.output == native.generate(["stays"], 30)[0].token_ids


def test_what_vllm_refuses_is_an_error_of_that_request_only(pair: tuple[VllmEngine, Engine, Client]) -> None:
    engine, _, _ = pair
    bad = engine.add("no", Sampling(temperature=1.0, seed=13))
    good = engine.add("yes", Sampling(max_tokens=4))
    while engine.busy:
        engine.step()
    assert bad.finish_reason == "error"
    assert "unlucky" in (bad.error or "")
    assert len(good.output) == 4


def test_an_end_that_only_vllm_knows(pair: tuple[VllmEngine, Engine, Client]) -> None:
    engine, _, client = pair
    sequence = engine.add("hello", Sampling(max_tokens=50, logprobs=1))
    engine.step()
    inner = next(iter(client.sequences.values()))
    client.engine.abort(inner)
    inner.finish_reason = "repetition"
    steps = engine.step()
    assert steps[-1].finish_reason == "error"
    assert "repetition" in (sequence.error or "")
    assert not engine.busy


def test_gauges_follow_vllms_figures(pair: tuple[VllmEngine, Engine, Client]) -> None:
    engine, _, _ = pair
    stats = EngineStats()
    stats.pages = 200
    engine._stats = stats
    logger = stats.logger(None)
    for _ in range(3):
        engine.add("prompt", Sampling(max_tokens=8))
    logger.record(
        SimpleNamespace(num_running_reqs=2, kv_cache_usage=0.25), SimpleNamespace(num_preempted_reqs=4)
    )
    assert engine.gauges() == {
        "requests_running": 2,
        "requests_waiting": 1,
        "cache_pages": 200,
        "cache_pages_used": 50,
        "preemptions": 4,
    }
    assert engine.waiting == 1


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_decode_gives_the_operators_result(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, 3), label="queries a request")
    lengths = data.draw(
        st.lists(st.one_of(st.just(0), st.integers(new, 150)), min_size=1, max_size=4), label="lengths"
    )
    heads = data.draw(st.sampled_from([1, 2, 5]), label="heads")
    paired = data.draw(st.booleans(), label="q in two parts")
    torch.manual_seed(sum(lengths) + heads)
    requests, blocks = len(lengths), 3
    q = torch.randn(requests * new, heads, RANK + ROPE)
    cache = torch.randn(requests * blocks + 1, PAGE, RANK + ROPE)
    # wider than it need be, as vLLM's: a slice of the rows of one buffer
    table = torch.randperm(requests * blocks).view(requests, blocks).int() + 1
    table = torch.cat([table, torch.zeros(requests, 2, dtype=torch.int32)], dim=1)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    parts = (q[..., :RANK], q[..., RANK:]) if paired else q
    out, lse = decode(get_backend("cpu"), parts, cache, table, seq_lens, RANK, 0.07)
    expected, expected_lse = mla_decode_reference(
        q.view(requests, new, heads, RANK + ROPE), cache[:, :, None], table, seq_lens, RANK, 0.07, new > 1
    )
    torch.testing.assert_close(out.double(), expected.view(-1, heads, RANK).double(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(
        lse.double(), expected_lse.transpose(1, 2).reshape(-1, heads).double(), rtol=1e-4, atol=1e-4
    )
    assert (out.view(requests, -1)[seq_lens == 0] == 0).all()


def test_decode_refuses_a_batch_that_is_not_uniform() -> None:
    with pytest.raises(ValueError, match="5 tokens of 2 requests"):
        decode(
            get_backend("reference"),
            torch.zeros(5, 1, RANK + ROPE),
            torch.zeros(2, PAGE, RANK + ROPE),
            torch.zeros(2, 1, dtype=torch.int32),
            torch.ones(2, dtype=torch.int32),
            RANK,
            1.0,
        )


def test_a_kernel_that_no_graph_can_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_KERNEL_BACKEND", "reference")
    with pytest.raises(ValueError, match="hopper or triton"):
        plugin.kernel_backend()


def test_an_artifact_without_the_target_says_why(tmp_path: Path) -> None:
    build("cpu", tmp_path)
    with pytest.raises(BackendError, match="holds no target 'hopper'"):
        plugin.kernel_backend("auto", tmp_path)


def test_settings_that_do_not_fit(tiny_folder: Path) -> None:
    config = ModelConfig.from_folder(find_checkpoint(tiny_folder))
    half = dataclasses.replace(config, dtype="bfloat16")
    arguments.check_settings(half, "bfloat16", VllmOptions(tensor_parallel=2))
    with pytest.raises(ValueError, match="float32, KvCacheDtype bfloat16"):
        arguments.check_settings(config, "bfloat16", VllmOptions())
    with pytest.raises(ValueError, match="fp8_ds_mla"):
        arguments.check_settings(half, "fp8_ds_mla", VllmOptions())
    with pytest.raises(ValueError, match="cannot be split over 3 GPUs"):
        arguments.check_settings(half, "bfloat16", VllmOptions(tensor_parallel=3))


def test_vllms_arguments(tiny_folder: Path) -> None:
    config = ModelConfig.from_folder(find_checkpoint(tiny_folder))
    options = VllmOptions(
        max_batch=8, max_model_len=9999, cache_tokens=65, tensor_parallel=2, extra={"enforce_eager": True}
    )
    made = arguments.engine_arguments(tiny_folder, config, options)
    assert (made["model"], made["dtype"]) == (str(tiny_folder), config.dtype)
    assert made["attention_backend"] == "CUSTOM"
    assert made["block_size"] == 64
    assert made["max_model_len"] == 65
    assert made["kv_cache_memory_bytes"] == 3 * 64 * 576 * 2 * config.num_hidden_layers
    assert made["tensor_parallel_size"] == 2
    assert made["enforce_eager"] is True


def test_vllms_processes_get_the_kernel_and_no_sampler_that_needs_a_compiler() -> None:
    given = {"MLA_KERNEL_BACKEND": "auto", "VLLM_WORKER_MULTIPROC_METHOD": "forkserver"}
    made = arguments.process_environment("hopper", Path("/kernel"), given)
    assert made == {
        "MLA_KERNEL_BACKEND": "hopper",
        "MLA_KERNEL_DIR": "/kernel",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    assert "MLA_KERNEL_DIR" not in arguments.process_environment("triton", None, {})


def test_the_environment_chooses_the_engine(tmp_path: Path) -> None:
    assert ServerSettings.from_environment({}).engine == "native"
    chosen = ServerSettings.from_environment({"MLA_ENGINE": "vllm", "MLA_TENSOR_PARALLEL": "2"})
    assert (chosen.engine, chosen.tensor_parallel, chosen.pipeline_parallel) == ("vllm", 2, 1)
    with pytest.raises(SettingsError, match="native or vllm"):
        ServerSettings.from_environment({"MLA_ENGINE": "sglang"})
    with pytest.raises(SettingsError, match="MLA_ENGINE=vllm"):
        ServerSettings.from_environment({"MLA_PIPELINE_PARALLEL": "2"})


def test_without_vllm_the_server_says_what_to_install(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "version", lambda _: (_ for _ in ()).throw(arguments.PackageNotFoundError))
    with pytest.raises(RuntimeError, match="ENGINE=vllm"):
        load(ServerSettings(tiny_folder, None, engine="vllm"))


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "version", lambda _: "0.24.1")
    with pytest.raises(RuntimeError, match=r"0\.24\.1 is installed, .* written for 0\.23\.0"):
        arguments.check_version()
