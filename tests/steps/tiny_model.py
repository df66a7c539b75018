"""A tiny DeepSeek-V3 checkpoint with random weights, saved by transformers, in an MLflow model folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
    "rope_scaling": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def write_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, heads: int = 4) -> Path:
    """Write the model below `folder`/artifacts/checkpoint and return `folder`."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES | {"num_attention_heads": heads, "num_key_value_heads": heads})
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    checkpoint = folder / "artifacts" / "checkpoint"
    model.to(dtype).save_pretrained(checkpoint)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}\n")
    return folder
