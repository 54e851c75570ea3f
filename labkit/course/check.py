"""The words in which an exercise's check says what is wrong.

A check calls the learner's function and hands what came back to these helpers. Each raises :class:`Wrong`
with a sentence that says what was expected and what was found; ``mistakes`` maps a sentence to the value
that this mistake would give, so that a known mistake is named instead of described.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mistakes = Mapping[str, Any]


class Wrong(Exception):
    """The learner's answer is wrong; the message says how, and ``figure``, where a check sets it, shows where."""

    figure: Any = None


def require(condition: object, message: str) -> None:
    """Refuse with ``message`` unless ``condition`` holds."""
    if not bool(condition):
        raise Wrong(message)


def tensor(
    found: Any,
    name: str = "your result",
    *,
    shape: tuple[int, ...] | None = None,
    integral: bool = False,
    finite: bool = True,
    mistakes: Mistakes | None = None,
) -> Tensor:
    """``found`` as a plain tensor, whatever float or integer dtype it has.

    Arrays, and Python numbers where ``shape`` is (), are taken too. Refused: anything else, another shape,
    NaN or infinity (unless ``finite`` is off), and with ``integral`` values that are not whole numbers.
    """
    wanted = "a tensor" if shape is None else f"a tensor of shape {shape}"
    if found is None:
        raise Wrong(
            f"{name} is None; expected {wanted}. Does every path of your function return something?"
        )
    if isinstance(found, np.ndarray | np.generic):
        found = torch.as_tensor(np.asarray(found))
    elif isinstance(found, bool | int | float) and shape == ():
        found = torch.tensor(found, dtype=torch.float64 if isinstance(found, float) else torch.int64)
    if not isinstance(found, Tensor):
        raise Wrong(f"{name} is {describe(found)}; expected {wanted}.")
    if found.is_complex() or found.is_quantized or found.layout != torch.strided:
        raise Wrong(f"{name} is {describe(found)}; expected {wanted} of plain real numbers.")
    found = found.detach().as_subclass(Tensor).cpu()
    if shape is not None and tuple(found.shape) != tuple(shape):
        _name_mistake(found, mistakes)
        raise Wrong(f"{name} has shape {tuple(found.shape)}; expected {tuple(shape)}.")
    if finite and found.is_floating_point() and not bool(torch.isfinite(found).all()):
        kind, count = _not_finite(found)
        raise Wrong(
            f"{name} holds {count} {kind}, the first at {_where(~torch.isfinite(found))}; expected finite numbers."
        )
    if integral and found.is_floating_point() and bool((found != found.round()).any()):
        at = found != found.round()
        raise Wrong(
            f"{name} holds {_value(found[at][0])} at {_where(at)}; expected whole numbers. Is there a rounding?"
        )
    return found


def number(found: Any, name: str = "your result") -> float:
    """``found`` as a Python float; a tensor or array of one element is taken too. Refused: anything else, NaN."""
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex():
        found = found.detach().item()
    elif isinstance(found, np.ndarray | np.generic) and np.size(found) == 1:
        found = np.asarray(found).item()
    if isinstance(found, bool) or not isinstance(found, int | float):
        hint = " Does every path of your function return something?" if found is None else ""
        raise Wrong(f"{name} is {describe(found)}; expected one number.{hint}")
    if math.isnan(found):
        raise Wrong(f"{name} is NaN; expected a number. A division by zero, or the logarithm of zero?")
    return float(found)


def equal(
    found: Any, expected: Any, name: str = "your result", *, mistakes: Mistakes | None = None
) -> None:
    """Refuse unless ``found`` equals ``expected`` exactly (tensors: same shape and values, any dtype)."""
    if not isinstance(expected, Tensor):
        same_kind = isinstance(found, type(expected)) or (
            isinstance(expected, int | float) and isinstance(found, int | float)
        )
        if same_kind and bool(found == expected):
            return
        _name_mistake(found, mistakes)
        raise Wrong(f"{name} is {describe(found)}; expected {describe(expected)}.")
    close(found, expected, name, rtol=0.0, atol=0.0, mistakes=mistakes)


def close(
    found: Any,
    expected: Any,
    name: str = "your result",
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    mistakes: Mistakes | None = None,
) -> None:
    """Refuse unless ``found`` is ``expected`` within ``atol + rtol * |expected|``, element by element, in any dtype."""
    if not isinstance(expected, Tensor):
        value = number(found, name)
        if math.isclose(value, float(expected), rel_tol=rtol, abs_tol=atol):
            return
        _name_mistake(value, mistakes, rtol, atol)
        raise Wrong(f"{name} is {_value(value)}; expected {_value(expected)}.")
    found = tensor(found, name, shape=tuple(expected.shape), mistakes=mistakes)
    far = ~torch.isclose(found.double(), expected.double(), rtol=rtol, atol=atol)
    if not bool(far.any()):
        return
    _name_mistake(found, mistakes, rtol, atol)
    at = _where(far)
    share = f"{int(far.sum())} of {far.numel()} elements differ" if far.numel() > 1 else "it differs"
    raise Wrong(
        f"{name} is {_value(found[far][0])}{at and f' at {at}'}; expected {_value(expected[far][0])} ({share})."
    )


def describe(value: Any) -> str:
    """A short phrase for a value: its kind, shape and dtype, and the numbers where there are few."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        shape = tuple(value.shape)
        text = f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {shape}"
        few = isinstance(value, np.ndarray) or (value.layout == torch.strided and not value.is_quantized)
        if few and 0 < math.prod(shape) <= 8:
            text += f" {_nested(value.tolist())}"
        return text
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    if isinstance(value, list | tuple | dict | set) and len(value) > 8:
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor | np.ndarray) for v in value):
        return f"a {type(value).__name__} of ({', '.join(describe(v) for v in value)})"
    if value is None or isinstance(value, bool | int | str | bytes | list | tuple | dict | set):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, float):
        return _value(value)
    return f"a {type(value).__name__}"


def _name_mistake(found: Any, mistakes: Mistakes | None, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Refuse with the sentence of the first known mistake whose value is what was found."""
    for sentence, value in (mistakes or {}).items():
        if isinstance(value, Callable):  # type: ignore[arg-type]
            value = value()
        if _same(found, value, rtol, atol):
            raise Wrong(sentence)


def _same(found: Any, value: Any, rtol: float, atol: float) -> bool:
    if isinstance(value, Tensor):
        return (
            isinstance(found, Tensor)
            and found.shape == value.shape
            and bool(torch.allclose(found.double(), value.double(), rtol=rtol, atol=atol, equal_nan=True))
        )
    if isinstance(value, int | float) and isinstance(found, int | float):
        return math.isclose(found, value, rel_tol=rtol, abs_tol=atol)
    return type(found) is type(value) and bool(found == value)


def _where(mask: Tensor) -> str:
    """The index of the first true element, as a person writes it."""
    if mask.dim() == 0:
        return ""
    first = torch.nonzero(mask)[0].tolist()
    return f"[{', '.join(str(i) for i in first)}]"


def _not_finite(x: Tensor) -> tuple[str, int]:
    nan = int(torch.isnan(x).sum())
    return ("NaN", nan) if nan else ("infinities", int(torch.isinf(x).sum()))


def _value(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _nested(value: Any) -> str:
    return f"[{', '.join(_nested(v) for v in value)}]" if isinstance(value, list) else _value(value)
