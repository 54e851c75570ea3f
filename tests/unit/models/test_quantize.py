"""quantize: which layers, in which order, on which inputs, and what it leaves alone."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from labkit import models
from labkit.kernels.columns import faster
from labkit.models.calibrate import shared_copy
from labkit.quant import METHODS, QuantizedTensor, Stats, gptq, rtn

SMALL = "calibration: {windows: 2, tokens: 32}\nrules:\n"


def small(*rules: str) -> models.Recipe:
    return models.Recipe.parse(SMALL + "".join(f"  - {{{rule}}}\n" for rule in rules))


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


def hessians_by_brute_force(model: models.Llama, tokens: Tensor, propagate: bool) -> dict[str, Tensor]:
    """For each linear in turn: run the whole model on the text, look at its input, then quantize it.

    A pass for every layer, a window at a time; nothing is shared between layers and nothing is remembered.
    """
    running, found = shared_copy(model), {}
    linears = running.linears()
    for name in [n for n in linears if n != "lm_head"]:
        seen: list[Tensor] = []
        hook = linears[name].register_forward_pre_hook(
            lambda _, args, s=seen: s.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            for window in tokens:
                running(window[None])
        hook.remove()
        x = torch.cat(seen).double()
        found[name] = x.T @ x / len(x)
        if propagate:
            linears[name].weight = rtn(linears[name].weight, SPEC).dequantize()
    return found


SPEC = models.Recipe.parse("rules: [{match: '*', weight: int2 g64 asym, method: rtn}]").rules[0].weight


@pytest.mark.parametrize("propagate", [True, False])
def test_each_layer_sees_what_the_quantized_layers_before_it_make_of_the_text(
    tiny: models.Llama, propagate: bool
) -> None:
    seen: dict[int, Tensor] = {}

    # Rounds coarsely, so that the layers behind it see other inputs, and remembers what it was given.
    def spy(weight: Tensor, spec: object, stats: Stats | None = None) -> QuantizedTensor:
        assert stats is not None
        seen[len(seen)] = stats.hessian
        return rtn(weight, SPEC)

    spy.needs = frozenset({"hessian"})  # type: ignore[attr-defined]
    recipe = small("match: 'model.layers.*', weight: int2 g64 asym, method: spy")
    models.quantize(tiny, recipe, seed=3, propagate=propagate, methods={"spy": spy})
    tokens = models.calibration_windows(tiny.tokenizer, 2, 32, seed=3)
    expected = hessians_by_brute_force(tiny, tokens, propagate)
    other = hessians_by_brute_force(tiny, tokens, not propagate)
    assert len(seen) == len(expected) == 7 * tiny.config.layers
    for mine, (name, theirs) in zip(seen.values(), expected.items(), strict=True):
        torch.testing.assert_close(
            mine.double(), theirs, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    # and the two orders are not the same thing, already inside the first decoder layer:
    o_proj = "model.layers.0.self_attn.o_proj"
    assert not torch.allclose(expected[o_proj], other[o_proj], rtol=1e-2)


def test_the_original_is_not_changed_and_what_is_left_alone_is_shared(tiny: models.Llama) -> None:
    weights = {name: linear.weight for name, linear in tiny.linears().items()}
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    result = models.quantize(tiny, small("match: '*.0.mlp.*', weight: int4 g64 asym, method: gptq"))
    for name, linear in tiny.linears().items():
        assert linear.weight is weights[name], name
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert tiny.made is None
    for name, linear in result.linears().items():
        if ".0.mlp." in name:
            assert isinstance(linear.weight, QuantizedTensor), name
        else:
            assert linear.weight is weights[name], name


def test_rtn_layers_are_rtn_of_the_weights(tiny: models.Llama) -> None:
    result = models.quantize(tiny, "w4a16-rtn-g64")
    for name, linear in result.linears().items():
        if name == "lm_head":
            continue
        assert isinstance(linear.weight, QuantizedTensor)
        expected = rtn(tiny.linears()[name].weight, models.Recipe.load("w4a16-rtn-g64").rules[0].weight)
        assert torch.equal(linear.weight.codes, expected.codes)


def test_gptq_gets_the_hessian_of_the_layer_and_the_options(tiny: models.Llama) -> None:
    recipe = small(
        "match: 'model.layers.0.self_attn.q_proj', weight: int3 g64, method: gptq, options: {damp: 0.1}"
    )
    result = models.quantize(tiny, recipe, seed=1)
    name = "model.layers.0.self_attn.q_proj"
    tokens = models.calibration_windows(tiny.tokenizer, 2, 32, seed=1)
    stats = models.hessians(tiny, tokens, name)[name]
    weight = tiny.linears()[name].weight
    found = result.linears()[name].weight
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(found.codes, faster(gptq)(weight, found.spec, stats, damp=0.1).codes)
    assert not torch.equal(found.codes, faster(gptq)(weight, found.spec, stats, damp=1.0).codes)


def test_gptq_takes_an_update_of_ones_own(tiny: models.Llama) -> None:
    def update(right: Tensor, err: Tensor, row: Tensor) -> Tensor:
        seen.append(right.shape)
        return right - torch.outer(err, row)

    seen: list[torch.Size] = []
    name = "model.layers.0.self_attn.q_proj"
    recipe = small(f"match: '{name}', weight: int3 g64, method: gptq")
    [rule, *rest] = recipe.rules
    mine = replace(recipe, rules=(replace(rule, options={"update": update}), *rest))
    found, plain = (models.quantize(tiny, r).linears()[name].weight for r in (mine, recipe))
    assert seen and (found.codes != plain.codes).float().mean() < 0.01


def test_the_seed_chooses_the_calibration_text(tiny: models.Llama) -> None:
    recipe = small("match: '*.0.*.q_proj', weight: int3 g64 asym, method: gptq")

    def codes(seed: int) -> Tensor:
        weight = (
            models.quantize(tiny, recipe, seed=seed).linears()["model.layers.0.self_attn.q_proj"].weight
        )
        assert isinstance(weight, QuantizedTensor)
        return weight.codes

    assert torch.equal(codes(0), codes(0))
    assert not torch.equal(codes(0), codes(1))


def test_a_learners_own_update_makes_the_checkpoint(tiny: models.Llama) -> None:
    calls = 0

    def update(right: Tensor, error: Tensor, row: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return right - torch.outer(error, row)

    def mine(weight, spec, stats=None, **options):  # type: ignore[no-untyped-def]
        return gptq(weight, spec, stats, update=update, **options)

    name = "model.layers.0.self_attn.o_proj"
    recipe = small(f"match: {name}, weight: int4 g64 asym, method: gptq")
    theirs = models.quantize(tiny, recipe, methods={**METHODS, "gptq": mine}).linears()[name].weight
    ours = models.quantize(tiny, recipe).linears()[name].weight
    plain = (
        models.quantize(tiny, small(f"match: {name}, weight: int4 g64 asym, method: rtn"))
        .linears()[name]
        .weight
    )
    assert calls > 0
    # A last bit of float32 may tip a weight to the other side; the method is the same, and is not RTN.
    assert (theirs.codes == ours.codes).double().mean() > 0.98
    assert (theirs.codes == plain.codes).double().mean() < 0.9


def test_the_head_can_be_quantized_and_the_embedding_stays(tiny: models.Llama) -> None:
    result = models.quantize(tiny, small("match: lm_head, weight: int8 channel, method: gptq"))
    assert isinstance(result.lm_head.weight, QuantizedTensor)
    assert result.model.embed_tokens.weight is tiny.model.embed_tokens.weight
    tokens = models.calibration_windows(tiny.tokenizer, 1, 32, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(result(tokens), tiny(tokens), rtol=0.05, atol=0.5)


def test_interrupting_changes_nothing(tiny: models.Llama) -> None:
    weights = {name: linear.weight for name, linear in tiny.linears().items()}

    def late(weight: Tensor, spec: object, stats: Stats | None = None) -> QuantizedTensor:
        if weight.shape[1] != tiny.config.hidden_size:
            raise KeyboardInterrupt
        return rtn(weight, SPEC)

    late.needs = frozenset({"hessian"})  # type: ignore[attr-defined]
    recipe = small("match: 'model.layers.*', weight: int2 g64 asym, method: late")
    with pytest.raises(KeyboardInterrupt):
        models.quantize(tiny, recipe, methods={"late": late})
    for name, linear in tiny.linears().items():
        assert linear.weight is weights[name]
        assert not linear._forward_pre_hooks


def test_mistakes_are_named(tiny: models.Llama) -> None:
    recipe = small("match: '*.q_proj', weight: int4 g64, method: bad")
    for bad, says in [
        (
            lambda weight, spec, stats=None: weight,
            "q_proj: method 'bad' must return a QuantizedTensor .* Parameter",
        ),
        (
            lambda weight, spec, stats=None: rtn(weight[:8], spec),
            r"shape \(256, 128\), returned .* \(8, 128\)",
        ),
        (
            lambda weight, spec, stats=None: rtn(weight * torch.nan, spec),
            "0.self_attn.q_proj: method 'bad' failed",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            models.quantize(tiny, recipe, methods={"bad": bad})
    once = models.quantize(tiny, small("match: '*.q_proj', weight: int4 g64, method: rtn"))
    with pytest.raises(ValueError, match="quantized already"):
        models.quantize(once, "w4a16-rtn-g64")
    with pytest.raises(FileNotFoundError, match="w4a16-gptq-g64"):
        models.quantize(tiny, "w4a16")


def test_the_fisher_reaches_the_methods_that_need_it(tiny: models.Llama) -> None:
    """Each layer's own, of the model as it came, and together with a Hessian where both are needed."""
    tokens = models.calibration_windows(tiny.tokenizer, 2, 32, seed=4)
    wanted = models.fisher(tiny, tokens)
    seen: dict[int, Stats] = {}

    def spy(weight: Tensor, spec: object, stats: Stats | None = None) -> QuantizedTensor:
        assert stats is not None
        seen[id(weight)] = stats
        return rtn(weight, SPEC)

    spy.needs = frozenset({"fisher"})  # type: ignore[attr-defined]
    both = lambda weight, spec, stats=None: spy(weight, spec, stats)  # noqa: E731
    both.needs = frozenset({"fisher", "hessian"})
    recipe = small(
        "match: '*.q_proj', weight: int2 g64 asym, method: both",
        "match: 'model.layers.*', weight: int2 g64 asym, method: spy",
    )
    models.quantize(tiny, recipe, seed=4, methods={"spy": spy, "both": both})
    linears = tiny.linears()
    assert len(seen) == len(wanted) == len(linears) - 1
    for name, fisher in wanted.items():
        stats = seen[id(linears[name].weight)]
        assert stats.fisher is not None
        torch.testing.assert_close(stats.fisher, fisher)
        assert bool(stats.hessian.any()) == name.endswith("q_proj")
        assert (stats.samples == 2 * 32) == name.endswith("q_proj")
    assert all(not p.requires_grad for p in tiny.parameters())


