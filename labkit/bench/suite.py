"""Which works there are, run one after another, and their rows for reading."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from labkit.bench.measure import Row, Setting

OPTIONS = {  # of each kind, beside --threads
    "kernels": ("rounds", "size", "device"),
    "model": ("rounds", "model", "recipe"),
    "serve": ("rounds", "model"),
    "quantize": ("rounds", "model"),
}
KINDS = tuple(OPTIONS)
COLUMNS = ("work", "ours", "", "beside", "", "unit", "ratio", "goal", "KL ours / theirs")


def run(
    kinds: Sequence[str],
    setting: Setting,
    *,
    name: str | None = None,
    recipe: str | None = None,
    rounds: int | None = None,
    size: int | None = None,
    device: str = "cpu",
) -> Iterator[list[Row]]:
    """The rows of these kinds of work, as many at once as a work has peers.

    name    of the model, as ``models.load`` takes it
    recipe  what stands beside llama.cpp
    rounds  of every work, instead of its own number
    size    rows and columns of the weight that the kernels multiply by
    device  that they run on: "cpu", or "cuda" for those in Triton
    """
    torch.set_num_threads(setting.threads)
    more = {} if rounds is None else {"rounds": rounds}

    given = {"rounds": rounds, "size": size, "model": name, "recipe": recipe}
    given["device"] = None if device == "cpu" else device

    def part(kind: str) -> Setting:
        """With the command that repeats this kind alone."""
        words = ["labkit", "bench", kind, "--threads", str(setting.threads)]
        for option in OPTIONS[kind]:
            words += [] if given[option] is None else [f"--{option}", str(given[option])]
        return replace(setting, command=shlex.join(words))

    if "kernels" in kinds and device != "cpu":
        from labkit.bench.gpu import ROUNDS, SHAPES, gpu

        shapes = SHAPES if size is None else [(size, size)]
        yield from gpu(part("kernels"), device, rounds or ROUNDS, shapes=shapes)
    elif "kernels" in kinds:
        from labkit.bench.kernels import SIZE, kernels

        yield from kernels(part("kernels"), size or SIZE, **more)
    if "model" in kinds:
        from labkit.bench.model import RECIPE, model

        yield from model(part("model"), name, recipe or RECIPE, **more)
    if "serve" in kinds:
        from labkit.bench.serve import serve

        yield from serve(part("serve"), name, **more)
    if "quantize" in kinds:
        from labkit.bench.quantize import quantize

        yield from quantize(part("quantize"), name, **more)


def lines(rows: Sequence[Row]) -> list[str]:
    """A work for reading: what ours reached, and below it a line for each peer."""
    if not rows:
        return []
    first = rows[0]
    told = [f"{first.work}: {first.ours_name} {number(first.ours)} {first.unit}{_kl(first.ours_kl)}"]
    for row in rows:
        theirs = f"{row.peer_name} {number(row.peer)}{_kl(row.peer_kl)}"
        told.append(f"  {ratio(row):22}  {theirs}{_goal(row)}")
    return told


def cells(row: Row) -> list[str]:
    """A row's texts, one for each of ``COLUMNS``."""
    known = row.ours_kl is not None or row.peer_kl is not None
    kl = f"{number(row.ours_kl)} / {number(row.peer_kl)}" if known else ""
    sides = row.ours_name, number(row.ours), row.peer_name, number(row.peer)
    return [row.work, *sides, row.unit, ratio(row), goal(row), kl]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown, each with the command that repeats it."""
    lines = [("work", "ours", "beside", "ratio", "goal", "KL, ours / theirs", "repeat"), ("---",) * 7]
    for row in rows:
        work, ours, found, peer, theirs, unit, ratio, goal, kl = cells(row)
        sides = f"{ours}{_head(row.ours_head)}: {found} {unit}", f"{peer}{_head(row.peer_head)}: {theirs}"
        lines.append((work, *sides, ratio, goal, kl, f"`{row.command}`"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _head(format: str | None) -> str:
    return "" if format is None else f", head {format}"


def number(value: float | None) -> str:
    """Three digits, or all of a whole number; a dash for what there is not."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(row: Row) -> str:
    """``1.52 (1.49 to 1.55)``; a dash where one side was not measured."""
    if row.ratio is None or row.ratio_quartiles is None:
        return "-"
    low, high = row.ratio_quartiles
    return f"{row.ratio:.2f} ({low:.2f} to {high:.2f})"


def goal(row: Row) -> str:
    """``1.5 met``, ``1.5 not met``, or nothing where the row has none."""
    if row.goal is None:
        return ""
    said = {True: "met", False: "not met", None: "not measured"}[row.met]
    if row.met is False and row.ratio is not None and row.ratio >= row.goal:
        said += ": the KL is worse"
    return f"{row.goal:g} {said}"


def _goal(row: Row) -> str:
    return f"; goal {goal(row)}" if row.goal is not None else ""


def _kl(value: float | None) -> str:
    return "" if value is None else f", KL {value:.4f}"
