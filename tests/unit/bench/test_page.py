"""The page and the table of given rows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labkit.bench import page, suite
from labkit.bench.measure import Contender, Row, Setting, Unit

pytest.importorskip("plotly")
SETTING = Setting(2, "labkit bench all --threads 2", {"machine": "a machine", "date": "2026-01-01"})


def row(work: str, unit: Unit, ours: float, peer: float | None, **more: Any) -> Row:
    flop, size = more.pop("flop", None), more.pop("bytes", None)
    theirs = Contender("peer", "peer 2.0", None if peer is None else lambda: peer, bytes=size, **more)
    [made] = SETTING.rows(
        work, unit, Contender("ours", "labkit 0", lambda: ours, bytes=size), [theirs], rounds=1, pause=0, flop=flop
    )  # fmt: skip
    return made


ROWS = [
    row("one row", Unit("microseconds", 1e6), 1e-3, 2e-3, goal=1.0, flop=4e6, bytes=1e6),
    row("bandwidth", Unit("GB/s", 1e-3, rate=True), 1e-3, 5e-4, goal=0.9),
    row("decode <128>", Unit("tokens/s", 128, rate=True), 0.5, None, goal=1.5, why="run `make peers`"),
]


def test_points_of_the_roofline_by_hand() -> None:
    # 4e6 operations on 1e6 bytes in 1 ms: 4 FLOP/B, 4 GFLOP/s, 1 GB/s. The peer takes twice as long.
    (_, per, reached, said), (_, _, theirs, _) = page.points(ROWS)
    assert (per, reached, theirs) == (pytest.approx(4.0), pytest.approx(4.0), pytest.approx(2.0))
    assert said == "ours, one row: 1.0 GB/s, 4 GFLOP/s"


def test_the_roof_is_the_memory_that_was_measured() -> None:
    figure = page.roofline(ROWS)
    assert figure is not None
    x, y = figure.data[0].x, figure.data[0].y
    assert x[0] == 2.0 and y[0] == pytest.approx(4.0)  # 2 GB/s read, 2 FLOP/B
    assert y[-1] == pytest.approx(4.0)
    assert page.roofline(ROWS[:1]) is None, "without the memory's speed there is no roof"
    assert page.roofline(ROWS[1:]) is None, "without arithmetic there are no points"


def test_bars_stand_for_the_ratios_that_were_measured() -> None:
    figure = page.ratios(ROWS)
    assert figure is not None
    assert list(figure.data[0].x) == [2.0, 0.5]
    assert list(figure.data[1].x) == [1.0, 0.9]
    assert list(figure.data[0].marker.color) == [page.MET, page.MISSED]
    assert page.ratios(ROWS[2:]) is None


def test_the_page_needs_no_network_and_names_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    page.write(ROWS, out)
    text = out.read_text()
    assert text.count("<tr>") == 1 + len(ROWS)
    assert "decode &lt;128&gt;" in text
    assert "Not measured" in text and "run `make peers`" in text
    assert "a machine; 2 threads; 2026-01-01" in text
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", text)
    page.write([], out)
    assert "Not measured" not in out.read_text()


def test_a_work_for_reading() -> None:
    worse = replace(ROWS[0], met=False, ours_kl=0.2, peer_kl=0.1)
    assert suite.lines([ROWS[0], worse]) == [
        "one row: ours 1,000 microseconds",
        "  2.00 (2.00 to 2.00)     peer 2,000; goal 1 met",
        "  2.00 (2.00 to 2.00)     peer 2,000, KL 0.1000; goal 1 not met: the KL is worse",
    ]
    assert suite.lines(ROWS[1:2])[1].endswith("goal 0.9 not met")
    assert suite.lines(ROWS[2:]) == [
        "decode <128>: ours 256 tokens/s",
        f"  {'-':22}  peer -; goal 1.5 not measured",
    ]
    assert suite.lines([]) == []
