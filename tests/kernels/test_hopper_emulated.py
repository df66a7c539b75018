"""The Hopper kernels' own sources on a CPU (tests/kernels/emulator): results, and broken protocols found."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.checks import CheckCase, compare, run_case
from kernels.targets import SOURCE_ROOT
from tests.kernels.emulator import EmulatedFailure, Emulator, build
from tests.kernels.hopper_cases import BF16, CASES, FP8, FP16, row_tiles

COUNTERS = 3072  # bytes of the workspace, kCounterBytes of mla_decode.cu
SMALL = 60  # row tiles; `python -m tests.kernels.emulator` runs the cases of more, in minutes
DTYPES = ((BF16, BF16), (FP16, FP16), (BF16, FP8))  # of q and the cache
VARIANTS = {
    f"{name} {kv}".replace("torch.", ""): (heads, q, kv)
    for (name, heads), (q, kv) in itertools.product((("few rows", 12), ("many rows", 64)), DTYPES)
}


def case(lengths: tuple[int, ...], s_q: int, h_q: int, q: torch.dtype, kv: torch.dtype) -> CheckCase:
    name = f"{lengths} s_q={s_q} h_q={h_q} {kv}"
    return CheckCase(name, lengths, s_q, h_q, 512, 64, q, kv, causal=s_q > 1)


@pytest.fixture(scope="session")
def emulated() -> Path:
    return build()


class WideTable(Emulator):
    """With a block table for long sequences, so that no short one is taken in tiles of 16 query rows."""

    def __call__(self, q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, *rest: Any) -> Any:
        return super().__call__(q, k_cache, torch.nn.functional.pad(block_table, (0, 1000)), *rest)


def seed_of(case: CheckCase) -> int:
    return zlib.crc32(case.name.encode())


@pytest.mark.parametrize("fp8", [False, True], ids=["16bit", "fp8"])
@pytest.mark.parametrize(
    "case", [one for one in CASES if row_tiles(one) <= SMALL], ids=lambda case: case.name
)
def test_matches_the_definition(emulated: Path, case: CheckCase, fp8: bool) -> None:
    """Within the bounds of kernels.checks, as on a GPU."""
    if fp8:
        case = dataclasses.replace(case, q_dtype=BF16, kv_dtype=FP8)
    result = run_case(Emulator(emulated, 8, seed_of(case)), case, seed=1)
    assert result.passed, result


@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
@pytest.mark.parametrize("h_q", [1, 3, 16, 17, 64, 128])
def test_heads_and_queries(emulated: Path, h_q: int, s_q: int) -> None:
    q, kv = DTYPES[(h_q + s_q) % 3]
    one = case((70, 0, 3, 64), s_q, h_q, q, kv)
    for causal in (False, True) if s_q > 1 else (False,):
        for multiprocessors in (8, 36):  # with 36, up to 128 rows are taken in tiles of 16
            emulator = Emulator(emulated, multiprocessors, seed_of(one))
            result = run_case(emulator, dataclasses.replace(one, causal=causal), seed=2)
            assert result.passed, result


@pytest.mark.parametrize(("length", "parts"), [(1030, 17), (3930, 31)])
def test_merges_many_parts(emulated: Path, length: int, parts: int) -> None:
    """Shares so small that several warps add up one unit."""
    emulator = WideTable(emulated, parts, seed=8)
    result = run_case(emulator, case((length,), 1, 64, BF16, BF16), seed=8)
    assert result.passed, result


@pytest.mark.parametrize(("heads", "q", "kv"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_softmax_scale(emulated: Path, heads: int, q: torch.dtype, kv: torch.dtype, scale: float) -> None:
    one = dataclasses.replace(case((65, 100), 1, heads, q, kv), softmax_scale=scale)
    result = run_case(Emulator(emulated, 3, seed=3), one, seed=3)
    assert result.passed, result


@pytest.mark.parametrize(("heads", "q", "kv"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [1e30, 300.0, 1e-3, 1e-30])
@pytest.mark.parametrize("multiprocessors", [4, 34, 16])
def test_parts_with_values_of_any_size(
    emulated: Path, heads: int, q: torch.dtype, kv: torch.dtype, size: float, multiprocessors: int
) -> None:
    """Also where a row's values are `size` times another's; scores are the rope's alone. With 16 few rows
    have clusters."""
    one = case((1030,) if multiprocessors == 34 else (400, 70, 0), 2, heads // 2, q, kv)
    inputs = one.inputs(seed=10)
    inputs.q[..., :512] = 0
    inputs.q[:, 0, :, 512:] *= 100  # a query that sees one token, as a rule
    values = inputs.k_cache[..., 512:528].view(torch.float32) if kv == FP8 else inputs.k_cache[..., :512]
    values[:, ::3] *= size if kv == BF16 else min(max(size, 1e-3), 1e3)
    kind = Emulator if multiprocessors == 16 else WideTable
    outputs = kind(emulated, multiprocessors)(*inputs.arguments())
    result = compare(one.name, inputs, *outputs, *one.bounds())
    assert result.passed, result


@pytest.mark.parametrize(("heads", "q", "kv"), VARIANTS.values(), ids=VARIANTS)
def test_any_order_of_events_gives_the_same_bits(
    emulated: Path, heads: int, q: torch.dtype, kv: torch.dtype
) -> None:
    """And leaves the workspace as the next launch needs it: all runs have the same one."""
    inputs = case((200, 30, 64, 0, 300, 1), 1, heads, q, kv).inputs(seed=4)
    emulator = Emulator(emulated, 5)
    first = None
    for emulator.seed in range(5):
        result = emulator(*inputs.arguments())
        assert not emulator.workspace[:COUNTERS].any()
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize(("heads", "q", "kv"), VARIANTS.values(), ids=VARIANTS)
def test_strides(emulated: Path, heads: int, q: torch.dtype, kv: torch.dtype) -> None:
    """Every other page of a pool, and queries with something between the heads."""
    inputs = case((100, 64), 1, heads, q, kv).inputs(seed=9)
    emulator = Emulator(emulated, 3)
    expected = emulator(*inputs.arguments())
    wide = torch.full((*inputs.q.shape[:3], 640), float("nan"), dtype=q)
    wide[..., :576] = inputs.q
    pool = inputs.k_cache.new_full((inputs.k_cache.shape[0], 2, *inputs.k_cache.shape[1:]), 0xFF)
    pool[:, 0] = inputs.k_cache
    got = emulator(wide[..., :576], pool[:, 0], *inputs.arguments()[2:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6).map(tuple),
    s_q=st.integers(1, 4),
    h_q=st.integers(1, 40),
    dtypes=st.sampled_from(DTYPES),
    multiprocessors=st.integers(3, 7),
    seed=st.integers(0, 2**32),
)
def test_random_shapes(
    emulated: Path,
    lengths: tuple[int, ...],
    s_q: int,
    h_q: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    multiprocessors: int,
    seed: int,
) -> None:
    result = run_case(Emulator(emulated, multiprocessors, seed), case(lengths, s_q, h_q, *dtypes), seed=seed)
    assert result.passed, result


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (BF16, "lies outside of the tensor"),
        (FP8, r"reads (\d+ bytes at |.*which nobody has written)"),
    ],
)
@pytest.mark.parametrize("heads", [16, 64])
def test_an_index_out_of_range_is_found(emulated: Path, heads: int, kv: torch.dtype, words: str) -> None:
    inputs = case((130,), 1, heads, BF16, kv).inputs(seed=5)
    inputs.block_table[0, 2] = inputs.k_cache.shape[0]
    with pytest.raises(EmulatedFailure, match=rf"kernel.*CTA \d.*warp \d.*\.cuh:\d+: .*{words}"):
        Emulator(emulated, 3)(*inputs.arguments())


def test_debug_build_names_the_index_out_of_range() -> None:
    """As test_hopper.py says it for a GPU."""
    emulator = Emulator(build("-DMLA_DEBUG", "-O0"), 3)
    inputs = case((70, 130), 1, 4, BF16, BF16).inputs(seed=8)
    for index in (-1, inputs.k_cache.shape[0]):
        table = inputs.block_table.clone()
        table[1, 2] = index
        with pytest.raises(EmulatedFailure, match=rf"^block_table\[1, 2\] is {index}, expected 0 to "):
            emulator(inputs.q, inputs.k_cache, table, *inputs.arguments()[3:])
    lengths = torch.tensor([70, 1000], dtype=torch.int32)
    with pytest.raises(EmulatedFailure, match=r"^cache_seqlens\[1\] is 1000, expected 0 to "):
        emulator(inputs.q, inputs.k_cache, inputs.block_table, lengths, *inputs.arguments()[4:])


def place_of(file: str, text: str) -> str:
    """The "file:line" where `text`, which is there once, begins in the kernels' sources."""
    before, _ = (SOURCE_ROOT / "hopper" / file).read_text().split(text)
    return f"{file}:{before.count(chr(10)) + 1}"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("ring_feed.cuh", "position.parity ^ 1);\n  if", "copy at .*race"),
        ("ring_scores.cuh", "mbarrier_wait(barriers_.rope_full()", "a race: reads"),
        ("ring_scores.cuh", "wgmma_wait<0>();", "an accumulator was written|a race"),
        ("ring_values.cuh", "fence_async_proxy();", "without fence.proxy.async since"),
        ("ring_values.cuh", "wgmma_fence();", "since the last wgmma.fence"),
        ("ring_values.cuh", "mbarrier_arrive(barriers.empty(second", "(?s)deadlock.*wait at ring_feed"),
        ("ring_feed.cuh", "mbarrier_expect(full", "bytes are 8192 more than phase 0"),
        ("merge.cuh", "named_sync(kStoredBarrier", "a race: reads workspace"),
    ],
)  # fmt: skip
def test_what_a_missing_synchronisation_is_called(emulated: Path, file: str, text: str, words: str) -> None:
    inputs = case((900, 100), 1, 64, BF16, BF16).inputs(seed=6)
    with pytest.raises(EmulatedFailure, match=words):
        Emulator(emulated, 3, fault=place_of(file, text))(*inputs.arguments())


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("ring_merge.cuh", "fence_async_proxy_global();", "without a proxy fence for global memory since"),
        ("narrow_merge.cuh", "fence_async_proxy_global();", "without a proxy fence for global memory since"),
        ("narrow_merge.cuh", "named_sync(kMergeBarrier, kMergeThreads);  // all", "a race: "),
        ("narrow_merge.cuh", "named_sync(kMergeBarrier, kMergeThreads);  // before", "more than phase 0"),
        ("narrow_merge.cuh", "mbarrier_wait(barrier_", "a race: (reads|writes) shared address"),
        ("narrow_merge.cuh", "named_sync(kAddBarrier", "a race: (reads|writes) shared address"),
    ],
)  # fmt: skip
def test_what_a_missing_synchronisation_of_a_merge_is_called(
    emulated: Path, file: str, text: str, words: str
) -> None:
    """Of many parts, whose sums several warps share."""
    heads, multiprocessors = (12, 12) if file == "narrow_merge.cuh" else (64, 34)
    emulator = WideTable(emulated, multiprocessors, fault=place_of(file, text))
    with pytest.raises(EmulatedFailure, match=words):
        run_case(emulator, case((1030,), 1, heads, BF16, BF16), seed=6)


