"""The engine's own interface: threads, early ends, prefixes, limits, measurement."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from container.serving.engine import Engine, Options
from container.serving.pyfunc import EngineGenerator
from container.serving.sequence import BadRequest, Sampling, State, Step
from kernels import BackendError


def test_threads_share_the_engine(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    prompts = [f"prompt number {i}" for i in range(8)]
    expected = [engine.generate([p], 20)[0].text for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda p: engine.generate([p], 20)[0].text, prompts))
    assert got == expected


def test_a_stream_closed_early_frees_its_pages(tiny_folder: Path) -> None:
    generator = EngineGenerator(str(tiny_folder), backend="reference")
    pieces = generator.stream("hello", max_new_tokens=100)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert generator._engine.allocator.used == 0
    assert not generator._engine.busy


def test_a_refused_prompt_leaves_nothing_of_its_batch_behind(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    with pytest.raises(BadRequest, match="empty"):
        engine.generate([[1, 2], []], 5)
    assert not engine.busy


def test_an_interrupted_batch_leaves_nothing_behind(
    tiny_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    step, calls = engine.step, iter(range(3))

    def interrupted() -> list[Step]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], 50, ignore_eos=True)
    assert not engine.busy
    assert engine.allocator.used == 0


def test_a_batch_job_hears_of_a_failed_generation(tiny_folder: Path) -> None:
    generator = EngineGenerator(str(tiny_folder), backend="reference")
    generator._engine.model = None  # type: ignore[assignment]  # every step fails
    with pytest.raises(RuntimeError, match="prompt 0 could not be completed: AttributeError"):
        generator.generate(["a", "b"])
    with pytest.raises(RuntimeError, match="could not be completed: AttributeError"):
        list(generator.stream("a"))
    assert not generator._engine.busy


def test_abort_in_every_state(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine(max_batch=1)
    sampling = Sampling(max_tokens=50, ignore_eos=True)
    running, waiting = (engine.add("hello", sampling) for _ in range(2))
    engine.step()
    assert (running.state, waiting.state) == (State.RUNNING, State.WAITING)
    for sequence in (waiting, running, running):
        engine.abort(sequence)
        assert sequence.finish_reason == "abort"
    assert not engine.busy
    assert engine.allocator.used == 0


def test_a_known_prefix_is_not_computed_again(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    prompt = list(range(200))
    first = engine.generate([prompt], 10)[0]
    sequence = engine.add(prompt, Sampling(max_tokens=10))
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert sequence.reused == 192
    assert sequence.output == first.token_ids
    other = engine.add([7, *prompt[1:]], Sampling(max_tokens=1))
    engine.step()
    assert other.reused == 0


def test_prefill_and_decode_share_a_step(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine(step_tokens=32)
    decoding = engine.add([1], Sampling(max_tokens=20, ignore_eos=True))
    engine.step()
    long = engine.add([2] * 100, Sampling(max_tokens=1))
    made = len(decoding.output)
    while long.finish_reason is None:
        engine.step()
    assert len(decoding.output) - made == 4  # a chunk of 31 and a token in each of four steps


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([-1], "token id -1"),
        ([258], "token id 258"),
        ([1] * 512, "limit of 512"),
        ("a" * 40_000, "512 tokens"),
    ],
)
def test_refuses_prompts(tiny_engine: Callable[..., Engine], prompt: str | list[int], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        tiny_engine().add(prompt, Sampling(max_tokens=1))


def test_refuses_a_backend_or_cache_that_does_not_exist(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'fastest'"):
        Engine.load(tiny_folder, backend="fastest")
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int4'"):
        Engine.load(tiny_folder, kv_cache_dtype="int4")


def test_a_cache_beyond_memory_names_its_size(tiny_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a cache of 640000000000000 tokens takes .* GB, more than cpu gives"
    ):
        Engine.load(tiny_folder, backend="reference", options=Options(cache_tokens=64 * 10**13))


def test_token_ids_work_without_a_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    engine = Engine.load(tmp_path, backend="reference")
    assert len(engine.generate([[5, 6]], 3)[0].token_ids) == 3
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        engine.generate(["text"], 3)


def test_step_times(tiny_engine: Callable[..., Engine]) -> None:
    engine = tiny_engine()
    assert len(engine.decode_step_times(context=70, batch=2, steps=5)) == 5
    assert len(engine.decode_step_times(context=70, batch=2, steps=5, prefill=False)) == 5
    assert engine.allocator.used == 0


def test_weights_may_be_run_in_another_dtype(tiny_folder: Path) -> None:
    tokens = list(range(100))
    exact = Engine.load(tiny_folder, backend="reference", kv_cache_dtype="float32").logits(tokens)
    rounded = Engine.load(tiny_folder, backend="reference", dtype="bfloat16")
    assert rounded.model.dtype == torch.bfloat16
    assert (rounded.logits(tokens) - exact).norm() / exact.norm() < 0.1
