"""The plots stay inside their canvas and are well-formed for any figures."""

import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from steps.evaluation import plots
from steps.evaluation.schema import CorrectnessCase, LatencyCase

positive = st.floats(1e-3, 1e8)
errors = st.one_of(st.just(0.0), st.floats(1e-12, 1e9))


@st.composite
def latency_cases(draw):
    p50, baseline, gbps = draw(positive), draw(positive), draw(st.floats(0, 1e4))
    p99 = p50 * draw(st.floats(1, 100))
    return LatencyCase(
        name=draw(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20)),
        b=1, s_q=1, h_q=4, s_k=64, p50_us=p50, p90_us=(p50 + p99) / 2, p99_us=p99, baseline_p50_us=baseline,
        speedup=baseline / p50, gbps=gbps, tflops=gbps / 10, fraction_of_limit=gbps / 20,
    )  # fmt: skip


@st.composite
def correctness_cases(draw):
    error, bound = draw(errors), draw(st.floats(1e-6, 1e-1))
    return CorrectnessCase(
        name="a <case> & more", relative_error=error, bound=bound, lse_error=draw(errors), lse_bound=1e-3,
        passed=error <= bound,
    )  # fmt: skip


def check(svg: str, rows: int) -> None:
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert len(root.findall("g")) == rows
    for element in root.iter():
        for key in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(key, 0)) <= width
        for key in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(key, 0)) <= height
        assert float(element.get("width", 0)) >= 0


@settings(max_examples=60, deadline=None)
@given(st.lists(latency_cases(), min_size=1, max_size=8), st.floats(0.1, 1e4))
def test_latency_and_bandwidth(cases, limit):
    check(plots.latency_plot(cases), len(cases))
    check(plots.bandwidth_plot(cases, limit), len(cases))


@settings(max_examples=60, deadline=None)
@given(st.lists(correctness_cases(), min_size=1, max_size=15))
def test_errors(cases):
    check(plots.error_plot(cases), len(cases))


@given(st.floats(1e-3, 1e9), st.floats(1.01, 1e6))
def test_a_logarithmic_axis_keeps_order_and_has_ticks(low, ratio):
    axis = plots.LogAxis([low, low * ratio], left=100)
    assert 100 < axis(low) < axis(low * ratio) < plots.WIDTH - plots.RIGHT
    if ratio > 10:
        assert 1 <= len(axis.ticks()) <= 10