# Synchronisations that may be left out, by file and the line before: why nothing goes wrong.
NOT_NEEDED = {
    ("narrow_layout.cuh", "Operands::load(params, map, ring"): "the next shuffle gathers the warp too",
    ("ring_scores.cuh", "add_pair<3>();"): "a group of its own, so that scored() can be said early",
    ("ring_scores.cuh", "wgmma_commit();"): "the same",
    ("ring_scores.cuh", "mbarrier_wait(barriers_.rope_full()"): "its registers are in flight already",
    ("ring_scores.cuh", "if (thread == 0) tasks"): "thread 0 itself arrives for its warp",
    ("ring_values.cuh", "const RingPosition<L> second"): "the weights were made from the same pieces",
    ("ring_values.cuh", "mbarrier_wait(barriers.full(position.slot)"): "the same",
    ("ring_unpack.cuh", "fill_raw_slot(params, barriers, base, walk, (w"): "its last piece found room",
    ("ring_values.cuh", "if (in_turns &&"): "who goes first is a matter of speed",
}  # fmt: skip
BROKEN_CASES = [
    (case(lengths, s_q, heads, BF16, kv), max(multiprocessors, 3 if s_q > 1 else 0))
    for heads, s_q, kv in ((12, 1, BF16), (12, 1, FP8), (64, 1, FP8), (64, 1, BF16), (48, 4, BF16))
    for lengths, multiprocessors in (((130, 50, 64, 10, 70, 1), 2), ((200, 30, 30, 20, 300, 1), 3))
] + [(case((1030,), 1, 64, BF16, BF16), 34), (case((1030,), 1, 12, BF16, FP8), 12)]
# Clusters of 4, several of 8 for an item, and of 16.
CLUSTER_CASES = [
    (case(lengths, 1, 12, BF16, kv), multiprocessors)
    for kv in (BF16, FP8)
    for lengths, multiprocessors in (((700,), 5), ((1800, 64), 32), ((1000,), 16))
]


