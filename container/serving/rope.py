"""The rotary embedding of a checkpoint's configuration, YaRN included. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from container.serving.config_json import NotMlaModel


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


def read_rope(raw: Mapping[str, Any], where: str) -> Rope:
    """Of a parsed config.json; `where` names it in errors. Raises NotMlaModel."""
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
