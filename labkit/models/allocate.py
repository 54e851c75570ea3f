"""Mixed precision: which part of a model gets how many bits.

``measure`` quantizes one part at a time, each on every candidate grid, and takes the KL to the original;
``allocate`` then spends a budget of bits so that the sum of these is as small as it can be. That the parts' KLs
add up is an assumption (it holds where they are small, as a second-order expansion of the KL says; HAWQ-V2,
Dong et al. 2019, arXiv 1911.03852, rests on the same), so ``predict`` wants to be compared with a measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labkit.files import whole_file
from labkit.models.calibrate import bar, shared_copy
from labkit.models.evaluate import score
from labkit.models.fingerprint import code, fingerprint
from labkit.models.llama import Llama
from labkit.models.protocol import Protocol, protocol_for
from labkit.models.quantize import block_of, prepare
from labkit.models.recipe import Recipe, Rule, needs
from labkit.quant import METHODS, QuantSpec


@dataclass(frozen=True)
class Cost:
    """What a candidate grid costs a part: bits, scales and zero points counted, and KL in nats per token."""

    bits: int
    kl: float


@dataclass
class Sensitivity:
    """What each part of a model costs on each candidate grid.

    costs     part (a shell pattern over layer names) to spec to Cost
    weights   how many weights each part has
    method, options  how the parts were quantized; ``allocate`` writes its rules with them
    protocol  hash of the protocol that the KLs were measured by
    work      fingerprint of model, candidates, protocol and code
    about     date, machine and versions, and the command that repeats it, where a file keeps them
    """

    costs: dict[str, dict[str, Cost]]
    weights: dict[str, int]
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    work: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def predict(self, rules: Sequence[Rule]) -> tuple[float, float]:
        """(bits per weight over the parts, KL) that ``rules`` come to if the KLs add up.

        Raises ValueError where the first rule that matches a part has no measured grid.
        """
        bits, kl = 0, 0.0
        for part, costs in self.costs.items():
            rule = next((r for r in rules if r.match == part or fnmatchcase(part, r.match)), None)
            if rule is None or str(rule.weight) not in costs:
                raise ValueError(
                    f"{part}: expected a rule with one of the measured grids {', '.join(costs)}, found "
                    f"{rule.weight if rule else 'no rule'}"
                )
            cost = costs[str(rule.weight)]
            bits, kl = bits + cost.bits, kl + cost.kl
        return bits / sum(self.weights.values()), kl

    def save(self, path: Path) -> None:
        """Write the measurements as JSON, whole."""
        with whole_file(path) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_file(cls, path: Path) -> Sensitivity:
        """Read what ``save`` wrote. Raises ValueError when the file is not that."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            costs = {
                part: {spec: Cost(**cost) for spec, cost in found.items()}
                for part, found in tree.pop("costs").items()
            }
            return cls(costs=costs, **tree)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no measured sensitivities ({error}); measure them again"
            ) from error


