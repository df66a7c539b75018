"""A Hugging Face DeepSeek-V2/V3 checkpoint folder: where it is, and what its config.json says.

Imports no torch, so that a pipeline step which only reads the configuration stays light.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# model_type -> how the router scores experts. Other families keep keys and values apart and have no latent.
SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
DTYPES = ("float32", "bfloat16", "float16")


class NotMlaModel(ValueError):
    """The folder holds no multi-head latent attention model that this engine can run; says why and where."""


def find_checkpoint(model_dir: Path) -> Path:
    """The folder with config.json and *.safetensors at or below `model_dir`.

    `model_dir` is a checkpoint folder itself or an MLflow model folder of flavor pyfunc (artifacts/<name>/)
    or transformers (model/). Raises NotMlaModel when there is none, several, or only pickled weights.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise NotMlaModel(f"{model_dir} is not a folder; give an MLflow model folder or a checkpoint folder")
    if (model_dir / "config.json").is_file() and any(model_dir.glob("*.safetensors")):
        return model_dir
    configs = sorted(p for p in model_dir.rglob("config.json") if len(p.relative_to(model_dir).parts) <= 5)
    found = [p.parent for p in configs if any(p.parent.glob("*.safetensors"))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(p.relative_to(model_dir)) for p in found)
        raise NotMlaModel(f"{model_dir} holds several checkpoints ({names}); log a model with exactly one")
    pickled = next((q for p in configs for q in p.parent.glob("*.bin")), None)
    if pickled is not None:
        raise NotMlaModel(f"{pickled} holds pickled weights; save the model as safetensors")
    raise NotMlaModel(
        f"no folder under {model_dir} has both config.json and *.safetensors; "
        "log the checkpoint folder as an artifact of the MLflow model"
    )


