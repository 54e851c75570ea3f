"""Allocation against every allocation there is; sensitivities against evaluations of whole models."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path

import pytest

from labkit import models
from labkit.models.allocate import Cost, Sensitivity, allocate, measure

GRIDS = ["int2 g64 asym", "int3 g64 asym", "int4 g64 asym"]


def problem(parts: int, seed: int) -> Sensitivity:
    """Random parts of unequal size; more bits cost less KL, mostly."""
    draw = random.Random(seed)
    costs, weights = {}, {}
    for index in range(parts):
        part, count = f"model.layers.{index}.*", draw.randrange(1, 9) * 64
        weights[part] = count
        scale = 10 ** draw.uniform(-4, 1)
        costs[part] = {
            spec: Cost(count * bits + 16 * count // 64, scale * 4.0**-bits * draw.uniform(0.3, 3))
            for bits, spec in enumerate(GRIDS, start=2)
        }
    return Sensitivity(costs, weights)


def every_allocation(sensitivity: Sensitivity) -> list[tuple[int, float]]:
    """(bits, KL) of all of them."""
    found = []
    for choice in itertools.product(*(costs.values() for costs in sensitivity.costs.values())):
        found.append((sum(cost.bits for cost in choice), math.fsum(cost.kl for cost in choice)))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_no_allocation_within_the_budget_is_better(seed: int) -> None:
    pytest.importorskip("scipy")
    sensitivity = problem(6, seed)
    count = sum(sensitivity.weights.values())
    every = every_allocation(sensitivity)
    assert len(every) == 3**6
    # The budgets of some allocations to the bit, and one bit less.
    for bits in sorted({bits for bits, _ in every})[:: len({bits for bits, _ in every}) // 5]:
        for budget in (bits, bits - 1):
            within = [kl for used, kl in every if used <= budget]
            if not within:
                with pytest.raises(ValueError, match="less than the smallest candidates take"):
                    allocate(sensitivity, budget / count)
                continue
            rules = allocate(sensitivity, budget / count)
            used, kl = sensitivity.predict(rules)
            assert kl == pytest.approx(min(within), rel=1e-9)
            assert used * count <= budget + 1e-6


def test_worked_by_hand() -> None:
    """100 weights each. 3 bits on average: the sensitive part gets 4 and the other 2, not 3 and 3."""
    pytest.importorskip("scipy")
    costs = {
        "a": {
            "int2 channel": Cost(200, 9.0),
            "int3 channel": Cost(300, 3.0),
            "int4 channel": Cost(400, 1.0),
        },
        "b": {
            "int2 channel": Cost(200, 1.5),
            "int3 channel": Cost(300, 0.5),
            "int4 channel": Cost(400, 0.1),
        },
    }
    sensitivity = Sensitivity(costs, {"a": 100, "b": 100}, method="rtn", options={"observer": "mse"})
    rules = allocate(sensitivity, 3.0)
    assert [(r.match, str(r.weight), r.method, r.options) for r in rules] == [
        ("a", "int4 channel", "rtn", {"observer": "mse"}),
        ("b", "int2 channel", "rtn", {"observer": "mse"}),
    ]
    assert sensitivity.predict(rules) == (3.0, 2.5)
    assert [str(r.weight) for r in allocate(sensitivity, 4.0)] == ["int4 channel"] * 2
    assert [str(r.weight) for r in allocate(sensitivity, 99)] == ["int4 channel"] * 2
    assert [str(r.weight) for r in allocate(sensitivity, 2.0)] == ["int2 channel"] * 2
    with pytest.raises(ValueError, match=r"budget of 1\.99 bits .* take, 2; raise it"):
        allocate(sensitivity, 1.99)
    with pytest.raises(ValueError, match="no sensitivities"):
        allocate(Sensitivity({}, {}), 3.0)


def test_more_bits_where_they_do_harm_are_not_taken() -> None:
    pytest.importorskip("scipy")
    costs = {"a": {"int2 channel": Cost(200, 0.1), "int4 channel": Cost(400, 0.2)}}
    assert str(allocate(Sensitivity(costs, {"a": 100}), 8.0)[0].weight) == "int2 channel"


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def protocol(tiny: models.Llama) -> models.Protocol:
    return models.protocol.build(tiny.tokenizer, 2, 48)


@pytest.fixture(scope="module")
def measured(tiny: models.Llama, protocol: models.Protocol) -> Sensitivity:
    return measure(tiny, GRIDS, by="block", protocol=protocol)


def test_a_sensitivity_is_the_kl_of_a_model_with_that_part_quantized(
    tiny: models.Llama, protocol: models.Protocol
) -> None:
    """By the longer way: a recipe for the part, quantize, evaluate."""
    layers = "model.layers.[13].*.[ov]*_proj"
    found = measure(tiny, GRIDS[:2], layers=layers, protocol=protocol, options={"observer": "mse"})
    assert list(found.costs) == [
        f"model.layers.{i}.self_attn.{part}_proj" for i in (1, 3) for part in ("v", "o")
    ]
    for part, costs in found.costs.items():
        for spec, cost in costs.items():
            rule = models.Rule(
                part,
                models.Recipe.parse(f"rules: [{{match: '*', weight: {spec}, method: rtn}}]")
                .rules[0]
                .weight,
                "rtn",
                {"observer": "mse"},
            )
            made = models.quantize(tiny, models.Recipe(rules=(rule,)))
            report = models.evaluate(made, tiny, protocol)
            assert cost.kl == pytest.approx(report.kl, rel=1e-3)
            assert cost.bits / found.weights[part] == pytest.approx(report.bits_per_weight)
    assert found.protocol == protocol.hash


def test_rules_make_a_recipe_of_the_predicted_size_and_nearly_the_predicted_kl(
    tiny: models.Llama, protocol: models.Protocol, measured: Sensitivity
) -> None:
    pytest.importorskip("scipy")
    assert list(measured.costs) == [f"model.layers.{i}.*" for i in range(4)]
    rules = allocate(measured, 3.3)
    assert len({str(rule.weight) for rule in rules}) > 1
    bits, kl = measured.predict(rules)
    made = models.quantize(tiny, models.Recipe(rules=rules, name="mixed"))
    report = models.evaluate(made, tiny, protocol)
    assert report.bits_per_weight == pytest.approx(bits) and bits <= 3.3
    assert kl == pytest.approx(report.kl, rel=0.35)  # they nearly add up
    assert models.Recipe.parse(str(made.made.recipe)).to_dict() == made.made.recipe.to_dict()
    # A pattern over all parts is a rule, too: uniform bits.
    everywhere = models.Recipe.load("w3a16-rtn-g64").rules[:1]
    uniform_bits, uniform_kl = measured.predict(everywhere)
    assert uniform_bits == pytest.approx(3 + 19 / 64)
    assert uniform_kl == pytest.approx(sum(costs[GRIDS[1]].kl for costs in measured.costs.values()))
    with pytest.raises(
        ValueError, match=r"model.layers.0.\*: expected a rule with one of the measured grids"
    ):
        measured.predict(rules[1:])


def test_measuring_goes_on_where_it_stopped(
    tiny: models.Llama,
    protocol: models.Protocol,
    measured: Sensitivity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, count = tmp_path / "sensitivity.json", 0
    save = Sensitivity.save

    def stop(self: Sensitivity, path: Path) -> None:
        nonlocal count
        count += 1
        save(self, path)
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sensitivity, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, GRIDS, by="block", protocol=protocol, file=file)
    assert sum(map(len, Sensitivity.from_file(file).costs.values())) == 5
    again = measure(tiny, GRIDS, by="block", protocol=protocol, file=file)
    assert count == 12
    assert again == measured == Sensitivity.from_file(file)
    with pytest.raises(ValueError, match="another model, candidates, protocol or version"):
        measure(tiny, GRIDS[:2], by="block", protocol=protocol, file=file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no measured sensitivities"):
        measure(tiny, GRIDS, by="block", protocol=protocol, file=file)


def test_measuring_leaves_the_model_alone_and_says_what_it_cannot_do(tiny: models.Llama) -> None:
    weights = {name: linear.weight for name, linear in tiny.linears().items()}
    head = measure(
        tiny, ["int4 channel"], layers="lm_head", protocol=models.protocol.build(tiny.tokenizer, 1, 16)
    )
    assert 0 < head.costs["lm_head"]["int4 channel"].kl < 1
    for name, linear in tiny.linears().items():
        assert linear.weight is weights[name], name
    for arguments, says in [
        ((["int4 g64"], {"method": "gptq"}), "'gptq' needs statistics"),
        ((["int4 g64"], {"by": "model"}), "found 1 and 'model'"),
        (([], {}), "found 0 and 'layer'"),
        ((["table4 channel"], {}), "table4 has no table yet"),
        ((["int4 g64"], {"layers": "encoder.*"}), "matches no linear layer"),
    ]:
        with pytest.raises(ValueError, match=says):
            measure(tiny, arguments[0], **arguments[1])


def test_the_command_keeps_how_it_was_measured_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from labkit.cli import app

    out = tmp_path / "found.json"
    command = [
        "bench",
        "sensitivity",
        "--model",
        "tiny",
        "--by",
        "block",
        "--grid",
        "int3 g64",
        "--out",
        str(out),
    ]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.exit_code == 0 and "parts on 1 grids" in first.stdout
    found = Sensitivity.from_file(out)
    assert set(found.costs) == {f"model.layers.{i}.*" for i in range(len(models.load("tiny").blocks))}
    words = "labkit bench sensitivity --out found.json --by block --seed 0 --grid 'int3 g64' --model tiny"
    assert found.about["command"] == words and found.about["versions"]["labkit"]

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sys.modules["labkit.models.allocate"], "score", never)
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert Sensitivity.from_file(out).costs == found.costs
