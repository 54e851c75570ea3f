"""Runs a learner's function so that nothing it does reaches the notebook as a traceback.

Arguments are copies. Exceptions, exits, endless loops and unusable results become a sentence; what it prints is kept
apart; random state, default dtype and gradient mode are put back.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from labkit.course.check import Wrong, describe

MAX_PRINTED = 2000  # characters of a learner's own print() that a report repeats


@dataclass(frozen=True)
class Finding:
    """What a check found: ``message`` says what is wrong, or what could be better where nothing is; ``given`` what
    the function was called with."""

    state: Literal["right", "not yet", "not attempted"]
    message: str = ""
    given: str = ""
    printed: str = ""
    figure: Any = None  # shows where it is wrong


class _NotAttempted(BaseException):
    pass


class _TimeIsUp(BaseException):
    pass


class _Printed(io.StringIO):
    """Keeps the first characters and forgets the rest, so that a print in an endless loop costs no memory."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, MAX_PRINTED - self.tell())])
        return len(text)

    def close(self) -> None:
        """A learner who closes sys.stdout closes nothing."""


class _Watched:
    """The learner's function as a check sees it: called with copies, its failures turned into sentences."""

    def __init__(self, function: Callable[..., Any], launch: Callable[..., Any] | None = None) -> None:
        self.function = function
        self.launch = launch
        self.given = ""
        self.__name__ = getattr(function, "__name__", "your function")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.launch is not None:
            call: Callable[..., Any] = partial(self.launch, self.function)
        else:
            call = self.function
            _refuse_wrong_signature(self.function, args, kwargs)
        self.given = _given(call, args, kwargs)
        try:
            return call(*_copied(args), **_copied(kwargs))
        except (_TimeIsUp, _NotAttempted, Wrong):
            raise
        except NotImplementedError as error:
            if _from_torch(error):
                raise Wrong(self._raised(error)) from error
            raise _NotAttempted from error
        except RecursionError as error:
            raise Wrong(
                "your function called itself without end (RecursionError). When does it stop?"
            ) from error
        except SystemExit as error:
            raise Wrong(
                "your function tried to end Python (SystemExit); it should return a value instead."
            ) from error
        except KeyboardInterrupt as error:
            raise Wrong("your function was interrupted before it returned.") from error
        except BaseException as error:
            raise Wrong(self._raised(error)) from error

    def _raised(self, error: BaseException) -> str:
        return _raised(error, self.__name__ if self.launch is not None else None)


def examine(
    check: Callable[[Callable[..., Any]], str | None],
    function: Any,
    *,
    seconds: float,
    launch: Callable[..., Any] | None = None,
) -> Finding:
    """Run ``check`` on ``function`` and say what it found; ``seconds`` is the limit for all of it.

    A kernel is not called but launched: then the check's arguments go to ``launch(function, *args)``.

    The limit needs the main thread of a POSIX system; elsewhere there is none.
    """
    if not callable(function):
        return Finding(
            "not yet",
            f"check() got {describe(function)}; expected the function itself. "
            "Hand over its name without parentheses: .check(my_function)",
        )
    watched = _Watched(function, launch)
    figure = None
    printed = _Printed()
    try:
        with _state_kept(), _limit(seconds), contextlib.redirect_stdout(printed):
            remark = check(watched)
    except _NotAttempted:
        return Finding("not attempted")
    except _TimeIsUp:
        message = (
            f"your function had not finished after {seconds:g} seconds. Is there a loop that never ends?"
        )
    except Wrong as wrong:
        message, figure = str(wrong), wrong.figure
    except KeyboardInterrupt:
        message = "the check was interrupted before it was through."
    except Exception as error:
        # The check read the answer in a way that this answer does not allow.
        message = f"what your function returned could not be read: {_one_line(error)}."
    else:
        return Finding("right", remark or "", printed=printed.getvalue().rstrip())
    return Finding("not yet", message, watched.given, printed.getvalue().rstrip(), figure)


def _given(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """``x = a float32 tensor of shape (4, 8), bits = 4``; the learner's own names where they are known."""
    try:
        names = [p.name for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        names = []
    parts = [f"{names[i]} = {describe(a)}" if i < len(names) else describe(a) for i, a in enumerate(args)]
    parts += [f"{name} = {describe(value)}" for name, value in kwargs.items()]
    return ", ".join(parts)


def _refuse_wrong_signature(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        called = ", ".join(["_"] * len(args) + [f"{name}=_" for name in kwargs])
        raise Wrong(
            f"your function takes {signature}, the check calls it as ({called}): {error}. "
            "Keep the signature of the starter cell."
        ) from error


def _copied(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return value  # a whole model: too large to copy for each call
    if isinstance(value, torch.Tensor):
        # A gradient that the check asks for reaches the check's own tensor.
        return value.clone() if value.requires_grad else value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _raised(error: BaseException, kernel: str | None) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if kernel is not None:  # below what launches it
        frames = [f for f in frames if f.name == kernel]
    line = f" in the line `{frames[0].line}`" if frames and frames[0].line else ""
    return f"your function raised {_one_line(error)}{line}."


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _from_torch(error: NotImplementedError) -> bool:
    """torch raises NotImplementedError too, for a dtype that an operation lacks: that is an attempt."""
    text = str(error)
    return "not implemented for" in text or text.startswith("Could not run")


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the block after ``seconds``, and again each half second if it was swallowed."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    rings = 0

    def ring(_: int, frame: FrameType | None) -> None:
        nonlocal rings
        rings += 1
        if (
            rings > 1
        ):  # the first was caught by an `except:` in a loop; this one is raised again inside that handler
            while frame is not None and frame.f_code.co_filename != __file__:
                frame.f_trace = raise_at_next_line
                frame = frame.f_back
            sys.settrace(raise_at_next_line)
        raise _TimeIsUp

    def raise_at_next_line(_: FrameType, event: str, __: object) -> Any:
        if event == "line":
            raise _TimeIsUp  # Python takes a trace function that raises out of use
        return raise_at_next_line

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if rings > 1:
            sys.settrace(None)
        signal.signal(signal.SIGALRM, before)
        if timer[0]:
            signal.setitimer(signal.ITIMER_REAL, *timer)
