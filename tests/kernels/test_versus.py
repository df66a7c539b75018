"""The grid of cases, the page of results, and on a Hopper GPU one case measured beside the peers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.grid import GROUPS, MARKERS, GridCase, full_grid, select, shapes
from kernels.limits import H100
from kernels.peers import PEERS
from kernels.timing import Timing, captured
from kernels.versus_rows import NOTHING, PLANNED, Comparison, Row, read, write_line
from kernels.versus_table import ratio, render

RUN = Comparison("hopper", "a machine", ("FlashMLA (x 1.0)",), 16 << 30, H100)


def timing(us: float) -> Timing:
    return Timing(us - 1, us, us + 1, us + 2, us + 3, 21)


def row(case: GridCase, ours: float, flash_mla: float, fa3: float, difference: float = 1e-3) -> Row:
    """Planning costs FlashMLA 20 us and FlashAttention-3 2 us."""
    times = {"hopper": timing(ours), NOTHING: timing(4.0)}
    if not case.fp8:
        times |= {"flash_mla": timing(flash_mla + 20), "fa3": timing(fa3 + 2)}
        times |= {"flash_mla" + PLANNED: timing(flash_mla), "fa3" + PLANNED: timing(fa3)}
    return Row(case, times, times, {} if case.fp8 else {"fa3": difference})


def without(row: Row, *names: str) -> Row:
    """The row of a run in which `names` were out of memory."""
    times = {name: time for name, time in row.cold.items() if name.removesuffix(PLANNED) not in names}
    return Row(row.case, times, times, row.differences, dict.fromkeys(names, "out of memory"))


def test_grid_has_the_cases_of_the_goal() -> None:
    cases = full_grid()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert set(MARKERS) <= set(names)
    assert {(c.lengths, c.s_q, c.h_q) for c in cases} >= {
        ((s,) * b, 1, h)
        for b in (1, 2, 4, 8, 16, 32, 64, 128)
        for s in (512, 1024, 4096, 8192, 32768)
        for h in (16, 32, 64, 128)
    }
    assert any(case.lengths == (4641, 45118, 1730, 1696) and case.s_q == 4 for case in cases)
    for case in cases:
        assert case.fp8 or sum(member(case) for member in GROUPS.values()) == 1
        assert min(case.lengths) >= case.s_q


def test_floor_is_the_longer_of_bytes_and_operations() -> None:
    assert [f"{c.floor_us():.1f}" for c in shapes("128x8192,128x8192x2", "128", False)] == ["452.2", "741.3"]
    assert f"{shapes('128x8192', '16', True)[0].floor_us():.1f}" == "251.8"


def test_cases_are_chosen_by_a_part_of_their_name() -> None:
    assert [case.name for case in select(full_grid(), "b4 s8192 q1 h16, tail")] == [
        "b4 s8192 q1 h16",
        "long tail q4 h16",
    ]
    assert {case.name for case in select(full_grid(), "markers")} == set(MARKERS)
    with pytest.raises(ValueError, match="'q7' names no case"):
        select(full_grid(), "q7")


def test_page_gives_every_loss() -> None:
    one, other, fp8 = select(full_grid(), "b4 s8192 q1 h16, tail, b1 s1024 q1 h16 fp8")
    rows = [row(one, 30.0, 40.0, 29.0), row(other, 20.0, 19.0, 25.0), row(fp8, 14.0, 0, 0)]
    assert ratio(rows[0].cold, "hopper", planned=False) == 30 / 31
    assert ratio(rows[0].cold, "hopper", planned=True) == 30 / 29
    page = render(RUN, rows)
    _, cold, warm = (line.split(" | ") for line in page.splitlines() if line.startswith("| b4 s8192"))
    assert cold[:3] + cold[4:] == warm  # a floor is a cold L2's
    assert cold[3:] == [
        "17.8", "30.0 (29.0-31.0)", "60.0 (59.0-61.0)", "31.0 (30.0-32.0)", "0.97",
        "40.0 (39.0-41.0)", "29.0 (28.0-30.0)", "**1.03** |",
    ]  # fmt: skip
    assert "Planning included: 2 cases, ours slower in 0" in page
    assert "Peers planned before: 2 cases, ours slower in 2 (worst 1.05)" in page
    assert "| varying lengths | 1 | 0 | 0.74 | 0.74 | 1 | 1.05 | 1.05 |" in page
    assert "| b4 s8192 | 1 | 16 | 17.8 | 22 | **30.0 (29.0-31.0)** |" in page
    assert (
        page.count("| b1 s1024 | 1 | 16 | 4.3 | 14.0 (13.0-15.0) | - | - | 14.0 (13.0-15.0) | - | - |") == 1
    )
    assert "times compare different work" not in page
    assert "Not measured" not in page
    assert "One pool of 16.0 GiB" in page


def test_page_says_what_a_perfect_kernel_could_reach() -> None:
    """The first: ours takes 30, the faster peer 31, or 29 planned, a perfect kernel 4.0 + 13.8."""
    small, large = select(full_grid(), "b4 s8192 q1 h16, b128 s8192 q1 h64")
    page = render(RUN, [row(small, 30.0, 40.0, 29.0), row(large, 400.0, 500.0, 498.0)])
    assert "| batch 1 to 8, one query | 1 | 1.74 | 0 | 1.63 | 1.03 | 1.69 |" in page
    assert "| batch 16 and more, one query, up to 64 heads | 1 | 1.11 | 1 | 1.11 | 1.25 | 0.89 |" in page
    assert "| all | 2 | 1.39 | 1 | 1.34 | 1.14 | 1.23 |" in page


def test_fp8_cases_stand_beside_our_own_with_16_bits() -> None:
    (packed,) = select(full_grid(), "b1 s1024 q1 h16 fp8")
    page = render(RUN, [row(packed.with_16_bits(), 28.0, 40.0, 29.0), row(packed, 14.0, 0, 0)])
    times = "14.0 (13.0-15.0) | 28.0 (27.0-29.0) | 0.50"
    assert f"| b1 s1024 | 1 | 16 | 4.3 | {times} | {times} |" in page


def test_rows_are_read_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = select(full_grid(), "b4 s8192 q1 h16, tail")
    rows = [row(one, 30.0, 40.0, 29.0), without(row(other, 20.0, 19.0, 25.0), "fa3")]
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    with out.open("w") as file:
        for item in (RUN, *rows):
            write_line(file, item)
    assert read(out) == (RUN, rows)
    assert bench.main(["--peers", "--rows", str(out), "--results", str(page)]) == 1  # one was out of memory
    assert page.read_text() == render(RUN, rows)
    for text, words in (("", "is empty"), ("{}\n", "1 is no line"), (out.read_text() + "{", "4 is no line")):
        out.write_text(text)
        assert bench.main(["--peers", "--rows", str(out)]) == 2
        assert words in capsys.readouterr().err


def test_page_goes_on_without_who_was_out_of_memory() -> None:
    one, other, third = select(full_grid(), "b4 s8192 q1 h16, b8 s8192 q1 h16, tail")
    rows = [
        without(row(one, 30.0, 40.0, 29.0), "fa3"),
        without(row(other, 20.0, 19.0, 25.0), "flash_mla", "fa3"),
        without(row(third, 20.0, 19.0, 25.0), "hopper"),
    ]
    page = render(RUN, rows)
    assert (
        "**Not measured:**\nb4 s8192 q1 h16: fa3, out of memory\nb8 s8192 q1 h16: flash_mla, out of memory"
        in page
    )
    assert "long tail q4 h16: hopper, out of memory" in page
    assert "Planning included: 1 cases, ours slower in 0" in page
    # the last ones, of the warm table
    cells = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines() if line.startswith("| b")}
    assert cells["| b4 s8192"][3:] == [
        "30.0 (29.0-31.0)",
        "60.0 (59.0-61.0)",
        "0.50",
        "40.0 (39.0-41.0)",
        "0.75 |",
    ]
    assert cells["| b8 s8192"][3:] == ["20.0 (19.0-21.0)", "-", "-", "-", "- |"]
    assert "| long tail" not in page


def test_page_says_when_outputs_disagree() -> None:
    (case,) = select(full_grid(), "tail")
    for difference in (0.5, float("nan")):
        page = render(RUN, [row(case, 20, 30, 30, difference)])
        assert "times compare different work:**\nlong tail q4 h16: fa3" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_peers_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--peers"]) == 2
    assert "compute capability 9.0" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_call_keeps_what_its_graph_reads() -> None:
    result = torch.empty(1 << 20, device="cuda")
    graph = captured(functools.partial(torch.add, torch.ones(1 << 20, device="cuda"), 1.0, out=result))
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(4)]
    result.zero_()
    graph.replay()
    assert int((result == 2).sum()) == 1 << 20
    assert not any(int(other.count_nonzero()) for other in others)


@pytest.mark.gpu
def test_a_case_is_measured_beside_the_peers(tmp_path: Path) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    page, out = tmp_path / "page.md", tmp_path / "rows.jsonl"
    arguments = ["--peers", "--cases", "b16 s1024 q2 h16, b1 s1024 q1 h16", "--rounds", "5"]
    assert bench.main([*arguments, "--results", str(page), "--out", str(out)]) == 0
    run, rows = read(out)
    assert [len(row.case.lengths) for row in rows] == [1, 16]
    assert 1e6 < run.limits.bytes_per_us < 8e6
    assert 2e8 < run.limits.operations_per_us < 2e9
    for name in PEERS:
        if name in rows[0].cold:
            assert 0 < rows[0].cold[name].p20_us <= rows[0].cold[name].p80_us
    assert "| b16 s1024 | 2 | 16 |" in page.read_text()
