"""A small DeepSeek-V3-form language model in plain torch, and how to train it on bytes in half a minute.

Parameter names and shapes are those of Hugging Face's deepseek_v3 checkpoints (routed experts are stacked
while training and split on saving), so that `save_checkpoint` writes a folder which transformers and the
engine load.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

BEGIN, END = 256, 257  # special tokens after the 256 bytes


@dataclass(frozen=True)
class TinyConfig:
    """Sizes as in config.json. The latent and the rope part have DeepSeek's own sizes, 512 and 64."""

    vocab_size: int = 258
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 1.0
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096

    def to_hugging_face(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "dtype": "float32",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_interleave": True,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "num_nextn_predict_layers": 0,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": END,
        }


class RmsNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """Multi-head latent attention, expanded form (training keeps no cache)."""

    def __init__(self, c: TinyConfig):
        super().__init__()
        self.c = c
        heads, head = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RmsNorm(c.q_lora_rank)
        self.q_b_proj = nn.Linear(c.q_lora_rank, heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RmsNorm(c.kv_lora_rank)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [batch, time, hidden], rotation complex [time, rope / 2] -> [batch, time, hidden]"""
        c, (batch, time_, _) = self.c, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, time_, c.num_attention_heads, -1)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, time_, c.num_attention_heads, -1)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope = rotate(k_rope[:, :, None], rotation).expand(-1, -1, c.num_attention_heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, rotation)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        v = F.pad(v, (0, q.shape[-1] - c.v_head_dim))  # equal widths take the fused kernel
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2)[..., : c.v_head_dim].flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of x [batch, time, heads, rope]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Sigmoid routing with a balancing bias instead of an auxiliary loss (arXiv 2408.15664)."""

    BIAS_RATE = 0.005

    def __init__(self, c: TinyConfig):
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.gate.e_score_correction_bias = nn.Buffer(torch.zeros(c.n_routed_experts))
        self.experts = nn.ModuleList(
            Mlp(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts)
        )
        self.shared_experts = Mlp(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        c, rows = self.c, x.flatten(0, -2)
        scores = self.gate(rows).sigmoid()
        bias: Tensor = self.gate.e_score_correction_bias  # type: ignore[assignment]
        chosen = (scores.detach() + bias).topk(c.num_experts_per_tok, dim=-1).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        weights = scores * mask
        weights = weights / weights.sum(dim=-1, keepdim=True) * c.routed_scaling_factor
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row = mask[:, index].nonzero().flatten()
            part = expert(rows.index_select(0, row)) * weights[:, index].index_select(0, row)[:, None]
            out = out.index_add(0, row, part)
        if self.training:
            load = mask.sum(dim=0)
            bias += self.BIAS_RATE * torch.sign(load.float().mean() - load)
        return out.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c: TinyConfig, index: int):
        super().__init__()
        self.input_layernorm = RmsNorm(c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RmsNorm(c.hidden_size)
        dense = index < c.first_k_dense_replace
        self.mlp = Mlp(c.hidden_size, c.intermediate_size) if dense else MixtureOfExperts(c)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyMla(nn.Module):
    """Token ids [batch, time] -> logits [batch, time, vocabulary]. Input and output embeddings are tied."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        c = self.config
        half = torch.arange(0, c.qk_rope_head_dim, 2, dtype=torch.float32) / c.qk_rope_head_dim
        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float32), c.rope_theta**-half)
        rotation = torch.polar(torch.ones_like(angles), angles)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def train(
    model: TinyMla,
    data: Tensor,
    *,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float, float], None],
) -> None:
    """Trains on random windows of `data` (int64 token ids) with AdamW and one cosine cycle.

    What each layer adds begins at zero: in so few steps, untrained layers' noise costs a tenth of the loss.
    Calls on_step(step, loss in nats a token, tokens a second) after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    warmup = max(1, steps // 20)
    model.train()
    for step in range(steps):
        started = time.perf_counter()
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = learning_rate * min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        start = torch.randint(len(data) - length, (batch, 1), generator=generator)
        window = data[start + torch.arange(length + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item(), batch * length / (time.perf_counter() - started))
    model.eval()


@torch.inference_mode()
def evaluate(model: TinyMla, data: Tensor, length: int) -> float:
    """Mean loss in nats a token over at most 32 consecutive windows of `data`."""
    count = min(32, (len(data) - 1) // length)
    inputs = data[: count * length].view(count, length)
    targets = data[1 : count * length + 1]
    return F.cross_entropy(model(inputs).flatten(0, 1), targets).item()


def save_checkpoint(model: TinyMla, folder: Path) -> None:
    """Writes config.json, generation_config.json, the weights and tokenizer.json in Hugging Face form."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_hugging_face()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(pretty=True) + "\n")
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    kind = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
    }
    template = {"chat_template": "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **names, **template}, indent=2) + "\n")


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of the 256 bytes, token id = byte value, and the two special tokens."""
    # ByteLevel writes bytes as printable characters: the printable ones themselves, the rest from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    return tokenizer
