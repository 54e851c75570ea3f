"""What kernels ask of their input, and of the weight; and the input on a grid."""

from __future__ import annotations

from torch import Size, Tensor

from labkit.quant import Blocks, QuantizedTensor, QuantSpec, fake_quantize, fit


def check_input(x: Tensor, shape: Size) -> None:
    """Raises ValueError where ``x`` (..., in_features) does not fit a weight of ``shape`` (out, in)."""
    if x.dim() == 0 or x.shape[-1] != shape[1] or not x.is_floating_point():
        raise ValueError(
            f"expected floating-point x with {shape[1]} input features last, "
            f"found {x.dtype} of shape {tuple(x.shape)}"
        )


def rounded(x: Tensor, input: QuantSpec | None) -> Tensor:
    """Activations ``x`` (..., in_features) on the grid ``input`` and back, by scales that ``fit`` finds for them now.

    None leaves them as they are. The gradient is straight-through. Raises ValueError for NaN and infinity.
    """
    return x if input is None else fake_quantize(x, input, fit(x.detach(), input))


def not_on_a_cpu(weight: QuantizedTensor) -> str | None:
    """What keeps any kernel for the CPU from taking ``weight``: it must be a matrix, there, of codes alone."""
    return not_on("the CPU", weight.codes.device.type == "cpu", weight)


def not_on(where: str, there: bool, weight: QuantizedTensor) -> str | None:
    """The same of a kernel for ``where``, and whether ``weight`` is there."""
    if weight.codes.dim() != 2 or weight.codes.numel() == 0:
        return f"the kernel wants a matrix that is not empty, found shape {tuple(weight.shape)}"
    if not there:
        return f"the kernel is for {where}, found codes on {weight.codes.device}"
    return None if weight.outliers is None else "it does not know outliers"


def not_of_groups(weight: QuantizedTensor, multiple: int) -> str | None:
    """Why codes are no table of one kind, or integers, on groups of columns that are a multiple of so many wide."""
    spec, width = weight.spec, width_of(weight)
    if spec.bits > 4 and not spec.is_integer:
        return f"above 4 bits the kernel is for integers, found {spec.format}"
    if spec.zero == "mean":
        return "it does not know the mean that was taken off"
    if width is None:
        return f"runs of {spec.block} cross rows of {weight.shape[1]}; use groups"
    if width % multiple and width < weight.shape[1]:
        return f"groups must be a multiple of {multiple}, found {width}"
    return None


def own_tables(weight: QuantizedTensor) -> bool:
    """Whether each row has a table of its own, instead of one for all."""
    return weight.table is not None and weight.table.dim() == 2


def uneven_act_order(weight: QuantizedTensor, width: int) -> str | None:
    """Why act-order cannot be undone by reordering columns: some group but the last has not ``width`` of them."""
    if weight.g_idx is None:
        return None
    sizes = weight.g_idx.bincount()
    even = bool((sizes[:-1] == width).all()) and int(sizes[-1]) <= width
    return None if even else f"act-order groups must hold {width} columns each"


def width_of(weight: QuantizedTensor) -> int | None:
    """Columns of a group; None where a flat run is not a part of one row."""
    block, columns = weight.spec.block, weight.shape[1]
    if isinstance(block, int):
        return block if columns % block == 0 else None
    return Blocks(tuple(weight.shape), block).size[1]


def per_row(part: Tensor, weight: QuantizedTensor) -> Tensor:
    """One for each row and group, (out, groups), of one for each block; flat runs must be parts of rows."""
    out = weight.shape[0]
    if part.dim() == 1:
        return part.reshape(out, -1)
    return part.repeat_interleave(Blocks(tuple(weight.shape), weight.spec.block).size[0], dim=0)[:out]
