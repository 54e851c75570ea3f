"""Which kernel multiplies by a quantized weight. A new kernel is one file and one line in BACKENDS."""

from __future__ import annotations

from typing import Protocol

from torch import Size, Tensor

from labkit.kernels.int4_cpu import Int4Cpu
from labkit.kernels.native_cpu import NativeCpu
from labkit.kernels.reference import Reference
from labkit.kernels.triton_gpu import TritonGpu, interpreted
from labkit.quant import QuantizedTensor, QuantSpec


class Prepared(Protocol):
    """A weight (out_features, in_features) laid out for one backend.

    Called with ``x`` (..., in_features) and an optional ``bias`` (out_features,) it gives
    ``x @ weight.T + bias``, shape (..., out_features), in the dtype of ``x``, which is rounded to the grid ``input``
    first where it was prepared with one. ``nbytes`` is what it holds in memory.
    """

    backend: str
    shape: Size

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


# In order of preference; the reference takes everything and stands last.
BACKENDS: dict[str, type[Int4Cpu] | type[NativeCpu] | type[TritonGpu] | type[Reference]] = {
    "triton_gpu": TritonGpu,
    "native_cpu": NativeCpu,
    "int4_cpu": Int4Cpu,
    "reference": Reference,
}


def backends(weight: QuantizedTensor, input: QuantSpec | None = None) -> dict[str, str | None]:
    """Every backend's name, with None where it takes ``weight`` and ``input`` and else the reason why not."""
    return {name: kind.why_not(weight, input) for name, kind in BACKENDS.items()}


def best(weight: QuantizedTensor, input: QuantSpec | None = None) -> str:
    """The name of the backend that takes ``weight`` and ``input`` where none is named: the first that can.

    Triton's interpreter shows that a kernel is right and is far too slow for anything else, so it must be named.
    """
    can = (name for name, kind in BACKENDS.items() if kind.why_not(weight, input) is None)
    return next(name for name in can if name != "triton_gpu" or not interpreted())


def prepare(weight: QuantizedTensor, backend: str = "auto", input: QuantSpec | None = None) -> Prepared:
    """``weight`` (out_features, in_features) laid out once for many products.

    ``backend`` is a name from BACKENDS; "auto" takes the first that can. ``input`` is the grid that activations are
    rounded to in each call, with scales of that call; None leaves them as they are. Raises ValueError where the named
    backend cannot.
    """
    if weight.codes.dim() != 2:
        raise ValueError(
            f"expected a weight (out_features, in_features), found shape {tuple(weight.shape)}"
        )
    if backend == "auto":
        backend = best(weight, input)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, found {backend!r}")
    reason = BACKENDS[backend].why_not(weight, input)
    if reason is not None:
        raise ValueError(
            f"{backend} cannot take {weight!r}: {reason}; backend='auto' falls back to the reference"
        )
    return BACKENDS[backend](weight, input)


def linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, input: QuantSpec | None = None
) -> Tensor:
    """``x @ weight.T + bias`` by the best backend: (..., in_features) to (..., out_features), dtype of x.

    Prepares the weight each time: keep ``prepare(weight, input=input)`` where it is used more than once.
    """
    return prepare(weight, input=input)(x, bias)
