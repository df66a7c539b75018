"""On an H100 with vLLM: the real server process with engine vllm gives the native engine's greedy tokens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from container.serving.engine import Engine, Options

pytest.importorskip("vllm", reason="needs vLLM (the extra vllm)")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

PORT, TOKENS = 18080, 64
PROMPTS = [[3 + (7 * i + j) % 290 for j in range(n)] for i, n in enumerate((1, 5, 63, 64, 65, 130, 200, 300))]


@dataclass
class Server:
    """The server's process and a client of it. `early` is what /ping said while the model was loading."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    early: int


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V2's form, float16: the finer rounding leaves fewer near ties between tokens than bfloat16's."""
    import transformers

    folder = tmp_path_factory.mktemp("ml") / "model"
    torch.manual_seed(3)
    config = transformers.DeepseekV2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        first_k_dense_replace=1,
        max_position_embeddings=1024,
        initializer_range=0.1,
        eos_token_id=1,
    )
    transformers.DeepseekV2ForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native(checkpoint: Path) -> Engine:
    """The native engine with the same kernel."""
    options = Options(max_batch=8, cache_tokens=8 * 512)
    return Engine.load(
        checkpoint, kernel_dir(), backend="hopper", kv_cache_dtype="float16", device="cuda", options=options
    )


def kernel_dir() -> str | None:
    return os.environ.get("MLA_KERNEL_DIR")


@pytest.fixture(scope="module")
def server(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    environment = {
        "MLA_ML_ROOT": str(checkpoint.parent),
        "MLA_ENGINE": "vllm",
        "MLA_KERNEL_BACKEND": "hopper",
        "MLA_KV_CACHE_DTYPE": "float16",
        "MLA_MAX_BATCH": "16",
        "MLA_CACHE_TOKENS": "16384",
        "MLA_HOST": "127.0.0.1",
        "SAGEMAKER_BIND_TO_PORT": str(PORT),
    }
    process = subprocess.Popen([sys.executable, "-m", "container.serving"], env={**os.environ, **environment})
    client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60)
    early, status = 0, 0
    try:
        request.getfixturevalue("native")  # loads while the server does
        while status != 200:
            assert process.poll() is None, "the server ended; its log is above"
            try:
                status = client.get("/ping").status_code
                early = early or status
            except httpx.ConnectError:
                pass
            time.sleep(0.2)
        yield Server(process, client, early)
    finally:
        process.kill()
        process.wait()


def complete(server: Server, **body: Any) -> dict[str, Any]:
    response = server.client.post("/invocations", json={"return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_ping_waits_for_the_first_token(server: Server) -> None:
    assert server.early == 503


def test_greedy_tokens_are_the_native_engines(server: Server, native: Engine) -> None:
    """One by one, and all at once: batches of every size up to eight, padded to CUDA graphs.

    Random weights have near ties, where rounding decides, and a sequence goes its own way after one. So each
    of vLLM's tokens is also held against the native engine's logits after vLLM's tokens before it.
    """

    def tokens(prompt: list[int]) -> list[int]:
        answer = complete(server, prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
        return answer["choices"][0]["token_ids"]

    expected = [c.token_ids for c in native.generate(PROMPTS, TOKENS, ignore_eos=True)]
    alone = [tokens(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(tokens, PROMPTS))
    for name, got in (("alone", alone), ("together", together)):
        same = [first_difference(x, y) for x, y in zip(got, expected, strict=True)]
        behind = torch.cat([lag(native, p, t) for p, t in zip(PROMPTS, got, strict=True)])
        first = (behind == 0).float().mean().item()
        print(
            f"{name}: equal up to token {same} of {TOKENS}; {100 * first:.1f}% are the native engine's first "
            f"choice, the worst is {behind.max().item():.4f} standard deviations of the logits behind it"
        )
        assert first >= 0.97
        assert behind.quantile(0.99) < 0.05


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def lag(native: Engine, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """How far each token's logit is behind the native engine's best, in the logits' standard deviations."""
    logits = native.logits(prompt + tokens)[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.max(dim=-1).values - chosen) / logits.std(dim=-1)


def test_logprobs_streams_and_metrics(server: Server) -> None:
    answer = complete(server, prompt=[5, 6, 7], max_tokens=4, temperature=0, logprobs=2)["choices"][0]
    assert [len(top) for top in answer["logprobs"]["top_logprobs"]] == [2] * len(answer["token_ids"])
    body = {"prompt": [9, 9], "max_tokens": 6, "stream": True, "return_token_ids": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert sum(len(event["choices"][0]["token_ids"]) for event in events) == 6
    metrics = server.client.get("/metrics").text
    assert "mla_generated_tokens_total" in metrics
    assert "mla_requests_running 0" in metrics


def test_sigterm_finishes_what_is_under_way(server: Server) -> None:
    body = {"prompt": [4] * 20, "max_tokens": 400, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client.post, "/invocations", json=body)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert len(answer.result().json()["choices"][0]["token_ids"]) == 400
    assert server.process.wait(25) == 0
