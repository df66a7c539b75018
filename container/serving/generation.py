"""The defaults of a request that a checkpoint brings along. Imports no torch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from container.serving.config_json import NotMlaModel

log = logging.getLogger(__name__)

# Of transformers, not of this server, with the values that change nothing.
IGNORED: Mapping[str, tuple[Any, ...]] = {
    "min_p": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
    "typical_p": (None, 1),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says of a request that does not say it itself; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> "GenerationDefaults":
        """Of a parsed generation_config.json. Raises NotMlaModel for a value no request could have."""

        def value(name: str, low: float, high: float, whole: bool = False) -> Any:
            found = raw.get(name)
            if found is None:
                return None
            good = isinstance(found, int if whole else int | float) and not isinstance(found, bool)
            if not good or not low <= found <= high:
                raise NotMlaModel(f"{where}: {name} is {found!r}, expected {low:g} to {high:g}")
            return found

        if ignored := [name for name, neutral in IGNORED.items() if raw.get(name) not in neutral]:
            log.warning(
                "%s: %s will not be applied: this server has no such thing", where, ", ".join(ignored)
            )
        temperature = value("temperature", 0, 100)
        if raw.get("do_sample") is False:  # greedy, whatever else is written
            temperature = 0.0
        elif raw.get("do_sample") and temperature is None:
            temperature = 1.0  # transformers writes no value that is its default
        return cls(
            temperature=temperature,
            top_p=value("top_p", 1e-6, 1),
            top_k=value("top_k", 0, (1 << 31) - 1, whole=True),
            max_tokens=value("max_new_tokens", 1, 1 << 31, whole=True),
        )
