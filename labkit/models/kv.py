"""What a model's keys and values are kept in."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class KVSpec:
    """The format of the keys, after their rotation, and of the values: fp32, or fp16, which halves what a step reads.

    Attention computes in float32 either way. Raises ValueError for other names.
    """

    key: str = "fp32"
    value: str = "fp32"

    def __post_init__(self) -> None:
        for f in fields(self):
            if (name := getattr(self, f.name)) not in DTYPES:
                raise ValueError(f"kv.{f.name} must be one of {', '.join(DTYPES)}, found {name!r}")

    def round(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, of any shape, as they come back from where they are kept, in their own dtypes.

        fp32 leaves them as they are, float64 too.
        """
        return _kept(k, self.key), _kept(v, self.value)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Those of keys and values."""
        return DTYPES[self.key], DTYPES[self.value]


def _kept(x: Tensor, name: str) -> Tensor:
    return x if name == "fp32" else x.to(DTYPES[name]).to(x.dtype)
