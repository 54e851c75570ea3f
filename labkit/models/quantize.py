"""``quantize``: apply a recipe to a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labkit.models.calibrate import Inputs, ModelStats, bar, shared_copy, walk
from labkit.models.fisher import fisher
from labkit.models.llama import Linear, Llama
from labkit.models.protocol import calibration_windows
from labkit.models.recipe import Method, Recipe, Rule, needs
from labkit.models.transforms import TRANSFORMS
from labkit.quant import METHODS, QuantizedTensor, Stats


@dataclass(frozen=True)
class Made:
    """How a quantized model came to be: what its checkpoint and its reports say.

    model, model_seed  the original's name and off-grid seed: ``load(model, seed=model_seed)`` loads it
    recipe             what was asked for
    seed               of the calibration windows
    propagate          whether each Hessian saw the already quantized layers before it
    """

    model: str
    model_seed: int | None
    recipe: Recipe
    seed: int
    propagate: bool


@torch.no_grad()
def quantize(
    model: Llama,
    recipe: Recipe | str,
    *,
    seed: int = 0,
    propagate: bool = True,
    methods: Mapping[str, Method] = METHODS,
    progress: bool | None = None,
) -> Llama:
    """A new model: the recipe's transforms in order, then its layers quantized. The original is not changed;
    what is left alone is shared with it.

    seed       which calibration windows are drawn, for methods that look at text
    propagate  True: each layer's statistics come from inputs that the already quantized layers before it
               produce, inside a decoder layer too (GPTQ's "true sequential"). False: from the unquantized
               model; the ablation. The Fisher, for methods that need it, always is the unquantized model's.
    methods    from a recipe's names to functions ``method(weight, spec, stats, **options)``, so that
               ``{**METHODS, "gptq": my_gptq}`` runs a method of your own
    progress   a bar over decoder layers; None is ``LABKIT_PROGRESS``

    Can be interrupted at any time. Raises before the work begins: ValueError when the recipe does not fit
    the model or the methods, or a weight holds NaN or infinity; MemoryError when gradients are needed and
    do not fit (see ``fisher``). During it: ValueError, with the layer's name, when a method fails on it.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    linears = model.linears()
    plan = recipe.plan(linears, methods)
    if taken := [name for name in plan if not isinstance(linears[name].weight, Tensor)]:
        raise ValueError(
            f"{taken[0]} and {len(taken) - 1} more layers are quantized already; start from the original"
        )
    for name in plan:
        weight = linears[name].weight
        if isinstance(weight, Tensor) and not bool(weight.isfinite().all()):
            raise ValueError(f"{name}.weight holds NaN or infinity; the model is damaged: fetch it again")
    made = Made(model.name, model.seed, recipe, seed, propagate)
    work = shared_copy(model)
    calibration = recipe.calibration
    tokens = None
    if recipe.calibrated or any(_needs(rule, methods) for rule in plan.values()):
        tokens = calibration_windows(model.tokenizer, calibration.windows, calibration.tokens, seed)
    for step in recipe.transforms:
        grids = {name: rule.weight for name, rule in plan.items() if rule.weight is not None}
        stats = None if tokens is None else ModelStats(tokens, grids, progress)
        TRANSFORMS[step.name](work, stats, **step.options)
    linears = work.linears()
    done: dict[str, QuantizedTensor] = {}

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        done[name] = _apply(name, linear, plan[name], methods, inputs, fishers.pop(name, None))
        if propagate:
            linear.weight = done[name].dequantize()

    fishers: dict[str, Tensor] = {}
    if tokens is not None:
        sensitive = [name for name, rule in plan.items() if "fisher" in _needs(rule, methods)]
        fishers = fisher(work, tokens, sensitive, progress=progress) if sensitive else {}
    if tokens is not None and any(_needs(rule, methods) - {"fisher"} for rule in plan.values()):
        walk(work, tokens, visit, plan, progress=progress, what=recipe.name)
    else:
        for name in bar(list(plan), recipe.name, progress):
            done[name] = _apply(name, linears[name], plan[name], methods, None, fishers.pop(name, None))
    for name, weight in done.items():
        linears[name].weight = weight
    work.made = made
    return work


def _method(rule: Rule) -> str:
    assert rule.method is not None  # plan() holds quantizing rules only
    return rule.method


def _needs(rule: Rule, methods: Mapping[str, Method]) -> frozenset[str]:
    """What the rule's method needs; a function that does not say so needs what labkit's own does."""
    method = methods[_method(rule)]
    return needs(method if hasattr(method, "needs") else METHODS.get(_method(rule), method))


def _apply(
    name: str,
    linear: Linear,
    rule: Rule,
    methods: Mapping[str, Method],
    inputs: Inputs | None,
    fisher: Tensor | None,
) -> QuantizedTensor:
    stats = inputs.stats() if inputs is not None and _needs(rule, methods) - {"fisher"} else None
    if fisher is not None:
        stats = replace(stats or Stats.empty(linear.in_features), fisher=fisher)
    try:
        found = methods[_method(rule)](linear.weight, rule.weight, stats, **rule.options)
    except ValueError as error:
        raise ValueError(f"{name}: method {rule.method!r} failed: {error}") from error
    if not isinstance(found, QuantizedTensor) or found.shape != linear.weight.shape:
        got = f"shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
        raise ValueError(
            f"{name}: method {rule.method!r} must return a QuantizedTensor of shape "
            f"{tuple(linear.weight.shape)}, returned {type(found).__name__} {got}".rstrip()
        )
    return found
