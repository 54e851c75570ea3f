"""By turns, ratios, goals and the file, with costs that are given and not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from labkit.bench.measure import Contender, Row, Setting, Unit, by_turns, invited, kept, quartiles, remedies
from labkit.bench.pipe import Fresh, PeerFailed, PeerMissing

FACTS = {"machine": "a machine", "date": "2026-01-01"}
SETTING = Setting(2, "labkit bench kernels", FACTS)
SECONDS = Unit("s")


def given(*costs: float) -> Callable[[], float]:
    return iter(costs).__next__


def who(name: str, *costs: float, **more: Any) -> Contender:
    return Contender(name, "1.0", given(*costs), **more)


def rows(ours: Contender, *peers: Contender, unit: Unit = SECONDS, rounds: int = 3) -> list[Row]:
    return SETTING.rows("work", unit, ours, peers, rounds=rounds, warm=False, pause=0)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine is ten times slower in the second round, for both: the ratio does not notice.
    [row] = rows(who("ours", 1.0, 10.0, 2.0), who("peer", 3.0, 20.0, 4.0))
    assert (row.ours, row.peer, row.ratio) == (2.0, 4.0, 2.0)
    assert row.ratio_quartiles == (2.0, 2.5)  # of 3, 2, 2
    assert row.ours_quartiles == (1.5, 6.0)
    assert (row.rounds, row.threads, row.machine, row.command) == (
        3,
        2,
        "a machine",
        "labkit bench kernels",
    )


def test_of_a_rate_more_is_better_and_the_ratio_says_so_too() -> None:
    [row] = rows(who("ours", 0.5), who("peer", 2.0), unit=Unit("tokens/s", 128, rate=True), rounds=1)
    assert (row.ours, row.peer, row.ratio) == (256.0, 64.0, 4.0)
    assert row.more_is_better


@pytest.mark.parametrize(("cost", "met"), [(1.4, False), (1.5, True), (1.6, True)])
def test_a_goal_is_met_from_its_ratio_on(cost: float, met: bool) -> None:
    [row] = rows(who("ours", 1.0), who("peer", cost, goal=1.5), rounds=1)
    assert row.met is met


@pytest.mark.parametrize(
    ("ours", "theirs", "even", "met"),
    [
        (0.02, 0.01, True, False),
        (0.02, 0.01, False, True),
        (0.01, 0.02, True, True),
        (None, 0.01, True, True),
    ],
)
def test_where_quality_counts_a_worse_kl_misses_the_goal(
    ours: float | None, theirs: float, even: bool, met: bool
) -> None:
    [row] = rows(who("ours", 1.0, kl=ours), who("peer", 9.0, goal=2.0, even_kl=even, kl=theirs), rounds=1)
    assert (row.met, row.ours_kl, row.peer_kl) == (met, ours, theirs)


def test_everybody_has_a_turn_a_round_and_another_begins_each_time() -> None:
    order: list[str] = []

    def turn(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))  # type: ignore[func-returns-value]

    costs = by_turns([Contender(name, "", turn(name)) for name in "abc"], 2, "work", pause=0)
    assert "".join(order) == "abcbcacab"
    assert costs == [[6.0, 8.0], [4.0, 9.0], [5.0, 7.0]]  # the first round warms up


def test_a_peer_that_fails_drops_out_and_its_row_stays() -> None:
    def fails() -> float:
        raise PeerFailed("the peer ended with status 1")

    first, second = rows(
        who("ours", 1.0, 1.0, 1.0), Contender("broken", "2", fails, goal=2.0), who("peer", 2, 2, 2)
    )
    assert (first.ours, first.peer, first.ratio, first.met) == (1.0, None, None, None)
    assert (first.peer_name, first.goal, first.why) == ("broken", 2.0, "the peer ended with status 1")
    assert second.ratio == 2.0
    assert remedies([first, first, second]) == ["the peer ended with status 1"]


def test_what_fails_in_ours_is_an_error() -> None:
    def fails() -> float:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        rows(Contender("ours", "", fails), who("peer", 1.0))


def test_a_peer_that_is_not_here_stands_with_the_remedy() -> None:
    def missing() -> Contender:
        raise PeerMissing("llama_cpp is not here; run `make peers`")

    def package() -> Contender:
        import nobody_has_this  # type: ignore[import-not-found]  # noqa: F401

        raise AssertionError

    [first, second] = rows(who("ours", 1, 1, 1), invited("llama.cpp", missing), invited("other", package))
    assert (first.peer, first.ratio, first.why) == (None, None, "llama_cpp is not here; run `make peers`")
    assert second.why == "nobody_has_this is not installed; run `make setup`"


def test_memory_is_that_of_the_processes_that_were_timed() -> None:
    ours, peer = Fresh("labkit", 1, "first"), Fresh("llama_cpp", 1, "first")
    ours.peaks, peer.peaks = [100e6, 120e6], [300e6, 240e6]
    [row] = SETTING.peaks("memory", Contender("ours", "1", ours), [Contender("peer", "1", peer, goal=2.0)])
    assert (row.unit, row.ours, row.peer, row.ratio, row.goal) == (
        "MB",
        pytest.approx(110.0),
        pytest.approx(270.0),
        2.5,
        None,
    )
    [row] = SETTING.peaks(
        "memory", Contender("ours", "1", ours), [Contender("peer", "", None, why="not here")]
    )
    assert (row.ours, row.peer, row.why) == (pytest.approx(110.0), None, "not here")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([3.0], (3.0, 3.0)), ([1.0, 2.0], (1.25, 1.75)), ([5.0, 1.0, 2.0, 3.0, 4.0], (2.0, 4.0))],
)
def test_quartiles(values: Sequence[float], expected: tuple[float, float] | None) -> None:
    assert quartiles(values) == expected


def test_the_file_holds_what_was_done_when_a_later_work_stops(tmp_path: Path) -> None:
    def works() -> Iterator[list[Row]]:
        yield rows(who("ours", 1.0), who("peer", 2.0), rounds=1)
        raise KeyboardInterrupt

    out = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        list(kept(works(), out))
    [row] = json.loads(out.read_text())
    asked = {
        "work",
        "ours",
        "peer",
        "peer_version",
        "ratio",
        "unit",
        "threads",
        "machine",
        "command",
        "goal",
        "met",
    }
    assert asked <= set(row)
    assert (row["ours"], row["peer"], row["ratio"], row["ratio_quartiles"]) == (1.0, 2.0, 2.0, [2.0, 2.0])
