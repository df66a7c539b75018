"""The engine against transformers: same logits, same greedy tokens, whatever the batch and the chunks."""

from pathlib import Path

import pytest
import torch

from container.serving.engine import Engine, Options
from kernels import BuildError, get_backend
from tests.container.serving.conftest import FORMS, VOCABULARY

# float32 against float32 in another order of operations: 3e-6 measured, so 1e-4 leaves room for other
# machines and stays ten times below what is promised (1e-3)
LOGITS_BOUND = 1e-4
NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 7, 64, 131)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def expected_tokens(model, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def cpu_backend() -> str:
    try:
        get_backend("cpu")
    except BuildError as error:
        pytest.skip(f"the cpu kernel cannot be built here: {error}")
    return "cpu"


@pytest.mark.parametrize("form", FORMS)
def test_teacher_forced_logits(reference, form: str) -> None:
    ref = reference(form)
    tokens = torch.randint(2, VOCABULARY, (1, 330), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = ref.model(tokens).logits[0]
    got = Engine.load(ref.folder, backend="reference", kv_cache_dtype="float32").logits(tokens[0].tolist())
    assert got.dtype == torch.float32
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < LOGITS_BOUND


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_of_a_ragged_batch(reference, form: str) -> None:
    ref = reference(form)
    engine = Engine.load(ref.folder, backend=cpu_backend(), kv_cache_dtype="float32")
    completions = engine.generate(prompts(), max_tokens=NEW_TOKENS, ignore_eos=True)
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert completion.token_ids == expected_tokens(ref.model, prompt)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("chunk", [17, 48])
def test_chunked_prefill_does_not_change_tokens(reference, chunk: int) -> None:
    ref = reference("v3-yarn")
    expected = alone(ref.folder, prompts(), NEW_TOKENS)
    options = Options(step_tokens=chunk, max_batch=2)  # some requests wait for a place, too
    engine = Engine.load(ref.folder, backend="reference", kv_cache_dtype="float32", options=options)
    got = engine.generate(prompts(), NEW_TOKENS, ignore_eos=True)
    assert [c.token_ids for c in got] == expected
    assert engine.allocator.used == 0


def test_preemption_does_not_change_tokens(reference) -> None:
    ref = reference("v3-yarn")
    wanted = [prompts()[1], prompts()[2]]
    expected = alone(ref.folder, wanted, 140)
    options = Options(cache_tokens=256)  # both start, and both grow to four pages: only one of them can
    engine = Engine.load(ref.folder, backend="reference", kv_cache_dtype="float32", options=options)
    got = engine.generate(wanted, 140, ignore_eos=True)
    assert [c.token_ids for c in got] == expected
    assert engine.scheduler.preemptions > 0
    assert engine.allocator.used == 0


def alone(folder: Path, wanted: list[list[int]], count: int) -> list[list[int]]:
    engine = Engine.load(folder, backend="reference", kv_cache_dtype="float32")
    return [engine.generate([p], count, ignore_eos=True)[0].token_ids for p in wanted]


def test_an_fp8_cache_stays_close(tiny_folder: Path) -> None:
    tokens = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    exact, coarse = (
        Engine.load(tiny_folder, backend="reference", kv_cache_dtype=kind).logits(tokens)
        for kind in ("float32", "fp8_ds_mla")
    )
    # e4m3 rounds a latent by up to 2^-4 = 6%; 7% measured, since a few tokens also choose other experts
    assert (coarse - exact).norm() / exact.norm() < 0.15


def test_an_fp8_cache_needs_its_sizes(reference) -> None:
    with pytest.raises(ValueError, match="512 latents and 64 rope values, this model has 48 and 32"):
        Engine.load(reference("v3-yarn").folder, backend="reference", kv_cache_dtype="fp8_ds_mla")


def test_a_16_bit_cache_stays_close(reference) -> None:
    # a model without routing, which turns rounding into another choice of experts
    ref = reference("v2-plain-query")
    tokens = torch.randint(2, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = ref.model(tokens).logits[0]
    got = Engine.load(ref.folder, backend="reference", kv_cache_dtype="bfloat16").logits(tokens[0].tolist())
    # bfloat16 has 8 bits: latents are rounded by up to 2^-9 = 0.2% once a layer
    assert (got - expected).norm() / expected.norm() < 0.03
