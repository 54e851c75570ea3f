"""A learner's Triton kernel, launched in Triton's interpreter under guard.

On a GPU a kernel that reads or writes outside its arguments spoils something else or stops the program, and in the
interpreter it would read and write this process's memory. Here each access is looked at first: the one that goes
wrong is named, with its program, and does not happen. What was written by which program is kept, so that a picture can
show it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.course.check import Wrong

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
except ModuleNotFoundError:
    # torch's builds without CUDA bring no Triton; a lesson can be listed all the same
    class triton:  # type: ignore[no-redef]
        @staticmethod
        def jit(function: Any) -> Any:
            return function

    tl = interpreter = None

GAP = 1 << 16  # bytes between two arguments, so that the end of one is not the beginning of another


def launch(kernel: Any, grid: Sequence[int], outputs: Sequence[str], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` in the interpreter; tensors named in ``outputs`` may be written, and are
    given ``programs``, the number of the program that wrote each element, -1 where none did.

    Raises Wrong for an access outside an argument, for a write to an input, and where two programs write one
    element; else what the kernel raised.
    """
    if interpreter is None:
        raise Wrong("triton was not found; on Linux torch's CUDA build brings it, and a GPU is not needed.")
    if not hasattr(kernel, "fn") or not hasattr(kernel, "arg_names"):
        raise Wrong("this is a plain function; a kernel has @triton.jit in the line above its def.")
    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise Wrong(
            'triton was imported before TRITON_INTERPRET was "1"; restart the kernel and run from the top.'
        )
    names = kernel.arg_names[: len(args)]
    spaces = {
        n: _Space(n, a, n in outputs) for n, a in zip(names, args, strict=False) if isinstance(a, Tensor)
    }
    given = [spaces[n].inside if n in spaces else a for n, a in zip(names, args, strict=False)]
    given += args[len(names) :]
    with _guarded(list(spaces.values())):
        try:
            kernel[tuple(grid)](*given, **constants)
        except interpreter.InterpreterError as error:
            raise _cause(error) from None
    for name, tensor in zip(names, args, strict=False):
        if name in outputs:
            tensor.copy_(spaces[name].inside)
            tensor.programs = torch.from_numpy(spaces[name].programs).reshape(tensor.shape)


def written(found: Tensor, name: str) -> None:
    """Refuse an output of ``launch`` with elements that no program wrote."""
    missing = found.programs < 0  # type: ignore[attr-defined]
    if bool(missing.any()):
        first = ", ".join(str(i) for i in torch.nonzero(missing)[0].tolist())
        raise Wrong(
            f"no program wrote {name}[{first}]: {int(missing.sum())} of {missing.numel()} elements were left as "
            f"they were."
        )


class _Space:
    """One tensor argument with room on both sides."""

    def __init__(self, name: str, tensor: Tensor, output: bool) -> None:
        self.name, self.output, self.size = name, output, tensor.element_size()
        gap = GAP // self.size
        room = torch.zeros(tensor.numel() + 2 * gap, dtype=tensor.dtype)
        self.inside = room[gap : gap + tensor.numel()].view(tensor.shape)
        self.inside.copy_(tensor)
        self.start, self.count = self.inside.data_ptr(), tensor.numel()
        self.programs = np.full(self.count, -1, dtype=np.int64)

    def index(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses.astype(np.int64) - self.start) // self.size


class _Guard:
    """Stands where the interpreter keeps what touches memory."""

    def __init__(self, real: Any, spaces: list[_Space]) -> None:
        self._real, self._spaces = real, spaces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, addresses: np.ndarray, mask: np.ndarray, other: Any, dtype: Any) -> Any:
        self._look(addresses, mask, "reads", "tl.load")
        return self._real.load(addresses, mask, other, dtype)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        space, index = self._look(addresses, mask, "writes", "tl.store")
        if space is not None:
            self._note(space, index)
        return self._real.store(addresses, value, mask)

    def _look(
        self, addresses: np.ndarray, mask: np.ndarray, verb: str, call: str
    ) -> tuple[_Space | None, np.ndarray]:
        seen = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].ravel()
        if not len(seen):
            return None, seen
        middle = int(np.median(seen.astype(np.int64)))
        space = min(
            self._spaces, key=lambda s: max(s.start - middle, middle - s.start - s.count * s.size, 0)
        )
        index = space.index(seen)
        outside = (index < 0) | (index >= space.count)
        if outside.any():
            raise Wrong(
                f"{_program()} {verb} {space.name}[{index[outside][0]}] (counted from its first element), and "
                f"{space.name} has {space.count} elements: {int(outside.sum())} of the {len(seen)} places lie outside. "
                f"Does the mask of {call} leave them out?"
            )
        if verb == "writes" and not space.output:
            raise Wrong(f"{_program()} writes into {space.name}, which is an input.")
        return space, index

    def _note(self, space: _Space, index: np.ndarray) -> None:
        grid, at = interpreter.interpreter_builder.grid_dim, interpreter.interpreter_builder.grid_idx
        number = (at[0] * grid[1] + at[1]) * grid[2] + at[2]
        before = space.programs[index]
        twice = (before >= 0) & (before != number)
        if twice.any():
            other = np.unravel_index(int(before[twice][0]), grid)
            raise Wrong(
                f"{_program()} writes {space.name}[{index[twice][0]}] (counted from its first element), which "
                f"{_program(other)} wrote already; on a GPU the one that comes last would stay. Each program "
                f"needs places of its own."
            )
        space.programs[index] = number


def _program(at: Any = None) -> str:
    grid = interpreter.interpreter_builder.grid_dim
    at = interpreter.interpreter_builder.grid_idx if at is None else at
    used = max([i + 1 for i in range(3) if grid[i] > 1], default=1)
    return f"program ({', '.join(str(int(i)) for i in at[:used])})"


@contextmanager
def _guarded(spaces: list[_Space]) -> Iterator[None]:
    real = interpreter._interpreter
    interpreter._interpreter = _Guard(real, spaces)
    try:
        yield
    finally:
        interpreter._interpreter = real


def _cause(error: BaseException) -> BaseException:
    """What a kernel raised, without what the interpreter wraps around it."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error
