"""Plots of the report as inline SVG. Colours are the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from steps.evaluation.schema import CorrectnessCase, LatencyCase

WIDTH, ROW, TOP, BOTTOM = 920, 26, 30, 26
RIGHT = 96  # room for the figures at the end of a row

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def left_margin(names: Iterable[str]) -> int:
    """Room for the case names, in pixels."""
    return min(28 + 7 * max(map(len, names), default=0), 250)


class LogAxis:
    """A horizontal logarithmic axis over the positive `values`, from pixel `left` on."""

    def __init__(self, values: Iterable[float], left: int) -> None:
        self.left = left
        positive = [value for value in values if value > 0] or [1.0]
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = max(high - low, 0.3) * 0.06
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        """Pixel of `value`; what lies outside is drawn at the edge."""
        share = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return self.left + min(max(share, 0.0), 1.0) * (WIDTH - self.left - RIGHT)

    def ticks(self) -> list[float]:
        """1-2-5 steps over at most two and a half decades, whole decades over more."""
        steps = (1, 2, 5) if self.high - self.low <= 2.5 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = max(1, round((self.high - self.low) / 8))
        values = [step * 10.0**decade for decade in decades if decade % every == 0 for step in steps]
        return [value for value in values if self.low <= math.log10(value) <= self.high]


class LinearAxis:
    """A horizontal axis from 0, at pixel `left`, to the largest of `values`."""

    def __init__(self, values: Iterable[float], left: int) -> None:
        self.left = left
        self.high = max(values, default=0.0) * 1.04 or 1.0

    def __call__(self, value: float) -> float:
        return self.left + min(max(value / self.high, 0.0), 1.0) * (WIDTH - self.left - RIGHT)

    def ticks(self) -> list[float]:
        raw = self.high / 5
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
        return [i * step for i in range(int(self.high / step) + 1)]


def latency_plot(cases: list[LatencyCase]) -> str:
    """Per case: our p50 to p99 and the baseline's p50, on a logarithmic axis of microseconds."""
    values = [value for case in cases for value in (case.p50_us, case.p99_us, case.baseline_p50_us)]
    axis = LogAxis(values, left_margin(case.name for case in cases))
    rows = []
    for i, case in enumerate(cases):
        y = _y(i)
        ours, tail, base = axis(case.p50_us), axis(case.p99_us), axis(case.baseline_p50_us)
        slower = " bad" if case.speedup < 1 else ""
        rows.append(
            f"<g><title>{escape(case.name)}: p50 {microseconds(case.p50_us)}, "
            f"p90 {microseconds(case.p90_us)}, p99 {microseconds(case.p99_us)}; "
            f"baseline p50 {microseconds(case.baseline_p50_us)}</title>"
            + _band(i)
            + _name(axis.left, y, case.name)
            + f'<line class="gain{slower}" x1="{ours:.1f}" x2="{base:.1f}" y1="{y}" y2="{y}"/>'
            + f'<line class="tail" x1="{ours:.1f}" x2="{tail:.1f}" y1="{y}" y2="{y}"/>'
            + f'<line class="tail" x1="{tail:.1f}" x2="{tail:.1f}" y1="{y - 4}" y2="{y + 4}"/>'
            + f'<circle class="base" cx="{base:.1f}" cy="{y}" r="5"/>'
            + f'<circle class="ours" cx="{ours:.1f}" cy="{y}" r="5.5"/>'
            + _figure(y, f"{case.speedup:.2f}×", slower)
            + "</g>"
        )
    return _svg(axis, [microseconds(tick) for tick in axis.ticks()], rows, "speed-up", "Latency per case")