def allocate(sensitivity: Sensitivity, budget_bits: float) -> tuple[Rule, ...]:
    """A rule for each part, with the smallest sum of KLs that ``budget_bits`` allow.

    budget_bits: the mean over all weights of the parts, scales and zero points counted, as in
    ``Report.bits_per_weight``. The integer programme, with x = 1 where part p takes grid g:

        minimise sum kl[p, g] x[p, g]   with   sum_g x[p, g] = 1 for each p,   sum bits[p, g] x[p, g] <= budget

    It is solved exactly, by SciPy's HiGHS. Of two equally good solutions either may come. Raises ValueError
    when not even the smallest grids fit, or there is nothing to choose from.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [
        (part, spec, cost) for part, costs in sensitivity.costs.items() for spec, cost in costs.items()
    ]
    count = sum(sensitivity.weights.values())
    if not choices or count == 0:
        raise ValueError("no sensitivities: measure them first, with labkit.models.measure")
    least = sum(min(cost.bits for cost in costs.values()) for costs in sensitivity.costs.values())
    if least > budget_bits * count:
        raise ValueError(
            f"a budget of {budget_bits:.4g} bits per weight is less than the smallest candidates take, "
            f"{least / count:.4g}; raise it or measure smaller grids"
        )
    parts = list(sensitivity.costs)
    owns = np.zeros((len(parts), len(choices)))  # owns[p, c] = 1 where choice c is one of part p's
    for column, (part, _, _) in enumerate(choices):
        owns[parts.index(part), column] = 1
    kl = np.array([cost.kl for _, _, cost in choices])
    # HiGHS stops within 1e-6 of the best, so KLs in millionths of the largest; and it counts bits within a
    # tolerance, so they come in their largest common unit, as whole numbers.
    unit = math.gcd(*(cost.bits for _, _, cost in choices))
    bits = np.array([[cost.bits // unit for _, _, cost in choices]], dtype=float)
    solution = milp(
        1e6 * kl / max(np.abs(kl).max(), 1e-30),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(owns, 1, 1),
            LinearConstraint(bits, ub=math.floor(budget_bits * count / unit)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise ValueError(
            f"HiGHS found no allocation for {budget_bits:.4g} bits per weight: {solution.message}"
        )
    return tuple(
        Rule(part, QuantSpec.parse(spec), sensitivity.method, dict(sensitivity.options))
        for (part, spec, _), chosen in zip(choices, solution.x, strict=True)
        if chosen > 0.5
    )


@torch.no_grad()
def measure(
    model: Llama,
    candidates: Sequence[str | QuantSpec],
    *,
    by: str = "layer",
    layers: str = "model.layers.*",
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
    protocol: str | Protocol = "lesson",
    file: Path | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """The KL that each part of the model costs alone, on each candidate grid.

    candidates  the grids, such as ``["int2 g64 asym", "int4 g64 asym"]``
    by          what a part is: "layer", each linear layer; "block", all linear layers of a decoder layer
    layers      which linear layers take part: a shell pattern
    method, options  how they are quantized: a method that needs no statistics, since parts are measured alone
    protocol    the windows: "lesson", "full" or a Protocol
    file        where the measurements are written after each one, whole, and from where they go on when they
                are there already
    progress    a bar over measurements; None is ``LABKIT_PROGRESS``

    The original's pass is made once and what enters each decoder layer kept, (windows, tokens, hidden) a
    layer; a measurement runs from its part on. Raises ValueError before any work when something does not fit.
    """
    specs = [QuantSpec.parse(c) if isinstance(c, str) else c for c in candidates]
    if not specs or by not in ("layer", "block"):
        raise ValueError(f"expected candidates and by 'layer' or 'block', found {len(specs)} and {by!r}")
    recipes = [Recipe(rules=(Rule(layers, spec, method, dict(options or {})),)) for spec in specs]
    plans = [prepare(model, recipe)[1] for recipe in recipes]
    if needs(METHODS[method]):
        raise ValueError(
            f"method {method!r} needs statistics; measure with one that does not, such as 'rtn'"
        )
    parts: dict[str, list[str]] = {}
    for name in plans[0]:
        part = name if by == "layer" or name == "lm_head" else block_of(name) + ".*"
        parts.setdefault(part, []).append(name)
    work = shared_copy(model)
    linears = work.linears()
    if not isinstance(protocol, Protocol):
        protocol = protocol_for(model.tokenizer, protocol)
    texts = [str(spec) for spec in specs]
    known = Sensitivity(
        costs={part: {} for part in parts},
        weights={
            part: sum(linears[n].weight.shape.numel() for n in names) for part, names in parts.items()
        },
        method=method,
        options=dict(options or {}),
        protocol=protocol.hash,
        work=fingerprint(recipes[0], model, texts, by, protocol.hash, code()),
    )
    if file is not None and file.exists():
        before = Sensitivity.from_file(file)
        if before.work != known.work:
            raise ValueError(
                f"{file} holds measurements of another model, candidates, protocol or version; remove it"
            )
        known = before

    x, rotary, cache = work.begin(protocol.tokens)
    entering = []  # (windows, tokens, hidden), one for each decoder layer
    for block in bar(list(work.blocks), "original", progress):
        entering.append(x)
        x = block(x, rotary, cache)
    original = work.final(x)
    todo = [(part, text) for part in parts for text in texts if text not in known.costs[part]]
    for part, text in bar(todo, "measuring", progress, unit="measurement"):
        rule = Rule(layers, QuantSpec.parse(text), method, dict(options or {}))
        whole = {name: linears[name].weight for name in parts[part]}
        bits = 0
        for name, weight in whole.items():
            made = METHODS[method](weight, rule.weight, None, **rule.options)
            linears[name].weight, bits = made.dequantize(), bits + 8 * made.nbytes
        if part == "lm_head":
            final = original
        else:
            first = int(part.split(".")[2])
            x = entering[first]
            for block in work.blocks[first:]:
                x = block(x, rotary, cache)
            final = work.final(x)
        _, kl, _ = score(final, work.lm_head, original, model.lm_head, protocol)
        for name, weight in whole.items():
            linears[name].weight = weight
        known.costs[part][text] = Cost(bits, kl)
        if file is not None:
            known.save(file)
    known.costs = {part: {text: known.costs[part][text] for text in texts} for part in parts}
    return known
