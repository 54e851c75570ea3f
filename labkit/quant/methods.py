"""The methods by name, as recipes call them. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from labkit.quant.adaround import adaround
from labkit.quant.gptq import gptq
from labkit.quant.hqq import hqq
from labkit.quant.kmeans import kmeans, quantile, squeezellm
from labkit.quant.rtn import rtn
from labkit.quant.rtn_clip import rtn_clip
from labkit.quant.tensor import QuantizedTensor

# method(weight, spec, stats=None, **options); method.needs names the fields of Stats it cannot do without,
# method.check(spec, **options), where there is one, raises ValueError for what it cannot do; method.paper is
# whose it is
Method = Callable[..., QuantizedTensor]
METHODS: dict[str, Method] = {
    "rtn": rtn,
    "rtn_clip": rtn_clip,
    "gptq": gptq,
    "adaround": adaround,
    "hqq": hqq,
    "kmeans": kmeans,
    "squeezellm": squeezellm,
    "quantile": quantile,
}
