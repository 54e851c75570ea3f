"""Round to nearest: each weight to the nearest point of its grid, the yardstick for every other method."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from labkit.quant.encode import encode
from labkit.quant.fit import check_has_values, fit, store_scale
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import QuantizedTensor


def rtn(
    weight: Tensor,
    spec: QuantSpec,
    stats: Stats | None = None,
    *,
    observer: str | Observer = "minmax",
    scale_first: bool = True,
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the grid of ``spec``, each number to its nearest point.

    observer     chooses each block's range
    scale_first  False: codes and zero points are those of scales in fp32, which are rounded, or quantized,
                 afterwards. A little worse, and what bitsandbytes' nested nf4 does

    ``stats`` is not used: every method is called alike. Raises ValueError for NaN, infinity and learned
    codebooks.
    """
    if scale_first:
        return encode(weight, spec, fit(weight, spec, observer))
    exact = replace(spec, scale="fp32")
    tensor = encode(weight, exact, fit(weight, exact, observer))
    return replace(tensor, spec=spec, scale=store_scale(tensor.params.dense()[0], spec))


rtn.needs = frozenset()  # type: ignore[attr-defined]
rtn.check = check_has_values  # type: ignore[attr-defined]
