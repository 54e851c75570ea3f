"""Round to nearest: each weight to the nearest point of its grid, the yardstick for every other method."""

from __future__ import annotations

from torch import Tensor

from labkit.quant.encode import encode
from labkit.quant.fit import fit
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import QuantizedTensor


def rtn(
    weight: Tensor, spec: QuantSpec, stats: Stats | None = None, *, observer: str | Observer = "minmax"
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the grid of ``spec``, each number to its nearest point.

    ``observer`` chooses each block's range. ``stats`` is not used: every method is called alike.
    """
    return encode(weight, spec, fit(weight, spec, observer))


rtn.needs = frozenset()  # type: ignore[attr-defined]
