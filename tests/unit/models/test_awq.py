"""AWQ's scales: the search against a brute force on the inputs themselves, and what the folds leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit import models
from labkit.models import ModelStats, awq_scale, rotate
from labkit.models.awq import search_scale
from labkit.models.calibrate import shared_copy
from labkit.models.fold import sites
from labkit.models.llama import Llama
from labkit.quant import QuantSpec, rtn

from .conftest import random_llama

SPEC = QuantSpec.parse("int3 g16 asym")
# producer: its readers, in layer i
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def lopsided(**changes: object) -> Llama:
    """A random model in which some channels of every site are much larger than others."""
    model = random_llama(**changes)
    for name, tensor in model.state_dict().items():
        if "layernorm" in name or "up_proj.weight" in name or "v_proj.weight" in name:
            factor = torch.logspace(-1, 1, len(tensor))[torch.randperm(len(tensor), generator=seeded())]
            tensor.mul_(factor if tensor.dim() == 1 else factor[:, None])
    return model


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def grids(model: Llama) -> dict[str, QuantSpec]:
    return {name: SPEC for name in model.linears() if name != "lm_head"}


def inputs_of(model: Llama, tokens: Tensor) -> dict[str, Tensor]:
    """What each linear reads, (samples, in), by a pass of the whole model."""
    seen: dict[str, Tensor] = {}
    running = shared_copy(model)
    for name, linear in running.linears().items():
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
    with torch.no_grad():
        running(tokens)
    return seen


def best_by_brute_force(weights: list[Tensor], x: Tensor, s_x: Tensor, heads: int) -> tuple[float, Tensor]:
    """The alpha with the least squared error of the outputs on ``x``, and its s per column."""
    tried = []
    for alpha in [i / 20 for i in range(21)]:
        s = s_x**alpha
        s = s / (s.max() * s.min()).sqrt()
        s = s.view(-1, 16).repeat_interleave(heads, dim=0).flatten() if heads > 1 else s
        outputs = [rtn(w * s, SPEC).dequantize() @ (x / s).T - w @ x.T for w in weights]
        tried.append((sum(float(o.double().square().sum()) for o in outputs), alpha, s))
    _, alpha, s = min(tried, key=lambda t: t[0])
    return alpha, s


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("producer", READERS)
def test_the_scales_are_the_best_of_a_brute_force(producer: str, layer: int, tokens: Tensor) -> None:
    model = lopsided()
    old, x = {n: t.clone() for n, t in model.state_dict().items()}, inputs_of(model, tokens)
    awq_scale(model, ModelStats(tokens, grids(model)))
    names = [f"model.layers.{layer}.{reader}" for reader in READERS[producer]]
    seen = x[names[0]]
    s_x = seen.abs().mean(dim=0)  # per column
    heads = 3 if producer == "self_attn.v_proj" else 1
    if heads > 1:  # columns are KV head, query head of it, channel
        s_x = s_x.view(2, 3, 16).mean(dim=1).flatten()
    alpha, s = best_by_brute_force([old[f"{n}.weight"] for n in names], seen, s_x, heads)
    assert alpha > 0
    rows = {  # v and up also hand on what they read: their own rows, scaled by their own site
        name: torch.ones(1) for name in names
    }
    for name in names:
        if name.endswith(("v_proj", "up_proj")):
            rows[name] = model.state_dict()[f"{name}.weight"][:, :1] / (old[f"{name}.weight"] * s)[:, :1]
        torch.testing.assert_close(
            model.state_dict()[f"{name}.weight"],
            old[f"{name}.weight"] * s * rows[name],
            rtol=1e-4,
            atol=1e-6,
        )


def test_every_alpha_from_0_to_1_can_win_and_0_wins_a_tie() -> None:
    generator, found = seeded(), set()
    site = sites(random_llama())["model.layers.0.mlp.up_proj"]
    for _ in range(20):
        weight = torch.randn(8, 64, generator=generator)
        x = torch.randn(20, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
        alpha, s = best_by_brute_force([weight], x, x.abs().mean(dim=0), 1)
        found.add(alpha)
        torch.testing.assert_close(search_scale([(weight, SPEC)], x, site), s, rtol=1e-4, atol=1e-6)
    # one small column with a fivefold input can grow as far as s allows without widening its group's range
    weight, x = torch.randn(512, 64, generator=generator), torch.eye(64)
    weight[:, 0], x[0, 0] = 0.3 * torch.rand(512, generator=generator), 5.0
    alpha, s = best_by_brute_force([weight], x, x.abs().mean(dim=0), 1)
    torch.testing.assert_close(search_scale([(weight, SPEC)], x, site), s, rtol=1e-4, atol=1e-6)
    assert alpha == 1.0 and len(found) > 5, (alpha, found)
    tie = search_scale([(torch.zeros(8, 64), SPEC)], torch.randn(20, 64, generator=generator), site)
    assert torch.equal(tie, torch.ones(64))


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {"qk_norm": True}]
)
def test_the_function_stays(options: dict, tokens: Tensor) -> None:
    model = lopsided(**options)
    before = model(tokens)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert awq_scale(model, ModelStats(tokens, grids(model))) is model
    assert (model(tokens) - before).abs().max() < 5e-4 * before.abs().max()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, old[n])}
    assert {n for n in changed if n.endswith("q_proj.weight")} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    assert not {n for n in changed if "embed" in n or "lm_head" in n or n == "model.norm.weight"}


def test_no_layer_reads_its_text_worse_and_most_better(tokens: Tensor) -> None:
    model = lopsided()
    scaled = awq_scale(shared_copy(model), ModelStats(tokens, grids(model)))
    before, after = inputs_of(model, tokens), inputs_of(scaled, tokens)
    ratios = []
    for name in grids(model):
        errors = []
        for which, x in ((scaled, after), (model, before)):
            w = which.linears()[name].weight
            out = x[name] @ w.T
            errors.append(float((x[name] @ rtn(w, SPEC).dequantize().T - out).norm() / out.norm()))
        ratios.append(errors[0] / errors[1])
    assert sum(r < 0.97 for r in ratios) > len(ratios) / 2, ratios


def test_readers_that_are_not_quantized_do_not_count(tokens: Tensor) -> None:
    model = lopsided()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    only = {"model.layers.1.self_attn.k_proj": SPEC}
    awq_scale(model, ModelStats(tokens, only))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, old[n])}
    site = "model.layers.1."
    assert changed == {f"{site}input_layernorm.weight"} | {
        f"{site}self_attn.{part}_proj.weight" for part in "qkv"
    }
    k = old[f"{site}self_attn.k_proj.weight"]
    again = lopsided()
    seen = inputs_of(again, tokens)[f"{site}self_attn.k_proj"]
    _, s = best_by_brute_force([k], seen, seen.abs().mean(dim=0), 1)
    torch.testing.assert_close(model.state_dict()[f"{site}self_attn.k_proj.weight"], k * s)
    untouched = lopsided()
    awq_scale(untouched, ModelStats(tokens))
    assert all(torch.equal(t, old[n]) for n, t in untouched.state_dict().items())


def test_a_silent_channel_is_not_erased(tokens: Tensor) -> None:
    model = lopsided()
    model.blocks[0].input_layernorm.weight.data[3] = 0.0
    before = model(tokens)
    awq_scale(model, ModelStats(tokens, grids(model)))
    assert (model(tokens) - before).abs().max() < 5e-4 * before.abs().max()
    assert bool(model.linears()["model.layers.0.self_attn.q_proj"].weight[:, 3].abs().sum() > 0)
    model.blocks[1].mlp.up_proj.weight = torch.zeros(64, 48)  # nothing at all reaches down
    awq_scale(model, ModelStats(tokens, grids(model)))
    assert bool(model(tokens).isfinite().all())


def test_after_a_rotation_what_stands_before_down_is_left_out(tokens: Tensor) -> None:
    model = rotate(lopsided())
    before = model(tokens)
    old = model.linears()["model.layers.0.mlp.down_proj"].weight.clone()
    awq_scale(model, ModelStats(tokens, grids(model)))
    assert (model(tokens) - before).abs().max() < 5e-4 * before.abs().max()
    assert torch.equal(model.linears()["model.layers.0.mlp.down_proj"].weight, old)


def test_mistakes_are_named(tokens: Tensor) -> None:
    model = random_llama()
    with pytest.raises(ValueError, match="needs stats"):
        awq_scale(model)
    for steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match="steps must be a positive whole number"):
            awq_scale(model, ModelStats(tokens, grids(model)), steps=steps)
    linear = model.linears()["model.layers.0.self_attn.o_proj"]
    linear.weight = rtn(linear.weight, SPEC)
    with pytest.raises(ValueError, match=r"o_proj is quantized already"):
        awq_scale(model, ModelStats(tokens, grids(model)))


def test_a_recipe_scales_first_and_leaves_the_original_alone() -> None:
    tiny = models.load("tiny")
    kept = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    recipe = models.Recipe.parse(
        """
        calibration: {windows: 2, tokens: 32}
        transforms: [{name: awq_scale, options: {steps: 4}}]
        rules: [{match: "*.down_proj", weight: int3 g64 asym, method: rtn}]
        """
    )
    made = models.quantize(tiny, recipe, seed=5)
    assert all(torch.equal(t, kept[n]) for n, t in tiny.state_dict().items())
    tokens = models.calibration_windows(tiny.tokenizer, 2, 32, seed=5)
    spec = QuantSpec.parse("int3 g64 asym")
    names = [n for n in tiny.linears() if n.endswith("down_proj")]
    scaled = awq_scale(shared_copy(tiny), ModelStats(tokens, {n: spec for n in names}), steps=4)
    for name, linear in made.linears().items():
        theirs = scaled.linears()[name].weight
        if name in names:
            assert torch.equal(linear.weight.codes, rtn(theirs, spec).codes), name
        else:
            assert torch.equal(linear.weight, theirs), name
    up = names[0].replace("down", "up")
    assert not torch.equal(made.linears()[up].weight, kept[f"{up}.weight"])
