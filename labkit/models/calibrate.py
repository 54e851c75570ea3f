"""What the layers see of the calibration text: their inputs' Hessians, one decoder layer at a time.

All windows go through the model together, a layer at a time, so memory holds the residual stream of every
window and the inside of one layer, whatever the depth. A linear layer is visited once its whole input is
known and before its output is computed: whoever visits may replace its weight, and everything after it,
inside the same decoder layer too, then sees what the replaced weight makes of the text. That is GPTQ's true
sequential order (q, k, v; o; gate, up; down) in a single pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from labkit.models.llama import Linear, Llama
from labkit.quant import QuantizedTensor, QuantSpec, Stats
from labkit.settings import settings

T = TypeVar("T")
Visit = Callable[[str, Linear, "Inputs"], None]


class Inputs:
    """One input tensor (windows, tokens, in_features), and the statistics of it that somebody asked for.

    q, k and v read the same input, as gate and up do: they share one of these and its one Hessian.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._stats: Stats | None = None

    def stats(self) -> Stats:
        """Their second moments over all windows and tokens, an (in, in) Hessian among them."""
        if self._stats is None:
            self._stats = Stats.of(self.x)
        return self._stats


@dataclass(frozen=True)
class ModelStats:
    """What a transform may know: it looks at the layers' inputs itself, by a ``walk`` of its own.

    tokens    (windows, tokens) int64, the calibration text
    grids     on which grid each layer will be quantized, by name; layers left alone are not in it
    progress  a bar over decoder layers; None is ``LABKIT_PROGRESS``
    """

    tokens: Tensor
    grids: Mapping[str, QuantSpec] = field(default_factory=dict)
    progress: bool | None = None


@torch.no_grad()
def walk(
    model: Llama,
    tokens: Tensor,
    visit: Visit,
    layers: Collection[str],
    *,
    progress: bool | None = None,
    what: str = "calibrating",
) -> None:
    """Send ``tokens`` (windows, tokens) through the model and call ``visit(name, linear, inputs)`` for each
    of ``layers``.

    The walk ends after the last decoder layer that holds one of them. ``model`` gets hooks while it runs:
    give a copy that nobody else is running (``shared_copy``). progress: a bar over decoder layers, called
    ``what``; None is ``LABKIT_PROGRESS``.
    """
    last: list[Inputs] = []

    def before(name: str, linear: Linear, args: tuple[Tensor]) -> None:
        if not last or last[0].x is not args[0]:
            last[:] = [Inputs(args[0])]
        visit(name, linear, last[0])

    named = model.linears()
    hooks = [named[n].register_forward_pre_hook(partial(before, n)) for n in layers if n != "lm_head"]
    inside = [
        i for i in range(len(model.blocks)) if any(n.startswith(f"model.layers.{i}.") for n in layers)
    ]
    depth = len(model.blocks) if "lm_head" in layers else max(inside, default=-1) + 1
    try:
        x, rotary, cache = model.begin(tokens)
        for block in bar(list(model.blocks)[:depth], what, progress):
            x = block(x, rotary, cache)
            last.clear()
        if "lm_head" in layers:
            # Its output, the logits of every window at once, would be the largest tensor of all: left out.
            visit("lm_head", named["lm_head"], Inputs(model.final(x)))
    finally:
        for hook in hooks:
            hook.remove()


def hessians(
    model: Llama, tokens: Tensor, layers: str = "model.layers.*", *, progress: bool | None = None
) -> dict[str, Stats]:
    """The Hessian of each linear layer whose name matches the shell pattern ``layers``.

    tokens: (windows, tokens) int64, for example of ``calibration_windows``. The model runs as it stands.
    Layers with the same input share one object. Raises ValueError when no name matches.
    """
    names = [name for name in model.linears() if fnmatchcase(name, layers)]
    if not names:
        raise ValueError(
            f"no linear layer matches {layers!r}; names are like {next(iter(model.linears()))}"
        )
    found: dict[str, Stats] = {}

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        found[name] = inputs.stats()

    walk(shared_copy(model), tokens, visit, names, progress=progress)
    return found


def shared_copy(model: Llama) -> Llama:
    """A model with modules of its own around the same tensors.

    Giving one of its layers another weight leaves the original as it is; writing into a tensor does not.
    """
    kept: list[object] = [*model.parameters(), *model.buffers()]
    kept += [
        m.weight for m in model.modules() if isinstance(m, Linear) and isinstance(m.weight, QuantizedTensor)
    ]
    memo = {id(thing): thing for thing in kept}
    if model._tokenizer is not None:
        memo[id(model._tokenizer)] = model._tokenizer
    memo |= {
        id(m._prepared): None for m in model.modules() if isinstance(m, Linear) and m._prepared is not None
    }
    return copy.deepcopy(model, memo)


def bar(steps: Sequence[T], what: str, progress: bool | None, unit: str = "layer") -> Iterable[T]:
    """A progress bar over ``steps``; ``progress=None`` leaves it to ``LABKIT_PROGRESS``."""
    shown = settings().progress if progress is None else progress
    return tqdm(steps, desc=what, disable=not shown, leave=False, unit=unit)
