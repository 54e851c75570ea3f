"""Measured numbers, held against what the text says.

``claim`` is for what a measurement must bear out on any machine; ``verdict`` for times, which depend on the machine.
"""

from __future__ import annotations

import math


def claim(
    what: str,
    value: float,
    *,
    about: float | None = None,
    within: float | str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
) -> None:
    """Print ``what`` was measured and what the text says; raise AssertionError with both when it does not hold.

    Either ``about`` with ``within`` (absolute, or "5%" of ``about``), or ``at_least``, ``at_most`` or both.
    """
    value = float(value)
    unit = f" {unit}" if unit else ""
    if about is not None:
        if within is None or at_least is not None or at_most is not None:
            raise TypeError(
                "claim() takes about= together with within=, and then neither at_least= nor at_most="
            )
        tolerance = _tolerance(within, about)
        holds = abs(value - about) <= tolerance
        says = (
            f"about {_number(about)}{unit}, within {within if isinstance(within, str) else _number(within)}"
        )
    elif at_least is not None or at_most is not None:
        if within is not None:
            raise TypeError("claim() takes within= only together with about=")
        holds, says = _bounds(value, at_least, at_most, unit)
    else:
        raise TypeError("claim() needs what the text says: about= with within=, at_least= or at_most=")
    line = f"{what}: {_number(value)}{unit} (the text says {says})"
    print(line)
    if not holds:
        raise AssertionError(f"{what}: measured {_number(value)}{unit}, the text says {says}")


def verdict(
    what: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    because: str,
    unit: str = "",
) -> bool:
    """Print a measured time or ratio and whether it is as the text expects; give back whether it is. Never
    raises for it.

    ``because`` names the usual reason why a machine differs; it is printed only where it does.
    """
    unit = f" {unit}" if unit else ""
    holds, says = _bounds(float(value), at_least, at_most, unit)
    line = f"{what}: {_number(float(value))}{unit}, expected {says}: "
    print(line + ("as expected" if holds else f"not on this machine, because {because}"))
    return _Quiet(holds)  # type: ignore[return-value]


class _Quiet(int):
    """A truth value that a notebook does not echo when the call is a cell's last line."""

    def __new__(cls, value: bool) -> _Quiet:
        return super().__new__(cls, bool(value))

    def __repr__(self) -> str:
        return repr(bool(self))

    def _ipython_display_(self) -> None:
        return


def _bounds(value: float, at_least: float | None, at_most: float | None, unit: str) -> tuple[bool, str]:
    parts = []
    if at_least is not None:
        parts.append(f"at least {_number(at_least)}{unit}")
    if at_most is not None:
        parts.append(f"at most {_number(at_most)}{unit}")
    if not parts:
        raise TypeError("say what is expected: at_least=, at_most= or both")
    # NaN compares false with everything, so it never passes
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return holds and not math.isnan(value), " and ".join(parts)


def _tolerance(within: float | str, about: float) -> float:
    if isinstance(within, str):
        number, percent, rest = within.partition("%")
        if percent != "%" or rest.strip():
            raise ValueError(f"within must be a number or a percentage such as '5%', found {within!r}")
        return abs(about) * float(number) / 100
    return within


def _number(value: float) -> str:
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
