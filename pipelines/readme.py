"""Blocks of the README that are made from the code: `python -m pipelines.readme` renews the parameters table.

A block stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; a test compares it with the tables.
"""

from __future__ import annotations

from pathlib import Path

from pipelines import parameters
from pipelines.errors import UserError
from pipelines.settings import Settings

README = Path(__file__).resolve().parent.parent / "README.md"
TITLES = {"release": "Release", "production": "Production"}


def parameters_table() -> str:
    """Markdown tables of both pipelines' parameters with the defaults of config/local.yaml."""
    defaults = Settings.load("local").parameters
    blocks = []
    for pipeline, table in parameters.PIPELINES.items():
        values = getattr(defaults, pipeline)
        rows = [f"| {TITLES[pipeline]} parameter | type | local default | meaning |", "|---|---|---|---|"]
        for one in table:
            default = "(required)" if one.required else f"`{values[one.name]}`"
            enum = f". One of {', '.join(f'`{value}`' for value in one.enum)}" if one.enum else ""
            rows.append(f"| `{one.name}` | {one.type} | {default} | {one.meaning}{enum} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def block(name: str, path: Path = README) -> str:
    """The block's present content. Raises UserError when its markers are missing."""
    return _split(path.read_text(encoding="utf-8"), name, path)[1].strip()


def renew(name: str, content: str, path: Path = README) -> None:
    """Put new content between the block's markers."""
    before, _, after = _split(path.read_text(encoding="utf-8"), name, path)
    path.write_text(f"{before}\n{content.strip()}\n{after}", encoding="utf-8")


def _split(text: str, name: str, path: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise UserError(f"no block '{name}'", str(path), f"add the markers {begin} and {end}")
    before, rest = text.split(begin, 1)
    content, after = rest.split(end, 1)
    return before + begin, content, end + after


if __name__ == "__main__":
    renew("parameters", parameters_table())
