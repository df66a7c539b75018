# ruff: noqa: E402, vLLM's platform must be set before its modules are imported
"""The MLA backend inside vLLM's own classes. Needs vLLM's package, no GPU: the operator runs on the CPU."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM (the extra vllm)")
pytest.importorskip("vllm._C", reason="needs vLLM's compiled parts and a CUDA driver", exc_type=ImportError)

import vllm.platforms as platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class Hopper(NonNvmlCudaPlatform):
    """An H100 as far as vLLM's configuration asks."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132


if not torch.cuda.is_available():
    platforms._current_platform = Hopper()  # before any module of vLLM takes a reference to it

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from container.serving.bench_gpu import RandomLoader
from container.serving.checkpoint import ModelConfig
from container.serving.vllm_engine import attention, plugin, random_weights
from container.serving.vllm_engine.arguments import VllmOptions, engine_arguments
from kernels import Problem, get_backend
from kernels.reference import mla_decode_reference

RANK, ROPE, PAGE, HEADS, LAYER = 512, 64, 64, 4, "model.layers.0.self_attn.attn"
MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": None,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
}


class OnCpu:
    """The cpu target that answers for a GPU: it takes the problem that vLLM's process has."""

    name = "cpu"

    def __init__(self) -> None:
        self._kernel = get_backend("cpu")

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.kv_lora_rank == RANK else f"rank {problem.kv_lora_rank} is not {RANK}"

    def __call__(self, *arguments: Any) -> Any:
        return self._kernel(*arguments)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """vLLM's configuration of a small model, made from our arguments, with the backend registered."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    plugin.register()
    given = engine_arguments(folder, ModelConfig.from_folder(folder), VllmOptions(max_batch=16))
    made = EngineArgs(**given, load_format="dummy").create_engine_config()
    with set_current_vllm_config(made):
        yield made


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = OnCpu()
    monkeypatch.setattr(attention, "process_backend", lambda: kernel)


def reasons(**changes: Any) -> list[str]:
    given = {
        "head_size": RANK + ROPE,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": PAGE,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }
    return attention.MlaKernelBackend.validate_configuration(**{**given, **changes})


def test_custom_is_our_backend(config: VllmConfig) -> None:
    assert AttentionBackendEnum.CUSTOM.get_class() is attention.MlaKernelBackend
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert config.cache_config.block_size == PAGE


def test_vllm_selects_it_and_says_why_not(config: VllmConfig) -> None:
    assert reasons() == []
    assert reasons(block_size=16) == ["block_size not supported"]
    assert reasons(kv_cache_dtype="fp8") == ["kv_cache_dtype not supported"]
    assert reasons(dtype=torch.float32) == ["dtype not supported"]
    assert reasons(head_size=320) == ["rank 256 is not 512"]
    assert reasons(use_sparse=True) == ["sparse not supported"]


def impl(heads: int, rank: int = RANK) -> attention.MlaKernelImpl:
    return attention.MlaKernelImpl(
        num_heads=heads,
        head_size=rank + ROPE,
        scale=0.1,
        num_kv_heads=1,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=32,
        qk_rope_head_dim=ROPE,
        qk_head_dim=32 + ROPE,
        v_head_dim=32,
        kv_b_proj=None,
    )


def test_sizes_that_the_kernel_lacks_are_refused_at_start(config: VllmConfig) -> None:
    with pytest.raises(NotImplementedError, match="rank 256 is not 512; use engine: native"):
        impl(HEADS, 256)


def test_a_padded_decode_batch(config: VllmConfig) -> None:
    """What vLLM's runner gives for a graph of 4 with 3 requests; outputs against the reference."""
    config.compilation_config.static_forward_context[LAYER] = SimpleNamespace(prefill_backend=None)
    spec = MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=RANK + ROPE, dtype=torch.bfloat16)
    builder = attention.MlaKernelMetadataBuilder(spec, [LAYER], config, torch.device("cpu"))
    lengths = torch.tensor([130, 1, 64, 0], dtype=torch.int32)
    starts = torch.arange(5, dtype=torch.int32)
    table = torch.tensor([[3, 1, 5, 0], [2, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=4,
        num_actual_tokens=4,
        max_query_len=1,
        max_seq_len=130,
        block_table_tensor=table,
        slot_mapping=torch.zeros(4, dtype=torch.int64),
    )
    torch.manual_seed(2)
    cache = torch.randn(6, PAGE, RANK + ROPE, dtype=torch.bfloat16)
    q = torch.randn(4, HEADS, RANK, dtype=torch.bfloat16), torch.randn(4, HEADS, ROPE, dtype=torch.bfloat16)
    for metadata in (builder.build(0, common), builder.build_for_cudagraph_capture(common)):
        assert (metadata.num_decodes, metadata.num_prefills) == (4, 0)
        # the very buffers that a captured graph will find again
        assert metadata.decode.block_table.data_ptr() == table.data_ptr()
        assert metadata.decode.seq_lens.data_ptr() == lengths.data_ptr()
        out, lse = impl(HEADS).forward_mqa(q, cache, metadata, None)
        whole = torch.cat(q, dim=-1)[:, None]
        expected, expected_lse = mla_decode_reference(whole, cache[:, :, None], table, lengths, RANK, 0.1)
        torch.testing.assert_close(out.double(), expected[:, 0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), expected_lse[..., 0], rtol=1e-3, atol=1e-3)
        assert (out[3] == 0).all()


def test_the_benchmarks_weights_have_the_native_ones_distribution(config: VllmConfig) -> None:
    loader = get_model_loader(LoadConfig(load_format=random_weights.LOAD_FORMAT))
    model = torch.nn.Sequential(torch.nn.Linear(400, 300, bias=False), torch.nn.LayerNorm(300, bias=False))
    loader.load_weights(model, config.model_config)
    matrix, norm = (weight.detach() for weight in model.parameters())
    native = RandomLoader(torch.device("cpu"), torch.float32)
    assert matrix.std().item() == pytest.approx(native.one("w", 300, 400).std().item(), rel=0.02)
    torch.testing.assert_close(norm, native.one("norm", 300))
