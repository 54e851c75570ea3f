"""``quantize``: apply a recipe to a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.models.calibrate import Inputs, bar, shared_copy, walk
from labkit.models.llama import Linear, Llama
from labkit.models.protocol import calibration_windows
from labkit.models.recipe import Method, Recipe, Rule, needs
from labkit.quant import METHODS, QuantizedTensor


@dataclass(frozen=True)
class Made:
    """How a quantized model came to be: what its checkpoint and its reports say.

    model      the name it was loaded by; load(model, seed=seed) is its reference
    recipe     with every option written out
    seed       of the calibration windows, and of the off-grid factors where the model was loaded with it
    propagate  whether each Hessian saw the already quantized layers before it
    base       fingerprint of the model before it was quantized
    """

    model: str
    recipe: Recipe
    seed: int
    propagate: bool
    base: str


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
    """A new model with the recipe's layers quantized; the original is not changed, and layers left alone are shared.

    seed       which calibration windows are drawn, for methods that look at text
    propagate  True: each layer's statistics come from inputs that the already quantized layers before it produce, inside
               a decoder layer too (GPTQ's "true sequential"). False: from the unquantized model; the ablation.
    methods    from a recipe's names to functions ``method(weight, spec, stats, **options)``, so that
               ``{**METHODS, "gptq": my_gptq}`` runs a method of your own
    progress   a bar over decoder layers; None is ``LABKIT_PROGRESS``

    Can be interrupted at any time: nothing is changed until it returns. Raises ValueError before the work begins when
    the recipe does not fit the model or the methods, and during it, with the layer's name, when a method fails on it.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    linears = model.linears()
    plan = recipe.plan(linears, methods)
    if taken := [name for name in plan if not isinstance(linears[name].weight, Tensor)]:
        raise ValueError(
            f"{taken[0]} and {len(taken) - 1} more layers are quantized already; start from the original model"
        )
    made = Made(model.name, recipe, seed, propagate, fingerprint(model))
    work = shared_copy(model)
    done: dict[str, QuantizedTensor] = {}

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        done[name] = _apply(name, linear, plan[name], methods, inputs)
        if propagate:
            linear.weight = done[name].dequantize()

    if any(needs(methods[_method(rule)]) for rule in plan.values()):
        calibration = recipe.calibration
        tokens = calibration_windows(model.tokenizer, calibration.windows, calibration.tokens, seed)
        walk(work, tokens, visit, plan, progress=progress, what=recipe.name)
    else:
        for name in bar(list(plan), recipe.name, progress):
            done[name] = _apply(name, linears[name], plan[name], methods, None)
    for name, linear in work.linears().items():
        if name in done:
            linear.weight = done[name]
    work.made = made
    return work


def fingerprint(model: Llama) -> str:
    """Twelve hex digits of a model's weights (every tensor, a thousand elements of each) and shapes."""
    import hashlib

    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 1000)].float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:12]


def _method(rule: Rule) -> str:
    assert rule.method is not None  # plan() holds quantizing rules only
    return rule.method


def _apply(
    name: str, linear: Linear, rule: Rule, methods: Mapping[str, Method], inputs: Inputs | None
) -> QuantizedTensor:
    method = methods[_method(rule)]
    stats = inputs.stats() if inputs is not None and needs(method) else None
    try:
        found = method(linear.weight, rule.weight, stats, **rule.options)
    except ValueError as error:
        raise ValueError(f"{name}: method {rule.method!r} failed: {error}") from error
    if not isinstance(found, QuantizedTensor) or found.shape != linear.weight.shape:
        got = f"shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
        raise ValueError(
            f"{name}: method {rule.method!r} must return a QuantizedTensor of shape {tuple(linear.weight.shape)}, "
            f"returned {type(found).__name__} {got}".rstrip()
        )
    return found