def test_every_missing_synchronisation_is_found(emulated: Path) -> None:
    """Leave out each one of the kernels' sources, and invert each parity: no such kernel passes."""
    missed: dict[str, str] = {}
    found: set[str] = set()
    wide = [(one, WideTable(emulated, multiprocessors, seed=1)) for one, multiprocessors in BROKEN_CASES]
    narrow = [(one, Emulator(emulated, multiprocessors, seed=1)) for one, multiprocessors in CLUSTER_CASES]
    for one, emulator in wide + narrow:
        emulator.synchronisations()
        assert run_case(emulator, one, seed=7).passed
        places = emulator.synchronisations()
        places |= {f"!{place}": name for place, name in places.items() if name == "mbarrier_wait"}
        for place in sorted(places.keys() - found):
            emulator.fault = place
            try:
                passed = run_case(emulator, one, seed=7).passed
            except EmulatedFailure:
                passed = False
            if passed:
                missed[place] = places[place]
            else:
                found.add(place)
    assert len(found) > 100
    for place, name in missed.items():
        file, line = place.removeprefix("!").split(":")
        before = (SOURCE_ROOT / "hopper" / file).read_text().splitlines()[int(line) - 2].strip()
        known = place in found or any(file == at and before.startswith(text) for at, text in NOT_NEEDED)
        assert known, f"nothing finds {name} at {place} missing, after {before!r}"
