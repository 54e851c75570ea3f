"""``quantize``: apply a recipe to a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from labkit.kernels.columns import faster
from labkit.models.calibrate import Inputs, ModelStats, bar, shared_copy, walk
from labkit.models.fingerprint import code, fingerprint
from labkit.models.fisher import fisher, fisher_bytes
from labkit.models.llama import Linear, Llama
from labkit.models.protocol import calibration_windows
from labkit.models.recipe import Method, Recipe, Rule, needs
from labkit.models.transforms import TRANSFORMS
from labkit.models.unfinished import Unfinished
from labkit.quant import METHODS, FellBack, QuantizedTensor, Stats


@dataclass(frozen=True)
class Made:
    """How a quantized model came to be: what its checkpoint and its reports say.

    model, model_seed  the original's name and off-grid seed: ``load(model, seed=model_seed)`` loads it
    recipe             what was asked for
    seed               of the calibration windows
    propagate          whether each Hessian saw the already quantized layers before it
    fallbacks          the layers whose method found nothing better than rounding to nearest
    """

    model: str
    model_seed: int | None
    recipe: Recipe
    seed: int
    propagate: bool
    fallbacks: tuple[str, ...] = ()


@torch.no_grad()
def quantize(
    model: Llama,
    recipe: Recipe | str,
    *,
    seed: int = 0,
    propagate: bool = True,
    methods: Mapping[str, Method] = METHODS,
    state: Path | None = None,
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
    state      a folder for what is done so far, to which an interrupted call with the same arguments returns;
               whoever gives it removes it. None: nothing is kept
    progress   a bar over decoder layers; None is ``LABKIT_PROGRESS``

    Can be interrupted at any time. Memory holds one layer's float32 weights and inside beside the model
    itself, its codes and the residual stream of all windows (``peak_bytes``); a recipe that trains, and
    methods that need gradients, hold more and say how much. Raises before the work begins: ValueError when
    the recipe does not fit the model or the methods, or a weight holds NaN or infinity; MemoryError when
    gradients are needed and do not fit (see ``fisher``, ``train``). During it: ValueError, with the layer's
    name, when a method fails on it.
    """
    recipe, plan = prepare(model, recipe, methods)
    if recipe.train is not None:
        from labkit.models.train import train, training_batches  # train quantizes, too

        batches = training_batches(model.tokenizer, recipe.train, seed)
        file = None if state is None else state / "training.pt"
        return train(model, recipe, batches, seed=seed, methods=methods, state=file, progress=progress)
    kept = None if state is None else Unfinished(state, _work(recipe, model, seed, propagate, methods))
    work = shared_copy(model)
    calibration = recipe.calibration
    tokens = None
    if recipe.calibrated or any(_needs(rule, methods) for rule in plan.values()):
        tokens = calibration_windows(model.tokenizer, calibration.windows, calibration.tokens, seed)
    for step in recipe.transforms:
        grids = {name: rule.weight for name, rule in plan.items() if rule.weight is not None}
        stats = None if tokens is None else ModelStats(tokens, grids, progress)
        TRANSFORMS[step.name](work, stats, **step.options)
    work.kv = recipe.kv
    linears = work.linears()
    done: dict[str, QuantizedTensor] = {}
    fallbacks: list[str] = []
    dense: list[str] = []  # done layers of this decoder layer, whose weights stand in float32

    def do(name: str, inputs: Inputs | None) -> None:
        found = kept.take(name) if kept else None
        if found is None:
            found = _apply(name, linears[name], plan[name], methods, inputs, fishers.get(name))
            if kept:
                kept.keep(name, *found)
        fishers.pop(name, None)
        done[name], fell_back = found
        fallbacks.extend([name] if fell_back else [])

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        if dense and block_of(dense[0]) != block_of(name):
            for before in dense:
                linears[before].weight = done[before]
            dense.clear()
        do(name, inputs)
        if propagate:
            linear.weight, linear.input = done[name].dequantize(), plan[name].input
            dense.append(name)

    fishers: dict[str, Tensor] = {}
    if tokens is not None:
        sensitive = [name for name, rule in plan.items() if "fisher" in _needs(rule, methods)]
        fishers = fisher(work, tokens, sensitive, progress=progress) if sensitive else {}
    if tokens is not None and any(_needs(rule, methods) - {"fisher"} for rule in plan.values()):
        walk(work, tokens, visit, plan, progress=progress, what=recipe.name)
    else:
        for name in bar(list(plan), recipe.name, progress):
            do(name, None)
    for name, weight in done.items():
        linears[name].weight, linears[name].input = weight, plan[name].input
    work.made = Made(model.name, model.seed, recipe, seed, propagate, tuple(fallbacks))
    return work


