"""``off_grid``: move the bundled model off the 4-bit grid it came on, without changing its function."""

from __future__ import annotations

import math

import torch

from labkit.models.fold import fold, sites
from labkit.models.llama import Llama

LARGEST = 1.15


@torch.no_grad()
def off_grid(model: Llama, seed: int = 0) -> Llama:
    """Fold a random factor in [1 / 1.15, 1.15] into every channel of every site; returns the same model.

    The bundled model's linears are Q4_1: within each group of 32 they take 16 evenly spaced values, which
    a 4-bit quantizer with groups of 32 would find again and call lossless. With a factor per column a
    group has up to 32 different grids, one per element, and none of them is found; with a factor per row
    alone it still would be. Logits before and after agree to 1e-3. Factors are uniform in their
    logarithm; the seed chooses them.
    """
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model).values():
        exponent = torch.rand(site.channels, generator=generator) * 2 - 1  # in [-1, 1)
        fold(site, torch.exp(exponent * math.log(LARGEST)))
    model.seed = seed
    return model
