"""MovingAverage: a range for tensors that come one batch after the other, such as activations."""

from __future__ import annotations

from torch import Tensor

from labkit.quant.fit import params_for, ranges
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import Params


class MovingAverage:
    """Each block's range as an exponential average over batches: ``lo += constant (lo of batch - lo)``.

    The first batch's range is taken as it is (Jacob et al. 2018, arXiv 1712.05877, section 3.1). A single
    batch with an outlier widens the range by ``constant`` of the difference and is forgotten again, where a
    running minimum and maximum would keep it.

    spec      the grid; its blocks must be as many in every batch: tensor, *x1, or a fixed shape
    constant  weight of the newest batch, above 0 and at most 1
    observer  which range of a batch is averaged: a name from OBSERVERS or a function of that kind
    """

    def __init__(
        self, spec: QuantSpec, constant: float = 0.01, observer: str | Observer = "minmax"
    ) -> None:
        if not 0 < constant <= 1:
            raise ValueError(f"constant must be above 0 and at most 1, found {constant}")
        self.spec, self.constant, self.observer = spec, constant, observer
        self.lo: Tensor | None = None  # in the shape of the scales
        self.hi: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """See a batch. Raises ValueError as ``fit`` does, and when it has other blocks than the first."""
        lo, hi = ranges(x, self.spec, self.observer)
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
            return
        if lo.shape != self.lo.shape:
            raise ValueError(
                f"{self.spec} cuts the first batch into {tuple(self.lo.shape)} blocks and this one, of shape "
                f"{tuple(x.shape)}, into {tuple(lo.shape)}; average per tensor, or give batches of one shape"
            )
        self.lo = self.lo + self.constant * (lo - self.lo)
        self.hi = self.hi + self.constant * (hi - self.hi)

    @property
    def params(self) -> Params:
        """Scale and zero point of the averaged range. Raises ValueError before the first batch."""
        if self.lo is None or self.hi is None:
            raise ValueError("no batch was seen yet: call add(x) first")
        return params_for(self.lo, self.hi, self.spec)