def prepare(
    model: Llama, recipe: Recipe | str, methods: Mapping[str, Method] = METHODS
) -> tuple[Recipe, dict[str, Rule]]:
    """The recipe and which of its rules quantizes which layer, after everything that can be refused beforehand.

    Raises ValueError when the recipe does not fit the model or the methods, for layers that are quantized
    already, and for weights that hold NaN or infinity.
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
    return recipe, plan


def peak_bytes(model: Llama, recipe: Recipe) -> int:
    """About how many bytes ``quantize`` takes at its peak beside the model itself, which is mapped from its file.

    Without gradients: a byte for each code, float32 copies of one decoder layer, and, for methods that look
    at text, the residual stream of all windows, the inside of one layer and three of its Hessians in float64.
    """
    config, linears = model.config, model.linears()
    counts = {name: linears[name].weight.shape.numel() for name in recipe.plan(linears)}
    if recipe.train is not None:
        from labkit.models.train import train_bytes

        return train_bytes(config, recipe.train, list(counts.values()))
    tokens = recipe.calibration.windows * recipe.calibration.tokens
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    least = sum(counts.values()) + 4 * layer
    if recipe.calibrated:
        inside = 3 * max(config.intermediate_size, q) + 3 * config.hidden_size
        least += 4 * tokens * inside + 3 * 8 * max(config.intermediate_size, config.hidden_size, q) ** 2
    sensitive = [
        counts[name] for name, rule in recipe.plan(linears).items() if "fisher" in _needs(rule, METHODS)
    ]
    if sensitive:
        least = max(least, fisher_bytes(config, recipe.calibration.tokens, sensitive))
    return least


def _work(recipe: Recipe, model: Llama, seed: int, propagate: bool, methods: Mapping[str, Method]) -> str:
    if methods is not METHODS:
        raise ValueError("state is for labkit's own methods: of others it cannot know whether they changed")
    return fingerprint(recipe, model, seed, propagate, code())


def block_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    return ".".join(name.split(".")[:3])


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
) -> tuple[QuantizedTensor, bool]:
    """The layer as its rule's method quantizes it, and whether that fell back to rounding to nearest."""
    stats = inputs.stats() if inputs is not None and _needs(rule, methods) - {"fisher"} else None
    if fisher is not None:
        stats = replace(stats or Stats.empty(linear.in_features), fisher=fisher)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            method = methods[_method(rule)]
            if "update" not in rule.options:  # which has its place in the plain loop
                method = faster(method)
            found = method(linear.weight, rule.weight, stats, **rule.options)
    except ValueError as error:
        raise ValueError(f"{name}: method {rule.method!r} failed: {error}") from error
    for warning in said:
        if warning.category is not FellBack:
            warnings.warn(warning.message, stacklevel=2)
    if not isinstance(found, QuantizedTensor) or found.shape != linear.weight.shape:
        got = f"shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
        raise ValueError(
            f"{name}: method {rule.method!r} must return a QuantizedTensor of shape "
            f"{tuple(linear.weight.shape)}, returned {type(found).__name__} {got}".rstrip()
        )
    return found, any(warning.category is FellBack for warning in said)
