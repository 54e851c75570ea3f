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
from labkit.quant import METHODS, lsq

_NEEDS = {
    "hessian": "calibration text",
    "fisher": "gradients (whole model in memory)",
    "inputs": "calibration text",
}


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    name   as recipes call it
    kind   "method" (a layer's weights to codes), "transform" (of the model, before) or "training" (after)
    paper  arXiv numbers, from the docstrings of its file and function; "" where there is none
    needs  what it looks at besides the weights, in words; "nothing"
    what   the first sentence of its file
    """

    name: str
    kind: str
    paper: str
    needs: str
    what: str


def catalogue() -> list[Entry]:
    """Every method and transform that a recipe can name, and the training that it can ask for."""
    kinds: dict[str, Mapping[str, Callable[..., Any]]] = {"method": METHODS, "transform": TRANSFORMS}
    found = [_entry(name, kind, function) for kind, table in kinds.items() for name, function in table.items()]
    training = _entry("train", "training", train)
    text = "training text, gradients (whole model in memory several times)"
    return [*found, Entry("train", "training", ", ".join([*_papers(lsq), *_papers(train)]), text, training.what)]


def _entry(name: str, kind: str, function: Callable[..., Any]) -> Entry:
    words = ", ".join(sorted({_NEEDS.get(need, need) for need in needs(function)})) or "nothing"
    about = (inspect.getmodule(function).__doc__ or "").strip().split("\n\n")[0]
    first = re.split(r"(?<=[.:])\s", " ".join(about.split()))
    return Entry(name, kind, ", ".join(_papers(function)), words, " ".join(first[:2] if first[0].endswith(":") else first[:1]))


def _papers(function: Callable[..., Any]) -> list[str]:
    """The arXiv numbers in the docstrings of a function's file and of itself, each once, in order."""
    text = f"{getattr(inspect.getmodule(function), '__doc__', '')} {function.__doc__}"
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))
