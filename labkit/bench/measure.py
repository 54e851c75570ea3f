"""Ours and its peers by turns: what every benchmark shares.

Within a round everybody has one turn, so that a slow moment of the machine hits all alike; who begins changes from
round to round, and the first round warms up and is not counted. A ratio is taken within each round, and the median
of these is quoted: it is steadier than the ratio of two medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from labkit.bench.pipe import Fresh, PeerFailed, PeerMissing
from labkit.files import whole_file
from labkit.models.calibrate import bar
from labkit.models.ladder import measured_on

PAUSE = 0.05  # seconds between turns, in which the threads of who was last fall asleep


@dataclass(frozen=True)
class Unit:
    """What a cost is shown as: ``scale * cost``, or ``scale / cost`` of a rate, of which more is better."""

    name: str
    scale: float = 1.0
    rate: bool = False

    def __call__(self, cost: float) -> float:
        return self.scale / cost if self.rate else self.scale * cost


@dataclass
class Contender:
    """Who takes part in a work.

    name     whose code it is, in which configuration
    version  of the library, and what else decides its speed
    turn     does the work once and returns its cost: seconds, or bytes; less is better. None: it is not here
    why      why it is not here, and the remedy
    goal     of a peer: the ratio that ours should reach beside it
    even_kl  of a peer: the goal counts only where our KL is no worse
    head     in which format the matrix of the logits stands
    bytes    read for one unit of work: a token, a product
    kl       to the reference, nats per token
    """

    name: str
    version: str
    turn: Callable[[], float] | None
    why: str = ""
    goal: float | None = None
    even_kl: bool = False
    head: str | None = None
    bytes: float | None = None
    kl: float | None = None


def invited(name: str, make: Callable[[], Contender]) -> Contender:
    """The contender that ``make`` sets up; where its library is not here or fails, one of that name that says why."""
    try:
        return make()
    except (PeerMissing, PeerFailed) as reason:
        return Contender(name, "", None, why=str(reason))
    except ImportError as reason:
        return Contender(name, "", None, why=f"{reason.name} is not installed; run `make setup`")


@dataclass(frozen=True)
class Row:
    """One work, ours beside one peer. Figures are medians over the rounds, ``quartiles`` the first and the third.

    work, unit     what was done, and what the figures count
    ours, peer     None: it could not run here, and ``why`` says the remedy
    ratio          how much better ours is, above 1: within each round, then the median
    goal, met      the ratio to reach, and whether it is; None: reported only, or not measured
    head, bytes    the format of the head, and what is read for one unit of work
    kl             to the reference, nats per token
    flop           of one unit of work, where a roofline is drawn of it
    """

    work: str
    ours: float | None
    peer: float | None
    ratio: float | None
    unit: str
    goal: float | None
    met: bool | None
    ours_name: str
    peer_name: str
    ours_version: str
    peer_version: str
    ours_quartiles: tuple[float, float] | None
    peer_quartiles: tuple[float, float] | None
    ratio_quartiles: tuple[float, float] | None
    rounds: int
    threads: int
    machine: str
    date: str
    command: str
    more_is_better: bool
    why: str = ""
    ours_head: str | None = None
    peer_head: str | None = None
    ours_bytes: float | None = None
    peer_bytes: float | None = None
    ours_kl: float | None = None
    peer_kl: float | None = None
    flop: float | None = None


@dataclass(frozen=True)
class Setting:
    """What all rows of a run have in common; ``command`` repeats it."""

    threads: int
    command: str
    facts: dict[str, Any] = field(default_factory=measured_on)

    def rows(
        self,
        work: str,
        unit: Unit,
        ours: Contender,
        peers: Sequence[Contender],
        *,
        rounds: int,
        warm: bool = True,
        pause: float = PAUSE,
        flop: float | None = None,
    ) -> list[Row]:
        """Measure a work and give a row for each peer."""
        costs = by_turns([ours, *peers], rounds, work, warm=warm, pause=pause)
        return self.rows_of(work, unit, ours, peers, costs, flop)

    def rows_of(
        self,
        work: str,
        unit: Unit,
        ours: Contender,
        peers: Sequence[Contender],
        costs: Sequence[list[float]],
        flop: float | None = None,
    ) -> list[Row]:
        """The rows of what ``by_turns`` measured, of ours first and then of each peer."""
        return [
            self._row(work, unit, ours, peer, costs[0], mine, flop)
            for peer, mine in zip(peers, costs[1:], strict=True)
        ]

    def peaks(self, work: str, ours: Contender, peers: Sequence[Contender]) -> list[Row]:
        """Rows of the memory that processes took whose time was measured, without measuring again."""
        everyone = []
        for who in (ours, *peers):
            kept = who.turn.peaks if isinstance(who.turn, Fresh) else []
            again = iter(kept).__next__ if kept else None
            everyone.append(replace(who, turn=again, goal=None))
        count = min(
            (len(who.turn.peaks) for who in (ours, *peers) if isinstance(who.turn, Fresh)), default=0
        )
        return self.rows(
            work, Unit("MB", 1e-6), everyone[0], everyone[1:], rounds=count, warm=False, pause=0
        )

    def _row(
        self,
        work: str,
        unit: Unit,
        ours: Contender,
        peer: Contender,
        our_costs: list[float],
        costs: list[float],
        flop: float | None,
    ) -> Row:
        ratios = [theirs / mine for mine, theirs in zip(our_costs, costs, strict=False)]
        ratio = statistics.median(ratios) if ratios else None
        met = None
        if ratio is not None and peer.goal is not None:
            met = ratio >= peer.goal and not (peer.even_kl and worse(ours.kl, peer.kl))
        return Row(
            work=work, unit=unit.name, more_is_better=unit.rate, ratio=ratio, goal=peer.goal, met=met,
            ours=_median(our_costs, unit), peer=_median(costs, unit),
            ours_name=ours.name, peer_name=peer.name, ours_version=ours.version, peer_version=peer.version,
            ours_quartiles=quartiles([unit(cost) for cost in our_costs]),
            peer_quartiles=quartiles([unit(cost) for cost in costs]), ratio_quartiles=quartiles(ratios),
            rounds=len(ratios), threads=self.threads, machine=self.facts["machine"], date=self.facts["date"],
            command=self.command, why=peer.why or ours.why, ours_head=ours.head, peer_head=peer.head,
            ours_bytes=ours.bytes, peer_bytes=peer.bytes, ours_kl=ours.kl, peer_kl=peer.kl, flop=flop,
        )  # fmt: skip


def by_turns(
    contenders: Sequence[Contender], rounds: int, what: str, *, warm: bool = True, pause: float = PAUSE
) -> list[list[float]]:
    """Costs of every contender, round by round. A peer that fails drops out: it has none, and its ``why`` says why.

    warm: a first round that is not counted.
    """
    costs: list[list[float]] = [[] for _ in contenders]
    for number in bar(range(rounds + warm), what, None, unit="round"):
        for i in range(len(contenders)):
            index = (i + number) % len(contenders)
            contender = contenders[index]
            if contender.turn is None:
                continue
            time.sleep(pause)
            try:
                cost = contender.turn()
            except PeerFailed as failure:
                contender.turn, contender.why = None, str(failure)
                costs[index].clear()
                continue
            if number >= warm:
                costs[index].append(cost)
    return costs


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The first and the third; of one value it is both."""
    if len(values) < 2:
        return (values[0], values[0]) if values else None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def worse(ours: float | None, theirs: float | None) -> bool:
    """Whether our KL is above theirs by more than what rounding does; one that is not known is no worse."""
    return ours is not None and theirs is not None and ours > 1.01 * theirs


def kept(works: Iterator[list[Row]], out: Path | None) -> Iterator[list[Row]]:
    """Each work's rows as they come. The file is written whole after every work, so that a run that was stopped leaves
    what it had."""
    found: list[Row] = []
    for rows in works:
        found += rows
        if out is not None:
            write(found, out)
        yield rows


def write(rows: Sequence[Row], out: Path) -> None:
    """The rows as a JSON list, which appears whole."""
    with whole_file(out) as part:
        part.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def remedies(rows: Sequence[Row]) -> list[str]:
    """Why peers were not measured, each reason once."""
    return list(dict.fromkeys(row.why for row in rows if row.why))


def _median(costs: Sequence[float], unit: Unit) -> float | None:
    return unit(statistics.median(costs)) if costs else None
