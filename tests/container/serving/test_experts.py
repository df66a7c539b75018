"""The Triton kernels of the routed experts, in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
import torch.nn.functional as F
from container.serving.experts import routed_experts

torch.manual_seed(0)
for tokens, choices, experts, hidden, width in ((1, 2, 4, 64, 40), (3, 3, 5, 520, 24), (2, 1, 1, 8, 516)):
    x = torch.randn(tokens, hidden)
    w_in = torch.randn(experts, 2 * width, hidden) / hidden**0.5
    w_out = torch.randn(experts, hidden, width) / width**0.5
    chosen = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
    shares = torch.rand(tokens, choices)
    expected = torch.zeros(tokens, hidden)
    for t in range(tokens):
        for e, share in zip(chosen[t], shares[t]):
            gate, up = (w_in[e] @ x[t]).chunk(2)
            expected[t] += share * (w_out[e] @ (F.silu(gate) * up))
    error = (routed_experts(x, w_in, w_out, chosen, shares) - expected).norm() / expected.norm()
    assert error < 1e-5, (tokens, choices, float(error))
"""


def test_routed_experts_against_a_loop() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
