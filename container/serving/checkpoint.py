"""A Hugging Face DeepSeek-V2/V3 checkpoint folder: where it is, and what its config.json says.

Imports no torch, so that a pipeline step which only reads the configuration stays light.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from container.serving.config_json import Keys, NotMlaModel, read_json
from container.serving.generation import GenerationDefaults
from container.serving.rope import Rope, read_rope

# model_type -> how the router scores experts. Other families keep keys and values apart and have no latent.
SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
# What transformers takes for a key that config.json leaves out. A null is another thing: none of it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
    "deepseek_v3": {
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


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
    fp8_block: tuple[int, int] | None  # rows and columns of a weight's block that shares a scale
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

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
        """Reads and validates config.json and, where there is one, generation_config.json of a checkpoint.

        Raises NotMlaModel naming the file and the key that is missing or that this engine cannot run.
        """
        path = Path(folder) / "config.json"
        raw = read_json(path)
        config = cls.from_dict(raw, where=str(path))
        path = path.with_name("generation_config.json")
        if not path.is_file():
            return config
        generation = read_json(path)
        if "eos_token_id" in generation:
            config = replace(config, eos_token_ids=_token_ids(generation["eos_token_id"]))
        return replace(config, generation=GenerationDefaults.from_dict(generation, str(path)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> "ModelConfig":
        """The configuration of a parsed config.json; `where` names its origin in errors."""
        model_type = raw.get("model_type")
        if model_type not in SCORING:
            raise NotMlaModel(
                f"{where}: model_type is {model_type!r}, and only {', '.join(SCORING)} are multi-head latent "
                "attention models that this engine runs"
            )
        raw = {**DEFAULTS[model_type], **raw}
        keys = Keys(raw, where)
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
            routed_scaling_factor=float(raw["routed_scaling_factor"]),
            scoring=SCORING[model_type],
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=read_rope(raw, where),
            rope_interleave=not v3 or bool(raw.get("rope_interleave", True)),  # V2 has no other form
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=not v3 and bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=keys.size("max_position_embeddings"),
            eos_token_ids=_token_ids(raw.get("eos_token_id")),
            fp8_block=_fp8_block(raw.get("quantization_config"), where),
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


def _fp8_block(quantization: Any, where: str) -> tuple[int, int] | None:
    """The block of DeepSeek-V3's own FP8 form: e4m3 weights with a float32 scale for each block."""
    if not quantization:
        return None
    block = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block:
        raise NotMlaModel(
            f"{where}: quantization_config ({quantization.get('quant_method')}) is not supported, only fp8 "
            "(e4m3) with weight_block_size; convert the weights to bfloat16"
        )
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise NotMlaModel(f"{where}: weight_block_size is {block!r}, expected two positive whole numbers")
    return block[0], block[1]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
