"""The methods by name, as recipes call them. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from labkit.quant.adaround import adaround
from labkit.quant.gptq import gptq
from labkit.quant.rtn import rtn
from labkit.quant.rtn_clip import rtn_clip
from labkit.quant.tensor import QuantizedTensor

# method(weight, spec, stats=None, **options); method.needs names the fields of Stats it cannot do without
Method = Callable[..., QuantizedTensor]
METHODS: dict[str, Method] = {"rtn": rtn, "rtn_clip": rtn_clip, "gptq": gptq, "adaround": adaround}
