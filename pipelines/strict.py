"""What every section of the configuration is: frozen, and without a key that nobody knows."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1)]


class Strict(BaseModel):
    """A section; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
