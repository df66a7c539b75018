"""The Triton kernel: under Triton's interpreter here, compiled where there is a GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernels.arguments import Problem
from kernels.checks import CheckCase, run_case
from kernels.triton_mla import TritonBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    CheckCase("ragged with empty rows", (3, 0, 130, 64), 1, 5, 512, 64, torch.bfloat16, torch.bfloat16),
    CheckCase("float32, small sizes", (65, 200), 1, 3, 96, 32, torch.float32, torch.float32),
    CheckCase("causal", (300, 2, 67, 3, 0), 4, 6, 128, 64, torch.float16, torch.float16, True),
    CheckCase("not causal, two row tiles", (90,), 2, 17, 64, 16, torch.float32, torch.float32),
    CheckCase("split over the length", (700,), 1, 16, 512, 64, torch.float16, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_definition(case: CheckCase) -> None:
    result = run_case(TritonBackend(), case, seed=1, device=DEVICE)
    # The interpreter cuts float32 to bfloat16 where hardware rounds: twice the error.
    slack = 2 if DEVICE == "cpu" and case.q_dtype == torch.bfloat16 else 1
    assert result.relative_error <= slack * result.bound
    assert result.lse_error <= result.lse_bound


def test_equal_inputs_give_equal_bits() -> None:
    inputs = CASES[-1].inputs(seed=2, device=DEVICE)
    first, second = (TritonBackend()(*inputs.arguments()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_dtype": torch.uint8}, "one dtype"),
        ({"page_size": 16}, "pages of 64 tokens, got 16"),
        ({"kv_lora_rank": 40}, "multiples of 16, got 40 and 64"),
    ],
)
def test_says_why_a_problem_cannot_run(change: dict[str, object], words: str) -> None:
    problem = Problem(DEVICE, torch.bfloat16, torch.bfloat16, 1, 1, 16, 512, 64, 64)
    assert TritonBackend().unsupported(problem) is None
    reason = TritonBackend().unsupported(replace(problem, **change))
    assert reason is not None
    assert words in reason
