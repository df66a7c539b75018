"""On an NVIDIA GPU: graphs, fused kernels and experts give the CPU's tokens."""

from pathlib import Path

import pytest
import torch

from container.serving.engine import Engine, Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tokens_equal_the_cpu(tiny_folder: Path, graphs: bool, backend: str) -> None:
    if backend == "reference" and graphs:
        pytest.skip("the reference backend reads lengths on the host, which a graph cannot")
    prompts = [[5] * n for n in (1, 9, 64, 130)]
    expected = Engine.load(tiny_folder, device="cpu", backend="reference", kv_cache_dtype="float32")
    options = Options(max_batch=6, cuda_graphs=graphs)
    engine = Engine.load(
        tiny_folder, device="cuda", backend=backend, kv_cache_dtype="float32", options=options
    )
    got = [c.token_ids for c in engine.generate(prompts, 48, ignore_eos=True)]
    assert got == [c.token_ids for c in expected.generate(prompts, 48, ignore_eos=True)]
    tokens = list(range(200))
    error = (engine.logits(tokens) - expected.logits(tokens)).norm() / expected.logits(tokens).norm()
    assert error < 1e-4
