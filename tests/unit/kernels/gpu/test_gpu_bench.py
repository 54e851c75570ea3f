"""The benchmark of the kernels for GPUs runs to its end; what it takes is never judged."""

from __future__ import annotations

import pytest
from on_gpu import DEVICE

from labkit.bench.gpu import BESIDE, ROWS, gpu
from labkit.bench.measure import Row, Setting
from labkit.bench.suite import lines

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    works = gpu(Setting(1, "again"), DEVICE, 1, shapes=[(64, 128)], contexts=[(2, 40)], streamed=0)
    return [row for some in works for row in some]


def test_every_work_beside_its_peers(rows: list[Row]):
    works = {row.work for row in rows}
    assert len(works) == len(ROWS) * len(BESIDE) + 1 + 2  # a bandwidth; two formats of keys and values
    assert all(row.ours is not None and row.ours > 0 for row in rows)
    for work in works:
        beside = [row for row in rows if row.work == work]
        assert lines(beside)[0].startswith(work)
        plain = [row for row in beside if row.peer_name.startswith(("torch bf16", "torch fp32", "reading"))]
        assert len(plain) == 1 and plain[0].ratio is not None and plain[0].ratio > 0


def test_who_is_not_here_says_why(rows: list[Row]):
    guests = {name for names in BESIDE.values() for name in names}
    for row in rows:
        assert row.peer_name in guests or not row.why
        assert (row.ratio is None) == bool(row.why)
    assert {row.peer_name for row in rows} >= guests


def test_goals_stand_where_the_four_bits_are(rows: list[Row]):
    goals = {(row.work, row.peer_name): row.goal for row in rows if row.goal is not None}
    assert sorted(set(goals.values())) == [0.8, 2.5, 3.5]
    assert not any("int8" in work for work, _ in goals)