@pytest.mark.parametrize(
    "recipe",
    ["w4a16-hqq-g64", "w3a16-kmeans-g64", "w3a16-quantile-g64", "w4a16-nf4-b64", "w4a16-nvfp4-g16"],
)
def test_shipped_recipes_of_other_grids_run(tiny: models.Llama, recipe: str) -> None:
    made = models.quantize(tiny, recipe)
    tokens = models.calibration_windows(tiny.tokenizer, 1, 32, seed=0)
    with torch.no_grad():
        kept, changed = tiny(tokens), made(tokens)
    assert 0 < float((kept - changed).norm() / kept.norm()) < 0.5
    assert 3 < models.sizes(made)[0] < 4.6


def test_a_damaged_weight_is_found_before_the_work() -> None:
    model = models.load("tiny")
    last = list(model.linears())[-2]
    weight = model.linears()[last].weight.detach().clone()
    weight[0, 0] = torch.nan
    model.linears()[last].weight = weight

    def never(weight: Tensor, spec: object, stats: Stats | None = None) -> QuantizedTensor:
        raise AssertionError("work was begun")

    recipe = small("match: 'model.layers.*', weight: int4 g64, method: never")
    with pytest.raises(ValueError, match=f"{last}.weight holds NaN"):
        models.quantize(model, recipe, methods={"never": never})


def test_it_remembers_how_it_was_made(tiny: models.Llama) -> None:
    made = models.quantize(tiny, "w4a16-rtn-g64", seed=5).made
    assert made is not None
    assert (made.model, made.model_seed, made.seed, made.propagate) == ("tiny", None, 5, True)
    assert made.recipe == models.Recipe.load("w4a16-rtn-g64")


def test_the_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(models.quantize).parameters
    assert list(parameters) == ["model", "recipe", "seed", "propagate", "methods", "state", "progress"]
