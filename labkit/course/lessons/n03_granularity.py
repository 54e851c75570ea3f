"""Notebook 03: granularity. What it asks, checks and draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import plotly.graph_objects as go
import torch
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, equal, number, require, tensor
from labkit.quant import Blocks, QuantSpec, fit, rtn, sqnr_db

GROUPS = (8, 16, 32, 64, 96, 192, 288, 576)  # each divides a row of 576 weights

# --- exercises


def group_scales(w: Tensor, group: int, bits: int) -> Tensor:
    """One scale for each run of ``group`` weights in a row: (rows, columns / group)."""
    groups = w.reshape(w.shape[0], -1, group)  # (rows, groups, group)
    return groups.abs().amax(dim=-1) / ((2**bits - 1) / 2)


def _check_group_scales(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for rows, columns, group, bits in [(4, 12, 3, 4), (2, 8, 4, 3), (4, 16, 4, 8), (3, 6, 6, 4)]:
        w = torch.randn(rows, columns, generator=generator)
        w[0, 0] = -9.0  # the largest of its group is negative
        half = (2**bits - 1) / 2
        expected = group_scales(w, group, bits)
        groups = w.reshape(rows, -1, group)
        mistakes = {
            "this is one scale for the whole matrix; each group of a row has its own": w.abs().max() / half,
            "this is one scale per row; each row has columns / group of them": w.abs().amax(1) / half,
            "this is one scale per row, with its axis kept; each row has columns / group of them": (
                w.abs().amax(1, keepdim=True) / half
            ),
            "you took the largest w; take the largest |w|": groups.amax(-1) / half,
            "you divide by 2**(bits-1) - 1, the narrow rule; divide by (2**bits - 1) / 2": groups.abs().amax(
                -1
            )
            / (2 ** (bits - 1) - 1),
            "you divide by 2**bits - 1, which is for the whole width 2a; a group reaches from -a to a": (
                groups.abs().amax(-1) / (2**bits - 1)
            ),
            "these are the largest weights; divide by (2**bits - 1) / 2 to get the step": groups.abs().amax(
                -1
            ),
            "you took the mean of |w|; take the largest": groups.abs().mean(-1) / half,
            "you kept the axis of the group; its maximum leaves (rows, columns / group)": (
                groups.abs().amax(-1, keepdim=True) / half
            ),
            "the groups run along the columns, inside a row; yours take every so-manyth weight": (
                w.reshape(rows, group, -1).abs().amax(1) / half
            ),
        }
        if rows % group == 0:
            down = w.reshape(-1, group, columns).abs().amax(1) / half
            mistakes["your groups run down a column; they run along a row"] = down
        found = tensor(
            fn(w.clone(), group, bits), "your scales", shape=tuple(expected.shape), mistakes=mistakes
        )
        close(found, expected, "your scale", mistakes=mistakes)


def bits_per_weight(
    rows: int, columns: int, group: int, bits: int, scale_bits: int, zero_bits: int
) -> float:
    """Bits that a matrix takes, divided by its weights: codes, scales and zero points."""
    groups = rows * -(-columns // group)  # the last group of a row may be a smaller one
    return (rows * columns * bits + groups * (scale_bits + zero_bits)) / (rows * columns)


def _check_bits_per_weight(fn):  # type: ignore[no-untyped-def]
    for case in [
        (192, 576, 64, 4, 16, 4),
        (192, 576, 576, 4, 16, 0),
        (192, 576, 128, 3, 16, 3),
        (7, 10, 4, 2, 32, 0),
    ]:
        rows, columns, group, bits, scale_bits, zero_bits = case
        weights = rows * columns
        expected = bits_per_weight(*case)
        whole, per_row = columns // group, -(-columns // group)
        each = scale_bits + zero_bits
        mistakes = {
            "you leave out the zero points; each group has one, of zero_bits": (
                bits + rows * per_row * scale_bits / weights if zero_bits else None
            ),
            "you leave out the scales and zero points": float(bits),
            f"{columns} weights in groups of {group} are {per_row} groups: the last one is smaller and has a scale "
            "too. Round up": bits + rows * whole * each / weights
            if columns % group
            else None,
            f"{columns} weights in groups of {group} are {per_row} groups, a whole number: the last one is smaller "
            "and has a scale too. Round up": bits + each / group
            if columns % group
            else None,
            "every row has groups of its own; multiply by rows": bits + per_row * each / weights if rows > 1 else None,
            "these are all the bits; divide by the number of weights": expected * weights,
            "these are bytes per weight; count bits": expected / 8,
            "this counts a scale for every weight; a group shares one": float(bits + each),
        }  # fmt: skip
        known = {sentence: value for sentence, value in mistakes.items() if value is not None}
        close(number(fn(*case), "your bits per weight"), expected, "your bits per weight", mistakes=known)


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the first in the low half: (rows, columns) to (rows, columns / 2), uint8."""
    low, high = codes[:, 0::2], codes[:, 1::2]
    return low | (high << 4)