def error_plot(cases: list[CorrectnessCase]) -> str:
    """Per case: the relative error and the tick of its bound, on a logarithmic axis."""
    values = [value for case in cases for value in (case.relative_error, case.bound)]
    axis = LogAxis(values, left_margin(case.name for case in cases))
    rows = []
    for i, case in enumerate(cases):
        y, bad = _y(i), "" if case.passed else " bad"
        error, bound = axis(case.relative_error), axis(case.bound)
        share = case.relative_error / case.bound if case.bound else math.inf
        rows.append(
            f"<g><title>{escape(case.name)}: relative error {case.relative_error:.2e}, "
            f"bound {case.bound:.1e}; lse error {case.lse_error:.2e}, bound {case.lse_bound:.1e}</title>"
            + _band(i)
            + _name(axis.left, y, case.name)
            + f'<line class="stem{bad}" x1="{axis.left}" x2="{error:.1f}" y1="{y}" y2="{y}"/>'
            + f'<circle class="ours{bad}" cx="{error:.1f}" cy="{y}" r="4.5"/>'
            + f'<line class="bound" x1="{bound:.1f}" x2="{bound:.1f}" y1="{y - 9}" y2="{y + 9}"/>'
            + _figure(y, f"{share:.0%}" if share >= 0.01 or share == 0 else "&lt;1%", bad)
            + "</g>"
        )
    return _svg(axis, [scientific(tick) for tick in axis.ticks()], rows, "of bound", "Error per case")


def bandwidth_plot(cases: list[LatencyCase], limit_gbps: float) -> str:
    """Per case: the achieved GB/s as a bar against the memory's measured read bandwidth."""
    axis = LinearAxis([*(case.gbps for case in cases), limit_gbps], left_margin(case.name for case in cases))
    limit = axis(limit_gbps)
    rows = []
    for i, case in enumerate(cases):
        y, width = _y(i), axis(case.gbps) - axis.left
        rows.append(
            f"<g><title>{escape(case.name)}: {case.gbps:.1f} GB/s, {case.tflops:.3g} TFLOP/s</title>"
            + _band(i)
            + _name(axis.left, y, case.name)
            + f'<rect class="bar" x="{axis.left}" y="{y - 6}" width="{width:.1f}" height="12" rx="2"/>'
            + _figure(y, f"{case.fraction_of_limit:.0%}", "")
            + "</g>"
        )
    bottom = TOP + ROW * len(cases)
    rows.append(f'<line class="bound" x1="{limit:.1f}" x2="{limit:.1f}" y1="{TOP}" y2="{bottom}"/>')
    return _svg(axis, [f"{tick:g} GB/s" for tick in axis.ticks()], rows, "of limit", "Bandwidth per case")


def microseconds(value: float) -> str:
    """1234.5 -> "1.23 ms", 56.7 -> "56.7 µs"."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} s"
    return f"{value / 1e3:.3g} ms" if value >= 1e3 else f"{value:.3g} µs"


def scientific(value: float) -> str:
    """0.002 -> "2×10⁻³"."""
    exponent = math.floor(math.log10(value))
    factor = round(value / 10.0**exponent)
    power = str(exponent).translate(SUPERSCRIPT)
    return f"10{power}" if factor == 1 else f"{factor}×10{power}"


def _svg(axis: LogAxis | LinearAxis, labels: list[str], rows: list[str], heading: str, title: str) -> str:
    bottom = TOP + ROW * sum(row.startswith("<g>") for row in rows)
    grid = "".join(
        f'<line class="grid" x1="{axis(tick):.1f}" x2="{axis(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{axis(tick):.1f}" y="{bottom + 18}">{label}</text>'
        for tick, label in zip(axis.ticks(), labels, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{title}">'
        f'<text class="heading" x="{WIDTH - 8}" y="{TOP - 11}">{heading}</text>'
        f"{grid}{''.join(rows)}</svg>"
    )


def _y(i: int) -> int:
    return TOP + ROW * i + ROW // 2


def _band(i: int) -> str:
    """The whole row: catches the pointer for the title, and every second one is shaded."""
    shade = "band" if i % 2 == 0 else "blank"
    return f'<rect class="{shade}" x="0" y="{TOP + ROW * i}" width="{WIDTH}" height="{ROW}"/>'


def _name(left: int, y: int, name: str) -> str:
    return f'<text class="name" x="{left - 14}" y="{y + 4}">{escape(name)}</text>'


def _figure(y: int, text: str, extra: str) -> str:
    return f'<text class="figure{extra}" x="{WIDTH - 8}" y="{y + 4}">{text}</text>'
