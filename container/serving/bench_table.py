"""The table of `python -m container.serving.bench --gpu`: its points, and how they become Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a decode step of `batch` sequences of about `context` tokens."""

    context: int
    batch: int
    median: float
    p99: float


@dataclass(frozen=True)
class Result:
    """What one engine's process left, and why there is no more of it (None: it is all)."""

    timings: list[Timing]
    failure: str | None


def table(results: Mapping[str, Result], titles: Mapping[str, str], ours: str, peers: list[str]) -> str:
    """A row for each context and batch, a column for each engine and one that compares `ours` with `peers`.

    results, titles: by an engine's name; a title says what the engine is. The last column is the tokens a
    second of `ours` over those of the fastest of `peers` at that point.
    """
    legend = [f"- {name}: {titles[name]}" for name in results]
    compared = ours in results and any(name in results for name in peers)
    heads = ["context", "batch", *results, *([f"{ours} over vLLM's own"] if compared else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    measured = {name: {(t.context, t.batch): t for t in r.timings} for name, r in results.items()}
    for point in dict.fromkeys(point for times in measured.values() for point in times):
        context, batch = point
        cells = [str(context), str(batch)]
        for name in results:
            t = measured[name].get(point)
            cells.append(f"{t.median:.2f} ({t.p99:.2f}), {1e3 * batch / t.median:.0f}/s" if t else "-")
        if compared:
            theirs = [measured[name][point].median for name in peers if point in measured.get(name, {})]
            mine = measured[ours].get(point)
            cells.append(f"{min(theirs) / mine.median:.2f}x" if theirs and mine else "-")
        lines.append(f"| {' | '.join(cells)} |")
    failures = [f"- {name}: {r.failure}" for name, r in results.items() if r.failure]
    return "\n".join([*legend, "", *lines, *(["", *failures] if failures else [])]) + "\n"
