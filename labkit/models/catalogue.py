"""What there is to quantize with: every method, transform and training, with its paper and its needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from labkit.models.recipe import needs
from labkit.models.train import train
from labkit.models.transforms import TRANSFORMS
from labkit.quant import METHODS

KINDS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "method": METHODS,
    "transform": TRANSFORMS,
    "training": {"train": train},
}
NEEDS = {
    "hessian": "calibration text",
    "inputs": "calibration text",
    "fisher": "calibration text, gradients",
    "text": "training text",
    "gradients": "gradients",
}


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    name   as recipes call it
    kind   "transform" (of the whole model, first), "method" (a layer's weights to codes) or "training" (last)
    paper  whose it is
    needs  what it looks at besides the weights, in words. What needs gradients holds the whole model in memory
           and says how much that is; all others hold one layer
    what   what it does: the first sentence of its file
    """

    name: str
    kind: str
    paper: str
    needs: str
    what: str


def catalogue() -> list[Entry]:
    """Every method and transform that a recipe can name, and the training that it can ask for."""
    return [
        _entry(name, kind, function) for kind, table in KINDS.items() for name, function in table.items()
    ]


def _entry(name: str, kind: str, function: Callable[..., Any]) -> Entry:
    words = dict.fromkeys(NEEDS[need] for need in sorted(needs(function), reverse=True))
    first = " ".join((inspect.getmodule(function).__doc__ or "").strip().split("\n\n")[0].split())
    what = re.match(r".*?\.(?=\s|$)", first)
    return Entry(
        name,
        kind,
        getattr(function, "paper", "none: the yardstick"),
        ", ".join(words) or "nothing",
        what[0].replace("``", "") if what else first,
    )
