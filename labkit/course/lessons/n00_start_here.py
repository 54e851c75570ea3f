"""Notebook 00: the whole story, from fp32 to int4 behind one URL. What it asks, checks and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close
from labkit.quant import QuantSpec, encode, fit


def megabytes(parameters: int, bits: float) -> float:
    """The size of ``parameters`` numbers of ``bits`` bits each, in megabytes (10^6 bytes)."""
    return parameters * bits / 8 / 1e6


def _check_megabytes(fn: Callable[..., Any]) -> None:
    for parameters, bits in [(1_000_000, 8), (134_515_008, 32), (134_515_008, 4.3125)]:
        close(
            fn(parameters, bits),
            megabytes(parameters, bits),
            f"your size of {parameters:,} numbers of {bits} bits",
            mistakes={
                "that is in megabits; divide by 8, for there are 8 bits in a byte": parameters * bits / 1e6,
                "that is in bytes; divide by 1e6 for megabytes": parameters * bits / 8,
                "that takes bits for bytes upside down; bytes = bits / 8": parameters / bits / 1e6,
                "that divides by 2^20; a megabyte is 10^6 bytes here": parameters * bits / 8 / 2**20,
            },
        )


def bits_per_weight(bits: int, group: int, scale_bits: int, zero_bits: int) -> float:
    """What one weight costs when ``group`` weights share a scale and a zero point."""
    return bits + (scale_bits + zero_bits) / group


def _check_bits_per_weight(fn: Callable[..., Any]) -> None:
    for bits, group, scale_bits, zero_bits in [(4, 64, 16, 4), (3, 32, 16, 3), (8, 576, 16, 8)]:
        close(
            fn(bits, group, scale_bits, zero_bits),
            bits_per_weight(bits, group, scale_bits, zero_bits),
            f"your bits per weight for {bits} bits in groups of {group}",
            mistakes={
                "the scale and the zero point are missing; the group shares their cost": bits,
                "every weight pays for a whole scale there; the group shares it": bits
                + scale_bits
                + zero_bits,
                "the zero point is missing; it is shared like the scale": bits + scale_bits / group,
                "that is the cost of the whole group; divide by its size": bits * group
                + scale_bits
                + zero_bits,
            },
        )


EXERCISES = [
    Exercise(
        "00.1",
        "The size of a model",
        difficulty=1,
        minutes=3,
        statement="""
            A model has `parameters` numbers, and each takes `bits` bits. Return its size in megabytes. A byte has
            8 bits, and a megabyte is $10^6$ bytes.
        """,
        starter='''
            def my_megabytes(parameters: int, bits: float) -> float:
                """The size of `parameters` numbers of `bits` bits each, in megabytes (10^6 bytes)."""
                raise NotImplementedError
        ''',
        solution=megabytes,
        check=_check_megabytes,
        hints=[
            "How many bits are there in all?",
            "Divide by 8 for bytes.",
            "parameters * bits / 8, and then divide by 1e6.",
        ],
    ),
    Exercise(
        "00.2",
        "What a scale costs",
        difficulty=1,
        minutes=4,
        statement="""
            Every weight has a code of `bits` bits. Each `group` of weights shares one scale of `scale_bits` bits and
            one zero point of `zero_bits` bits. Return the bits per weight, everything counted.
        """,
        starter='''
            def my_bits_per_weight(bits: int, group: int, scale_bits: int, zero_bits: int) -> float:
                """Bits per weight: the code, and a share of the group's scale and zero point."""
                raise NotImplementedError
        ''',
        solution=bits_per_weight,
        check=_check_bits_per_weight,
        hints=[
            "What do the codes of one whole group cost, and what is stored beside them?",
            "Add the scale and the zero point once for the group, then divide by the group's size.",
            "bits + (scale_bits + zero_bits) / group",
        ],
    ),
]

QUIZ = [
    Question(
        "Why does int4 with groups of 64 cost more than 4 bits per weight?",
        {
            "Codes are padded to whole bytes": "Two 4-bit codes fill a byte exactly.",
            "Each group also stores a scale and a zero point": "20 bits for 64 weights: 0.3125 bits each.",
            "The head stays in fp32": "That counts for the model, not for the quantized layers.",
        },
        answer="b",
    ),
    Question(
        "What does KL measure here?",
        {
            "How far the predictions are from the original model's": "Averaged over every token scored.",
            "How often the answer is true": "The original is not always right either.",
            "How large the rounding errors of the weights are": "It looks at what comes out, not at the weights.",
        },
        answer="a",
    ),
    Question(
        "Why does the int4 model write faster, although the processor computes no faster?",
        {
            "It writes shorter answers": "Both were timed over the same number of tokens.",
            "It skips some layers": "All 30 layers run.",
            "Every token needs all weights from memory, and they are fewer bytes": "Notebook 01 measures just this.",
        },
        answer="c",
    ),
]


def row_on_grid(row: Tensor, bits: int = 4) -> go.Figure:
    """Weights ``row`` (n,) as they are, and as ``bits``-bit codes with one scale and zero point stand for them."""
    spec = QuantSpec.parse(f"int{bits} tensor asym")
    stored = encode(row, spec, fit(row, spec)).dequantize()
    n, used = len(row), len(stored.unique())
    made = plot.figure(
        f"{bits} bits offer {2**bits} values; these {n} weights use {used} of them",
        "position in the row",
        "weight",
    )
    positions = list(range(n))
    made.add_scatter(
        x=positions,
        y=row.tolist(),
        name="fp32",
        mode="markers",
        marker={"color": plot.BLUE, "symbol": "circle-open", "size": 8},
    )
    made.add_scatter(
        x=positions,
        y=stored.tolist(),
        name=f"{bits} bits",
        mode="lines",
        line={"color": plot.ORANGE, "shape": "hvh"},
    )
    coarse = QuantSpec.parse("int2 tensor asym")  # its grid may reach beyond the weights
    widest = encode(row, coarse, fit(row, coarse)).dequantize()
    edge = 1.1 * float(torch.cat([row, widest]).abs().max())  # one axis for all widths
    return made.update_yaxes(range=[-edge, edge])


def beside_each_other(rows: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """One small bar chart for each column of ``rows`` (model to column to number); the title compares both models."""
    columns = list(next(iter(rows.values())))
    before, after = rows.values()
    size, speed = (after[column] / before[column] for column in ("size (MB)", "tokens per second"))
    made = make_subplots(rows=1, cols=len(columns), subplot_titles=columns, horizontal_spacing=0.1)
    for i, column in enumerate(columns, start=1):
        numbers = [float(row[column]) for row in rows.values()]
        made.add_bar(
            x=list(rows),
            y=numbers,
            text=[f"{number:.3g}" for number in numbers],
            textposition="outside",
            cliponaxis=False,
            marker_color=[plot.BLUE, plot.ORANGE],
            row=1,
            col=i,
        )
        made.update_yaxes(range=[0, 1.2 * max(numbers)], row=1, col=i)
    made.update_layout(
        title_text=f"{size:.0%} of the size, {speed:.1f} times the tokens per second, and not quite the same",
        showlegend=False,
        height=plot.HEIGHT,
        width=plot.WIDTH,
        margin={"t": 90},
    )
    return made
