"""What parity with torchao, optimum-quanto and llm-compressor is measured on, and labkit's side of it.

libraries.py imports this in the environment of those libraries, test_libraries.py in the project's own: both see the
same weights, to the last bit, on every processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from labkit.models.awq import search_scale
from labkit.models.fold import Site
from labkit.quant import METHODS, QuantizedTensor, QuantSpec, Stats, rtn

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.2.mlp.gate_proj.weight",
)
WITH_INPUTS = ("gptq", "awq_scale")


@dataclass(frozen=True)
class Layer:
    """A weight (out, in), and the inputs (samples, in) of the methods that look at them; float64."""

    name: str
    weight: Tensor
    inputs: Tensor | None = None


def synthetic(seed: int, rows: int, columns: int) -> Tensor:
    """Rows of different spread, one weight in 500 an outlier, one row without negative numbers.

    NumPy's normal numbers, because torch's differ in the last bits between AVX2 and other processors.
    """
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns)) * (0.01 + 0.08 * rng.random((rows, 1)))
    W[rng.random(W.shape) < 0.002] *= 8
    W[1] = abs(W[1])
    return torch.from_numpy(W.astype(np.float32))


def correlated(seed: int, columns: int) -> Tensor:
    """Inputs of a layer (512, columns): a few causes behind all channels, and channels of different size."""
    rng = np.random.default_rng(1000 + seed)
    causes, mixing = rng.standard_normal((512, 24)), rng.standard_normal((24, columns))
    size = 0.1 + 4 * rng.random(columns) ** 4
    return torch.from_numpy((causes @ mixing / 5 + rng.standard_normal((512, columns))) * size)


@cache
def layers(method: str, spec: QuantSpec) -> tuple[Layer, ...]:
    """The layers that a method is compared on: all of them have columns in groups of 64, but for one."""
    with safe_open(ROOT / "data" / "models" / "tiny" / "model.safetensors", "pt") as file:
        tiny = [Layer(f"tiny {name}", file.get_tensor(name).float()) for name in TINY]
    if method in WITH_INPUTS:
        made = [
            Layer(f"seed {seed}", synthetic(seed, 64, 576), correlated(seed, 576)) for seed in (0, 1, 2)
        ]
        return (*made, *(Layer(x.name, x.weight[:64], correlated(9, x.weight.shape[1])) for x in tiny[1:]))
    made = [Layer(f"seed {seed}", synthetic(seed, 256, 576)) for seed in (0, 1, 2)]
    made += [Layer("seed 3, long rows", synthetic(3, 64, 1536)), *tiny]
    if spec.block in ((1, None), (None, None)):
        made.append(Layer("seed 4, rows of 100, not for groups", synthetic(4, 48, 100)))
    return tuple(made)


def stats_of(layer: Layer, dtype: torch.dtype = torch.float32) -> Stats | None:
    return None if layer.inputs is None else Stats.of(layer.inputs.to(dtype))


def quantize(
    method: str,
    spec: QuantSpec,
    options: Mapping[str, Any],
    layer: Layer,
    dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    return METHODS[method](layer.weight.to(dtype), spec, stats_of(layer, dtype), **options)


def awq(layer: Layer, spec: QuantSpec) -> tuple[Tensor, float]:
    """AWQ's factor for each input channel, and its alpha, which is the result of the search."""
    assert layer.inputs is not None
    x = layer.inputs.float()
    s = search_scale([(layer.weight, spec)], x, Site("layer", None, ()))  # type: ignore[arg-type]
    s_X = x.abs().mean(dim=0)
    alpha = (s.max() / s.min()).log() / (s_X.max() / s_X.min()).log()
    return s, round(float(alpha), 2)


def digest(method: str, spec: str, options: Mapping[str, Any]) -> str:
    """sha256 of labkit's codes, scales and zero points for all layers.

    What adds numbers up is done in float64 here, where no code hangs on the order of a sum.
    """
    grid, found = QuantSpec.parse(spec), hashlib.sha256()
    sums = method in ("gptq", "hqq") or options.get("observer", "minmax") != "minmax"
    for layer in layers(method, grid):
        if method == "awq_scale":
            # Symmetric with all codes, the largest weight of each group is a tie, and the last bit decides.
            clear = replace(grid, narrow=grid.zero == "none")
            found.update(f"{awq(layer, clear)[1]} ".encode())
            continue
        q = quantize(method, grid, options, layer, torch.float64 if sums else torch.float32)
        scale, zero = q.params.dense()
        for part in (q.codes, scale, *(() if zero is None or method == "hqq" else (zero,))):
            found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


def rounded(layer: Layer, spec: QuantSpec, s: Tensor) -> QuantizedTensor:
    """The layer with its input channels multiplied by s, to nearest."""
    return rtn((layer.weight * s).to(layer.weight.dtype), spec)
