"""Recipes: what YAML is taken, which rule wins, and what the expansion says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labkit.models.kv import KVSpec
from labkit.models.recipe import Calibration, Recipe, Rule, names
from labkit.quant import METHODS, QuantSpec

LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
] + ["lm_head"]

SHIPPED = {  # name: (spec, method, act_order), as the name says
    "w8a16-rtn-channel": ("int8 channel", "rtn", None),
    "w4a16-rtn-channel": ("int4 channel asym", "rtn", None),
    "w4a16-rtn-g64": ("int4 g64 asym", "rtn", None),
    "w4a16-gptq-g64": ("int4 g64 asym", "gptq", False),
    "w4a16-gptq-g64-actorder": ("int4 g64 asym", "gptq", True),
    "w3a16-rtn-g64": ("int3 g64 asym", "rtn", None),
    "w3a16-gptq-g64": ("int3 g64 asym", "gptq", False),
    "w3a16-adaround-g64": ("int3 g64 asym", "adaround", None),
    "w4a16-awq-g64": ("int4 g64 asym", "rtn_clip", None),
    "w3a16-awq-g64": ("int3 g64 asym", "rtn_clip", None),
    "w4a16-rotate-rtn-g64": ("int4 g64 asym", "rtn", None),
    "w3a16-rotate-rtn-g64": ("int3 g64 asym", "rtn", None),
    "w4a16-rotate-gptq-g64": ("int4 g64 asym", "gptq", False),
    "w3a16-rotate-gptq-g64": ("int3 g64 asym", "gptq", False),
    "w4a16-hqq-g64": ("int4 g64 asym-float", "hqq", None),
    "w3a16-hqq-g64": ("int3 g64 asym-float", "hqq", None),
    "w4a16-kmeans-g64": ("table4 g64", "kmeans", None),
    "w3a16-kmeans-g64": ("table3 g64", "kmeans", None),
    "w4a16-quantile-g64": ("table4 g64", "quantile", None),
    "w3a16-quantile-g64": ("table3 g64", "quantile", None),
    "w4a16-squeezellm-g64": ("table4 g64", "squeezellm", None),
    "w3a16-squeezellm-g64": ("table3 g64", "squeezellm", None),
    "w3a16-squeezellm-channel": ("table3 tensor", "squeezellm", None),
    "w4a16-nf4-b64": ("nf4 b64 scale=(dynamic8 b256 mean scale=fp32)", "rtn", None),
    "w4a16-mxfp4-g32": ("fp4_e2m1 g32 scale=e8m0", "rtn", None),
    "w4a16-nvfp4-g16": ("fp4_e2m1 g16 scale=(fp8_e4m3 tensor scale=fp32)", "rtn", None),
}
ROUNDED = {  # what is multiplied is rounded too: (spec, method, input, the head's spec)
    "w4a8-rtn-g32": ("int4 g32 asym", "rtn", "int8 g32 narrow scale=fp32", "int8 g64"),
    "w4a8-gptq-g64": ("int4 g64 asym", "gptq", "int8 g32 narrow scale=fp32", "int8 g64"),
    "w8a8-rtn-channel": ("int8 channel narrow", "rtn", "int8 channel narrow scale=fp32", None),
}
TRANSFORM = {"awq": "awq_scale", "rotate": "rotate"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_does_what_its_name_says(name: str) -> None:
    recipe = Recipe.load(name)
    spec, method, act_order = SHIPPED[name]
    plan = recipe.plan(LAYERS)
    assert recipe.name == name
    assert list(plan) == LAYERS[:-1]  # the head is left alone
    assert {str(rule.weight) for rule in plan.values()} == {spec}
    assert {rule.method for rule in plan.values()} == {method}
    assert plan[LAYERS[0]].options.get("act_order") == act_order
    words = name.split("-")
    assert [step.name for step in recipe.transforms] == [TRANSFORM[w] for w in words if w in TRANSFORM]


@pytest.mark.parametrize("name", ROUNDED)
def test_a_shipped_recipe_rounds_activations_where_its_name_says(name: str) -> None:
    spec, method, input, head = ROUNDED[name]
    plan = Recipe.load(name).plan(LAYERS)
    layers, heads = [plan[layer] for layer in LAYERS[:-1]], [plan[n] for n in plan if n == "lm_head"]
    assert {(str(rule.weight), rule.method, str(rule.input)) for rule in layers} == {(spec, method, input)}
    assert [(str(rule.weight), rule.method, str(rule.input)) for rule in heads] == [(head, "rtn", input)] * bool(head)


def test_names_lists_what_ships() -> None:
    assert set(names()) >= {*SHIPPED, *ROUNDED}


def test_the_expansion_says_what_is_rounded() -> None:
    text = str(Recipe.load("w4a8-rtn-g32"))
    assert "  input: int8 g32 narrow scale=fp32  # of each token, each row, 32 columns share one fp32 scale" in text
    assert "activations are quantized where a rule names their input" in text
    assert "kv: {key: fp16, value: fp16}  # what keys and values are kept in" in text
    assert Recipe.parse(text).kv == KVSpec("fp16", "fp16") and str(Recipe.parse(text)) == text
    text = text.replace("value: fp16", "value: int4  g32  asym")
    again = str(Recipe.parse(text))
    assert "kv: {key: fp16, value: int4 g32 asym}  #" in again
    assert Recipe.parse(again).kv == Recipe.parse(text).kv == KVSpec("fp16", "int4 g32 asym")
    assert Recipe.from_dict(Recipe.parse(text).to_dict()) == Recipe.parse(text)


def test_the_first_rule_that_matches_wins() -> None:
    recipe = Recipe.parse(
        """
        rules:
          - {match: "*.1.*.q_proj", weight: keep}
          - {match: "*.q_proj", weight: int8 channel, method: rtn}
          - {match: "model.layers.*", weight: int4 g64, method: rtn}
        """
    )
    plan = recipe.plan(LAYERS)
    found = {name: str(rule.weight) for name, rule in plan.items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": "int8 channel",
        "model.layers.0.self_attn.o_proj": "int4 g64",
        "model.layers.0.mlp.down_proj": "int4 g64",
        "model.layers.1.self_attn.o_proj": "int4 g64",
        "model.layers.1.mlp.down_proj": "int4 g64",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_the_expansion_is_the_recipe_again(name: str) -> None:
    recipe = Recipe.load(name)
    again = Recipe.parse(str(recipe))
    assert again.to_dict() == recipe.to_dict()
    assert str(again) == str(recipe)
    assert Recipe.from_dict(recipe.to_dict()) == again


def test_the_expansion_leaves_nothing_open() -> None:
    text = str(Recipe.load("w4a16-gptq-g64"))
    for said in (
        r"weight: int4 g64 asym +# each row, 64 columns share one fp16 scale; one zero point, an integer",
        r"act_order: false",
        r"damp: 0.01",
        r"static_groups: false",
        r"observer: minmax",
        r"windows: 32, tokens: 256",
        r"match: lm_head\n  weight: keep",
        r"match: model.embed_tokens\n  weight: keep",
        r"activations are not quantized",
    ):
        assert re.search(said, text), f"{said} is missing from\n{text}"
    assert "symmetric, no zero point" in str(Recipe.load("w8a16-rtn-channel"))
    assert "not used" in str(Recipe.load("w8a16-rtn-channel"))  # the calibration, of a method without


def test_the_expansion_of_transforms_leaves_nothing_open() -> None:
    text = str(Recipe.load("w4a16-awq-g64"))
    assert re.search(r"^transforms:.*\n- name: awq_scale\n  options:\n    steps: 20\nrules:", text, re.M), (
        text
    )
    assert "not used" not in text
    text = str(Recipe.load("w4a16-rotate-rtn-g64"))
    assert re.search(r"^transforms:.*\n- name: rotate\n  options:\n    seed: 0\nrules:", text, re.M), text
    assert "not used" in text
    assert "transforms" not in str(Recipe.load("w4a16-rtn-g64"))


def test_text_is_used_where_only_a_transform_looks_at_it() -> None:
    rules = "rules: [{match: '*', weight: int4 g64, method: rtn}]"
    assert Recipe.parse(f"transforms: [{{name: awq_scale}}]\n{rules}").calibrated
    assert not Recipe.parse(f"transforms: [{{name: rotate}}]\n{rules}").calibrated


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ("[{name: rotat}]", "no transform 'rotat'; there is awq_scale, rotate"),
        ("[{name: rotate, options: {sead: 1}}]", "transform 'rotate' has no option sead; it takes seed"),
        ("[{name: awq_scale, options: {model: 1}}]", "no option model; it takes steps"),
        ("[{name: rotate}, {name: awq}]", "no transform 'awq'"),
        ("rotate", "transforms must be a list, found 'rotate'"),
        ("[rotate]", "transform 1: expected a mapping"),
        ("[{name: 3}]", "transform 1: name must be a text, found 3"),
        ("[{options: {}}]", "transform 1: name missing"),
        ("[{name: rotate}, {name: rotate, seed: 1}]", "transform 2: unknown key 'seed'"),
        ("[{name: rotate, options: 3}]", "transform 1: options must be a mapping"),
    ],
)
def test_a_bad_transform_is_refused_before_the_work(transforms: str, says: str) -> None:
    text = f"transforms: {transforms}\nrules: [{{match: '*', weight: int4 g64, method: rtn}}]"
    with pytest.raises(ValueError, match=says):
        Recipe.parse(text).plan(LAYERS)


def test_the_expansion_takes_defaults_from_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(weight, spec, stats=None, *, damp=0.5, steps=7):  # type: ignore[no-untyped-def]
        raise AssertionError

    monkeypatch.setitem(METHODS, "gptq", other)
    recipe = Recipe(rules=(Rule("*", QuantSpec.parse("int4 g64"), "gptq", {"damp": 0.25}),))
    assert recipe.to_dict()["rules"][0]["options"] == {"damp": 0.25, "steps": 7}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [", "not valid YAML"),
        ("", "expected a mapping"),
        ("- a", "expected a mapping"),
        ("rules: []", "at least one rule"),
        ("rule: 1", "unknown key 'rule'; known are calibration, kv, name, rules, train, transforms"),
        ("name: x", "rules missing"),
        ("rules: [{match: '*', weight: int9 g64, method: rtn}]", "rule 1: .*int9"),
        ("rules: [{match: '*', weight: int4 gg, method: rtn}]", "rule 1: .*gg"),
        ("rules: [{match: '*', weight: 4, method: rtn}]", "weight must be a text, found 4"),
        ("rules: [{match: '*', weight: int4 g64}]", "come together"),
        ("rules: [{match: '*', weight: keep, method: rtn}]", "come together"),
        ("rules: [{match: '*', weight: keep, options: {damp: 1}}]", "leaves its layers alone"),
        ("rules: [{match: '*', wieght: keep}]", "unknown key 'wieght'"),
        ("rules: [{weight: keep}]", "match missing"),
        ("rules: [{match: '*', weight: int4 g64, method: rtn, options: 3}]", "options must be a mapping"),
        ("rules: [{match: '*', weight: keep}]\nrules: []", "'rules' stands twice"),
        ("calibration: {windows: 0}\nrules: [{match: '*', weight: keep}]", "windows must be a positive"),
        ("calibration: {windows: true}\nrules: [{match: '*', weight: keep}]", "windows must be a positive"),
        ("calibration: {window: 1}\nrules: [{match: '*', weight: keep}]", "unknown key 'window'"),
        ("name: 3\nrules: [{match: '*', weight: keep}]", "name must be a text"),
        ("rules: [{match: '*', weight: keep, input: int8 g32}]", "leaves its layers alone, yet has the input"),
        ("rules: [{match: '*', weight: int4 g64, method: rtn, input: 8}]", "input must be a text, found 8"),
        ("rules: [{match: '*', weight: int4 g64, method: rtn, input: int9}]", "rule 1: .*int9"),
        ("rules: [{match: '*', weight: int4 g64, method: rtn, input: int8 tensor}]", "tokens of different texts"),
        ("rules: [{match: '*', weight: int4 g64, method: rtn, input: int8 b64}]", "tokens of different texts"),
        ("kv: {key: fp8}\nrules: [{match: '*', weight: keep}]", "kv.key must be one of fp32, fp16, bf16 or a spec"),
        ("kv: {keys: fp16}\nrules: [{match: '*', weight: keep}]", "kv: unknown key 'keys'"),
    ],
)
def test_bad_yaml_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Recipe.parse(text, where="mine.yaml")
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("{match: '*', weight: int4 g64, method: rtm}", "asks for method 'rtm'; there is .*gptq, .*rtn"),
        (
            "{match: '*', weight: int4 g64, method: gptq, options: {dmap: 1}}",
            "no option dmap; it takes act_order",
        ),
        ("{match: layers.0, weight: int4 g64, method: rtn}", "matches no linear layer"),
        ("{match: '*', weight: int4 g64, method: kmeans}", "rule '\\*': codebooks are learned for table2"),
        ("{match: '*', weight: table4 b64, method: kmeans}", "flat runs know no rows"),
        ("{match: '*', weight: table4 g64, method: gptq}", "table4 has no table yet"),
        ("{match: '*', weight: int4 g64 asym, method: hqq}", "zero points that are real numbers"),
        ("{match: '*', weight: int4 g64 asym-float, method: hqq, options: {p: 2}}", "0 < p <= 1"),
        ("{match: '*', weight: keep}", "quantizes no layer"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_the_work(rules: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe.parse(f"rules: [{rules}]").plan(LAYERS)


def test_files_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("calibration: {windows: 3}\nrules: [{match: '*', weight: nf4 b64, method: rtn}]")
    recipe = Recipe.load(path)
    assert recipe.name == "mine"
    assert recipe.calibration == Calibration(windows=3, tokens=256)
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        Recipe.load(tmp_path / "other.yaml")
    with pytest.raises(FileNotFoundError, match="w4a16-gptq-g64"):
        Recipe.load("w4a16-gtpq-g64")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        Recipe.load(path)
