"""The ladder: rows are kept as they come, differences are taken within a seed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from labkit import models
from labkit.models import ladder as module
from labkit.models.ladder import ABLATED, EVERY_SEED, LADDER, PAIRS, ladder, paired
from labkit.models.recipe import names

THREE = ["w4a16-rtn-g64", "w4a16-rtn-channel", "w4a16-rtn-g64" + ABLATED]


def climb(
    out: Path, recipes: list[str] = THREE, seeds: tuple[int, ...] = (0, 1), **options: object
) -> list:
    options = {"model": "tiny", "protocol": "lesson", **options}
    return list(ladder(out, recipes, seeds, **options))  # type: ignore[arg-type]


def test_every_rung_is_a_recipe() -> None:
    assert {name.removesuffix(ABLATED) for name in LADDER} <= set(names())
    assert {name for pair in PAIRS for name in pair} <= EVERY_SEED <= set(LADDER)


def test_what_is_not_paired_over_seeds_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LADDER", ("w4a16-rtn-g64", "w4a16-nf4-b64"))
    rows = list(ladder(tmp_path / "a.json", seeds=(4, 5), model="tiny", protocol="lesson"))
    measured = [(row["seed"], row["recipe"]) for row in rows]
    once = [(4, "none"), (4, "w4a16-rtn-g64"), (4, "w4a16-nf4-b64")]
    assert measured == [*once, (5, "none"), (5, "w4a16-rtn-g64")]


def test_a_row_is_what_quantize_and_evaluate_give(tmp_path: Path) -> None:
    rows = climb(tmp_path / "ladder.json")
    assert [(row["seed"], row["recipe"]) for row in rows] == [
        (s, n) for s in (0, 1) for n in ("none", *THREE)
    ]
    original = models.load("tiny", seed=1)
    report = models.evaluate(models.quantize(original, THREE[1], seed=1), original, "lesson")
    assert rows[6]["kl"] == pytest.approx(report.kl, rel=1e-6) and rows[6]["bytes"] == report.bytes
    assert rows[4]["kl"] == 0 and rows[4]["recipe"] == "none"
    tree = json.loads((tmp_path / "ladder.json").read_text())
    assert tree["rows"] == rows
    recipes = "--recipe w4a16-rtn-g64 --recipe w4a16-rtn-channel --recipe 'w4a16-rtn-g64, propagate=False'"
    options = f"{recipes} --seed 0 --seed 1 --lesson --model tiny"
    assert tree["command"] == f"labkit bench ladder --out ladder.json {options}"


def test_an_interrupted_ladder_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = climb(tmp_path / "whole.json")
    out = tmp_path / "part.json"
    begun = ladder(out, THREE, (0, 1), model="tiny", protocol="lesson")
    for _ in range(3):
        next(begun)
    begun.close()
    assert len(json.loads(out.read_text())["rows"]) == 3
    rest = climb(out, resume=True)
    assert [(row["seed"], row["recipe"]) for row in rest] == [(r["seed"], r["recipe"]) for r in whole[3:]]
    kls = [row["kl"] for row in json.loads(out.read_text())["rows"]]
    assert kls == pytest.approx([row["kl"] for row in whole], rel=1e-6)
    assert climb(out, resume=True) == []


def test_another_protocol_does_not_get_into_the_file(tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    climb(out, THREE[:1], (0,))
    before = out.read_bytes()
    with pytest.raises(ValueError, match="choose another file"):
        climb(out, THREE[:1], (1,), resume=True, protocol="full")
    assert out.read_bytes() == before


def test_differences_are_taken_within_a_seed() -> None:
    def row(recipe: str, seed: int, kl: float) -> dict:
        return {"recipe": recipe, "seed": seed, "kl": kl, "perplexity": 10 * kl}

    rows = [row("none", 0, 0.0)]
    rows += [row("w3a16-rtn-g64", s, kl) for s, kl in enumerate((5.0, 7.0, 6.0))]
    rows += [row("w3a16-awq-g64", s, kl) for s, kl in enumerate((2.0, 1.0))]
    [entry] = paired(rows)
    assert (entry["recipe"], entry["minus"], entry["seeds"]) == ("w3a16-awq-g64", "w3a16-rtn-g64", [0, 1])
    assert entry["kl"]["by_seed"] == [-3.0, -6.0] and entry["kl"]["mean"] == -4.5
    assert entry["kl"]["stdev"] == pytest.approx(3 / math.sqrt(2))
    assert entry["perplexity"]["mean"] == -45.0
    [alone] = paired([r for r in rows if r["seed"] == 0])
    assert alone["kl"]["stdev"] is None