def find_tokenizer(checkpoint: Path, model_dir: Path | None = None) -> Path | None:
    """tokenizer.json beside the weights or where MLflow's transformers flavor keeps it; None if missing."""
    for folder in (checkpoint, *([model_dir / "components" / "tokenizer"] if model_dir else [])):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    return None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the decoupled key. `kind` is "default" or "yarn" (arXiv 2309.00071)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def embedding_scale(self) -> float:
        """Factor on cos and sin: YaRN's attention factor."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale: DeepSeek multiplies it by mscale(factor, mscale_all_dim) squared."""
        if self.kind != "yarn" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 for a factor that does not extend the context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A validated DeepSeek-V2/V3 configuration. Sizes are in values, names as in Hugging Face's file."""

    architecture: str
    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    first_k_dense_replace: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    grouped: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring: str
    rms_norm_eps: float
    rope: Rope
    rope_interleave: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values the cache holds for a token and layer: the latent, then the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_nope + qk_rope) times YaRN's factor. Not 1/sqrt(kv_lora_rank + rope)."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_factor

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads and validates config.json (and the end tokens in generation_config.json) of a checkpoint.

        Raises NotMlaModel naming the file and the key that is missing or that this engine cannot run.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        generation = path.with_name("generation_config.json")
        eos = raw.get("eos_token_id")
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id", eos)
        return cls.from_dict(raw, where=str(path), eos=eos)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config", eos: Any = None) -> "ModelConfig":
        """The configuration of a parsed config.json; `where` names its origin in errors."""
        keys = _Keys(raw, where)
        model_type = raw.get("model_type")
        if model_type not in SCORING:
            raise NotMlaModel(
                f"{where}: model_type is {model_type!r}, and only {', '.join(SCORING)} are multi-head latent "
                "attention models that this engine runs"
            )
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method")
            raise NotMlaModel(
                f"{where}: quantization_config ({method}) is not supported; convert the weights to bfloat16"
            )
        v3 = model_type == "deepseek_v3"
        if raw.get("scoring_func", SCORING[model_type]) != SCORING[model_type]:
            raise NotMlaModel(
                f"{where}: scoring_func is {raw['scoring_func']!r}, {model_type} has {SCORING[model_type]!r}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise NotMlaModel(f"{where}: hidden_act is {raw['hidden_act']!r}, only 'silu' is supported")
        if raw.get("moe_layer_freq", 1) != 1:
            raise NotMlaModel(f"{where}: moe_layer_freq is {raw['moe_layer_freq']}, only 1 is supported")
        method = raw.get("topk_method") or ("noaux_tc" if v3 else "greedy")
        if method not in (("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")):
            raise NotMlaModel(f"{where}: topk_method {method!r} is not one of {model_type}")
        experts = keys.count("n_routed_experts", default=0)
        groups = keys.count("n_group", default=1) or 1
        config = cls(
            architecture=ARCHITECTURES[model_type],
            model_type=model_type,
            dtype=keys.dtype(),
            vocab_size=keys.size("vocab_size"),
            hidden_size=keys.size("hidden_size"),
            num_hidden_layers=keys.size("num_hidden_layers"),
            num_attention_heads=keys.size("num_attention_heads"),
            q_lora_rank=keys.count("q_lora_rank", default=0) or None,
            kv_lora_rank=keys.size("kv_lora_rank", multiple=16),
            qk_nope_head_dim=keys.size("qk_nope_head_dim"),
            qk_rope_head_dim=keys.size("qk_rope_head_dim", multiple=16),
            v_head_dim=keys.size("v_head_dim"),
            intermediate_size=keys.size("intermediate_size"),
            first_k_dense_replace=keys.count("first_k_dense_replace", default=0),
            moe_intermediate_size=keys.size("moe_intermediate_size") if experts else 0,
            n_routed_experts=experts,
            n_shared_experts=keys.count("n_shared_experts", default=0),
            num_experts_per_tok=keys.size("num_experts_per_tok") if experts else 0,
            n_group=groups,
            topk_group=keys.count("topk_group", default=groups) or groups,
            grouped=v3 or method == "group_limited_greedy",
            # transformers' DeepseekV2 ignores norm_topk_prob (every published V2 checkpoint says false)
            norm_topk_prob=v3 and bool(raw.get("norm_topk_prob", True)),
            routed_scaling_factor=float(raw.get("routed_scaling_factor", 1.0)),
            scoring=SCORING[model_type],
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, where),
            rope_interleave=bool(raw.get("rope_interleave", True)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=keys.size("max_position_embeddings"),
            eos_token_ids=_token_ids(raw.get("eos_token_id") if eos is None else eos),
        )
        config._check_experts(where)
        return config

    def _check_experts(self, where: str) -> None:
        if not self.n_routed_experts:
            return
        if self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise NotMlaModel(
                f"{where}: n_routed_experts {self.n_routed_experts}, n_group {self.n_group} and topk_group "
                f"{self.topk_group} do not fit together"
            )
        eligible = self.n_routed_experts // self.n_group * (self.topk_group if self.grouped else self.n_group)
        if self.num_experts_per_tok > eligible:
            raise NotMlaModel(
                f"{where}: num_experts_per_tok {self.num_experts_per_tok} exceeds the {eligible} eligible"
            )


class _Keys:
    """Typed access to config.json: an error names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise NotMlaModel(f"{self.where}: key {key!r} is missing; this is no DeepSeek-V2/V3 model")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise NotMlaModel(f"{self.where}: {key} is {value!r}, expected a whole number of at least 0")
        return value

    def size(self, key: str, multiple: int = 1) -> int:
        value = self.count(key)
        if value < 1 or value % multiple:
            raise NotMlaModel(f"{self.where}: {key} is {value}, expected a positive multiple of {multiple}")
        return value

    def dtype(self) -> str:
        name = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise NotMlaModel(f"{self.where}: dtype is {name!r}, expected one of {', '.join(DTYPES)}")
        return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMlaModel(f"{path} does not exist; a checkpoint folder needs it") from None
    except ValueError as error:
        raise NotMlaModel(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise NotMlaModel(f"{path} holds {type(raw).__name__}, expected an object")
    return raw


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    # transformers 5 writes rope_parameters; the published checkpoints have rope_theta and rope_scaling
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise NotMlaModel(f"{where}: rope type {kind!r} is not supported, only 'default' and 'yarn'")
    if scaling.get("factor") is None:
        raise NotMlaModel(f"{where}: the yarn rope has no 'factor'")
    original = scaling.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 0)
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(scaling["factor"]),
        original_max_positions=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        attention_factor=scaling.get("attention_factor"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
