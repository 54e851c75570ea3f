"""``off_grid``: move the bundled model off the 4-bit grid that its weights came on, without changing its function."""

from __future__ import annotations

from labkit.models.llama import Llama


def off_grid(model: Llama, seed: int = 0) -> Llama:
    return model
