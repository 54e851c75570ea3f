"""What every kernel asks of its input."""

from __future__ import annotations

from torch import Size, Tensor


def check_input(x: Tensor, shape: Size) -> None:
    """Raises ValueError where ``x`` (..., in_features) does not fit a weight of ``shape`` (out, in)."""
    if x.dim() == 0 or x.shape[-1] != shape[1] or not x.is_floating_point():
        raise ValueError(
            f"expected floating-point x with {shape[1]} input features last, "
            f"found {x.dtype} of shape {tuple(x.shape)}"
        )