def _check_pack(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for rows, columns in [(1, 4), (3, 10), (2, 64)]:
        codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[0, :4] = torch.tensor([1, 2, 15, 0])
        low, high = codes[:, 0::2].long(), codes[:, 1::2].long()
        half = columns // 2
        mistakes = {
            "the first code of each pair belongs into the low half of the byte, the second into the high half": (
                high | (low << 4)
            ),
            "you shift by 3; four bits make way for four, so shift by 4": low | (high << 3),
            "you add the codes without moving one of them; shift the second by four bits": low + high,
            "a byte holds two neighbours of a row; yours holds one from its first half and one from its second": (
                codes[:, :half].long() | (codes[:, half:].long() << 4)
            ),
            "these are the codes themselves, one to a byte; two of them share a byte": codes.long(),
            "you multiply by 15; moving by four bits is a factor of 16": low + 15 * high,
        }
        found = tensor(
            fn(codes.clone()), "your bytes", shape=(rows, half), integral=True, mistakes=mistakes
        )
        require(
            bool(((found >= 0) & (found <= 255)).all()),
            "a byte is between 0 and 255; yours leave that range",
        )
        equal(found, low | (high << 4), "your byte", mistakes=mistakes)


def unpack(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers behind packed codes: (rows, columns / 2) bytes to (rows, columns) float32."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)  # (rows, columns)
    group = codes.shape[1] // scale.shape[1]
    spread = lambda each: each.float().repeat_interleave(group, dim=1)  # noqa: E731
    return (codes.float() - spread(zero)) * spread(scale)


def _check_unpack(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for rows, columns, groups in [(2, 8, 2), (3, 24, 4), (1, 6, 1)]:
        packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(rows, groups, generator=generator) + 0.5).half()
        zero = torch.randint(1, 15, (rows, groups), generator=generator, dtype=torch.uint8)
        group = columns // groups
        low, high = packed & 15, packed >> 4
        codes = torch.stack([low, high], -1).flatten(1)
        s = scale.float().repeat_interleave(group, 1)
        z = zero.float().repeat_interleave(group, 1)
        mistakes = {
            "the low half of a byte holds the first of two codes; yours comes second": (
                (torch.stack([high, low], -1).flatten(1).float() - z) * s
            ),
            "your codes are in the wrong order: first all low halves, then all high ones. The two of a byte are "
            "neighbours": (torch.cat([low, high], 1).float() - z) * s,
            "you leave the zero point out": codes.float() * s,
            "you add the zero point; subtract it": (codes.float() + z) * s,
            "you subtract the zero point after scaling; it counts codes, so subtract it before": codes.float() * s - z,
            "codes and zero points are uint8, and 3 - 4 in uint8 is 255; make floats of them first": (
                codes - zero.repeat_interleave(group, 1)
            ).float()
            * s,
            "the scales are laid side by side over and over; each belongs to neighbours, which "
            "`repeat_interleave` gives": (
                (codes.float() - zero.float().repeat(1, group)) * scale.float().repeat(1, group)
            ),
            "these are codes without their scale": codes.float() - z,
            "these are the codes; subtract the zero point and multiply by the scale": codes.float(),
        }  # fmt: skip
        found = tensor(
            fn(packed.clone(), scale.clone(), zero.clone()),
            "your numbers",
            shape=(rows, columns),
            mistakes=mistakes,
        )
        # A product of float16 would be off by 1e-3.
        close(found, (codes.float() - z) * s, "your number", rtol=2e-3, mistakes=mistakes)


EXERCISES = [
    Exercise(
        "03.1",
        "A scale for each group",
        difficulty=1,
        minutes=8,
        statement="""
            `w` has shape `(rows, columns)`, and `group` divides `columns`. Give every run of `group`
            neighbours in a row a symmetric scale of its own:

            $$\\text{scale} = \\frac{\\max |w|}{(2^{\\text{bits}} - 1) / 2}$$

            Return them in the shape `(rows, columns / group)`.
        """,
        starter='''
            def my_group_scales(w: torch.Tensor, group: int, bits: int) -> torch.Tensor:
                """Symmetric scales, (rows, columns / group), of w (rows, columns)."""
                raise NotImplementedError
        ''',
        solution=group_scales,
        check=_check_group_scales,
        hints=[
            "One row of 6 weights in groups of 3 is two rows of 3. Which shape shows that?",
            "`w.reshape(rows, -1, group)` has the groups on its last axis.",
            "`.abs().amax(dim=-1)` takes the largest of each; then divide.",
        ],
    ),
    Exercise(
        "03.2",
        "Bits per weight",
        difficulty=2,
        minutes=8,
        statement="""
            A matrix is stored as one code of `bits` bits for each weight, and for each group one scale of
            `scale_bits` and one zero point of `zero_bits`. How many bits are that per weight?

            `group` need not divide `columns`. Then the last group of each row is smaller, and has a scale too.
        """,
        starter='''
            def my_bits_per_weight(
                rows: int, columns: int, group: int, bits: int, scale_bits: int, zero_bits: int
            ) -> float:
                """All bits of a (rows, columns) matrix over its number of weights."""
                raise NotImplementedError
        ''',
        solution=bits_per_weight,
        check=_check_bits_per_weight,
        hints=[
            "Count the groups first. In one row of 10 weights there are 3 groups of 4.",
            "`math.ceil(columns / group)` in each row, and there are `rows` rows.",
            "Codes: `rows * columns * bits`. Each group: `scale_bits + zero_bits`. Divide by the weights.",
        ],
    ),
    Exercise(
        "03.3",
        "Two codes in a byte",
        difficulty=1,
        minutes=6,
        statement="""
            `codes` are whole numbers from 0 to 15, as `uint8` of shape `(rows, columns)`, and `columns` is even.
            Put each pair of neighbours into one byte: the first in the low four bits, the second in the high four.
            Codes 1 and 2 become $1 + 2 \\cdot 16 = 33$. Return `uint8` of shape `(rows, columns / 2)`.
        """,
        starter='''
            def my_pack(codes: torch.Tensor) -> torch.Tensor:
                """(rows, columns) of uint8 codes below 16 to (rows, columns / 2) of bytes."""
                raise NotImplementedError
        ''',
        solution=pack,
        check=_check_pack,
        hints=[
            "`codes[:, 0::2]` are the first of each pair.",
            "`x << 4` moves a code into the high four bits.",
            "`first | (second << 4)`.",
        ],
    ),
    Exercise(
        "03.4",
        "From bytes to numbers",
        difficulty=2,
        minutes=12,
        statement="""
            The way back. `packed` holds two codes in a byte, as in 03.3. `scale` (float16) and `zero` (uint8) have
            shape `(rows, groups)`, and each belongs to a run of neighbours of a row:

            $$\\hat w = (\\text{code} - \\text{zero}) \\cdot \\text{scale}$$

            Return `float32` of shape `(rows, columns)`.
        """,
        starter='''
            def my_unpack(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
                """(rows, columns / 2) of bytes, scale and zero (rows, groups), to (rows, columns) of float32."""
                raise NotImplementedError
        ''',
        solution=unpack,
        check=_check_unpack,
        hints=[
            "`packed & 15` is the low half of each byte, `packed >> 4` the high one.",
            "`torch.stack([low, high], dim=-1).flatten(1)` puts the two of a byte beside each other.",
            "`scale.float().repeat_interleave(columns // groups, dim=1)` has one scale for each weight.",
        ],
    ),
]

QUIZ = [
    Question(
        "int4 with an fp16 scale for every 32 weights takes, per weight,",
        {
            "4.5 bits": "4, and 16 bits shared by 32.",
            "4.25 bits": "That is a group of 64.",
            "4 bits, scales do not count": "They are in the file and in memory, beside the codes.",
        },
        answer="a",
    ),
    Question(
        "Why is one scale per output row cheap for a matrix product, and one per column is not?",
        {
            "Rows are longer than columns": "Not in general: down_proj has longer rows, up_proj longer columns.",
            "A row's scale is a common factor of the row's sum": "It is applied once, after the sum. A column's scale "
            "differs from term to term.",
            "Columns cannot be packed": "They can. The arithmetic is what differs.",
        },
        answer="b",
    ),
    Question(
        "Double quantization stores the scales in 8 bits. What does it save at one fp32 scale for 64 weights?",
        {
            "8 bits per weight": "That is more than the scales take in all.",
            "About 0.37 bits per weight": "0.5 become 0.127: 8/64, and one fp32 for 256 scales.",
            "Nothing, the codes stay as they are": "The codes stay, the scales shrink.",
        },
        answer="b",
    ),
]

# --- pictures


def who_shares(block: str = "g4", rows: int = 6, columns: int = 16) -> go.Figure:
    """A small matrix, its elements in the colour of the scale that they share."""
    spec = QuantSpec.parse(f"int4 {block}")
    blocks = Blocks((rows, columns), spec.block)
    count = math.prod(blocks.grid)
    index = torch.arange(count).reshape(blocks.grid)
    z = blocks.spread(index).expand(blocks.matrix).reshape(rows, columns)
    # Neighbours to the right and below differ in colour, whichever way the blocks lie.
    across = blocks.grid[-1] if len(blocks.grid) == 2 else 1
    colour = (z % 7 if across == 1 else (z // across * 3 + z % across) % 7).int()
    steps = [[(i + end) / 7, c] for i, c in enumerate(plot.COLORS) for end in (0, 1)]
    weights = "weight" if rows * columns == count else "weights"
    made = plot.figure(
        f"int4 {block}: {count} scale{'s' if count > 1 else ''} of shape {blocks.grid}, "
        f"one for {-(-rows * columns // count)} {weights}",
        "column (input channel)",
        "row (output channel)",
        height=320,
    )
    made.add_heatmap(
        z=(colour + 0.5).tolist(),  # the middle of its colour
        zmin=0,
        zmax=7,
        colorscale=steps,
        showscale=False,
        text=z.tolist(),
        texttemplate="%{text}",
        textfont={"color": "white", "size": 12},
        xgap=1,
        ygap=1,
        hovertemplate="row %{y}, column %{x}: scale %{text}<extra></extra>",
    )
    made.update_xaxes(dtick=1, showgrid=False)
    return made.update_yaxes(autorange="reversed", dtick=1, showgrid=False)


def spread_of_scales(weight: Tensor) -> go.Figure:
    """How much smaller the scales of rows and of groups are than the one of the whole matrix."""
    whole = fit(weight, QuantSpec.parse("int4 tensor scale=fp32")).dense()[0].item()
    made = plot.figure(
        "How large a scale is, compared with one for the whole matrix",
        "own scale (share of the matrix's)",
        "part of the scales (%)",
        log_x=True,
    )
    edges = torch.logspace(-2.2, 0, 45)
    for name, spec, color, pattern in (
        ("a scale per row", "int4 channel scale=fp32", plot.BLUE, ""),
        ("a scale per 64", "int4 g64 scale=fp32", plot.ORANGE, "/"),
    ):
        scales = fit(weight, QuantSpec.parse(spec)).dense()[0].flatten() / whole
        counts = torch.histogram(scales.clamp(max=0.9999), edges).hist
        made.add_bar(
            x=(edges[:-1] * edges[1:]).sqrt().tolist(),
            y=(100 * counts / counts.sum()).tolist(),
            width=edges.diff().tolist(),
            name=name,
            opacity=0.7,
            marker={"color": color, "pattern": {"shape": pattern}},
        )
    made.update_layout(barmode="overlay", legend={"x": 0.02, "y": 0.98})
    return made.update_xaxes(tickvals=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])


def trade_of(weight: Tensor) -> Callable[..., go.Figure]:
    """A function of ``bits``, ``group`` and ``scale`` that draws error against bits per weight for ``weight``."""
    weight = weight.detach().float()

    @functools.cache
    def point(bits: int, group: int, scale: str) -> tuple[float, float]:
        """Bits per weight and SQNR."""
        q = rtn(weight, QuantSpec.parse(f"int{bits} g{group} scale={scale}"))
        return q.bits_per_weight, sqnr_db(weight, q)

    def trade(bits: int = 4, group: int = 64, scale: str = "fp16") -> go.Figure:
        """Each line is a number of bits, each mark on it a size of group."""
        size, sqnr = point(bits, group, scale)
        made = plot.figure(
            f"int{bits} in groups of {group}: {size:.3f} bits per weight, {sqnr:.1f} dB",
            "bits per weight, scales counted (bit)",
            "SQNR (dB)",
            height=460,
        )
        for i, width in enumerate((2, 3, 4, 5)):
            x, y = zip(*(point(width, g, scale) for g in GROUPS), strict=True)
            made.add_scatter(
                x=x,
                y=y,
                name=f"int{width}, {GROUPS[0]} to {GROUPS[-1]}",
                mode="lines+markers",
                line={"color": plot.COLORS[i], "dash": plot.DASHES[i]},
                marker={"symbol": plot.SYMBOLS[i], "size": 7},
                text=[f"groups of {g}" for g in GROUPS],
                hovertemplate="%{text}: %{x:.3f} bits, %{y:.2f} dB",
            )
        made.add_scatter(
            x=[size],
            y=[sqnr],
            name="chosen",
            mode="markers",
            marker={"symbol": "circle-open", "size": 20, "color": plot.BLACK, "line": {"width": 3}},
        )
        made.update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.03, "yanchor": "bottom"})
        made.update_xaxes(range=[1.9, 9.2])
        return made.update_yaxes(range=[0, 34])

    return trade
