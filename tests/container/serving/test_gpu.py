"""On an NVIDIA GPU: graphs, fused kernels and experts give the CPU's tokens."""

from pathlib import Path

import pytest
import torch

from container.serving.engine import Engine, Options
from kernels import BackendError, get_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = [[5] * n for n in (1, 9, 64, 130)]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tokens_equal_the_cpu(tiny_folder: Path, graphs: bool, backend: str) -> None:
    if backend == "reference" and graphs:
        pytest.skip("the reference backend reads lengths on the host, which a graph cannot")
    expected = Engine.load(tiny_folder, device="cpu", backend="reference", kv_cache_dtype="float32")
    options = Options(max_batch=6, cuda_graphs=graphs)
    engine = Engine.load(
        tiny_folder, device="cuda", backend=backend, kv_cache_dtype="float32", options=options
    )
    got = [c.token_ids for c in engine.generate(PROMPTS, 48, ignore_eos=True)]
    assert got == [c.token_ids for c in expected.generate(PROMPTS, 48, ignore_eos=True)]
    tokens = list(range(200))
    error = (engine.logits(tokens) - expected.logits(tokens)).norm() / expected.logits(tokens).norm()
    assert error < 1e-4


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("cache", ["bfloat16", "fp8_ds_mla"])
@pytest.mark.parametrize("backend", ["hopper", "flash_mla", "triton"])
def test_a_16_bit_cache_gives_near_tokens(tiny_folder: Path, backend: str, cache: str, graphs: bool) -> None:
    """Every token chosen is the CPU's choice, or as good as it to within the cache's rounding."""
    try:
        get_backend(backend)
        engine = Engine.load(
            tiny_folder, device="cuda", backend=backend, kv_cache_dtype=cache,
            options=Options(max_batch=6, cuda_graphs=graphs),
        )  # fmt: skip
    except BackendError as error:
        pytest.skip(str(error))
    expected = Engine.load(tiny_folder, device="cpu", backend="reference", kv_cache_dtype="float32")
    # An expert that the rounding swaps for its equal moves the logits by a few percent.
    allowed = 0.05 if cache == "bfloat16" else 0.1
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, 48, ignore_eos=True), strict=True):
        tokens = [*prompt, *completion.token_ids]
        logits = expected.logits(tokens)
        scored = engine.logits(tokens)
        assert (scored - logits).norm() < allowed * logits.norm()
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert (rows.max(dim=1).values - chosen).max() < 4 * allowed * rows.std()
