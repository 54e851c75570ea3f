"""Notebook 02: scale and zero point. What it asks, checks and draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, equal, number, require, tensor
from labkit.quant import Grid, QuantSpec, fake_quantize, fit, params_for, rounding_and_clipping, sqnr_db

# --- exercises


def quantize(x: Tensor, scale: float, lowest: int, highest: int) -> Tensor:
    """Whole codes of ``x`` (any shape): round half to even, then clamp to lowest .. highest."""
    return torch.round(x / scale).clamp(lowest, highest).to(torch.int16)


def _check_quantize(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    cases = [
        (torch.tensor([-1.25, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 9.0, -9.0, 100.0]), 0.5, -8, 7),
        (torch.tensor([[0.7, -0.2], [1.3, 2.9]]), 0.25, -4, 3),
        (torch.randn(3, 5, generator=generator), 0.125, -7, 7),
    ]
    for x, scale, lowest, highest in cases:
        steps = x / scale
        expected = quantize(x, scale, lowest, highest)
        mistakes = {
            "your codes leave the range; clamp them to lowest .. highest": steps.round(),
            "you round half up; a tie goes to the even neighbour (torch.round does that)": (steps + 0.5)
            .floor()
            .clamp(lowest, highest),
            "you cut off the fraction; round to the nearest whole number": steps.trunc().clamp(
                lowest, highest
            ),
            "you round down; round to the nearest whole number": steps.floor().clamp(lowest, highest),
            "you multiply by the scale; the code counts steps, so divide": (x * scale)
            .round()
            .clamp(lowest, highest),
            "you clamp x before dividing; lowest and highest are codes, so clamp after": (
                x.clamp(lowest, highest) / scale
            ).round(),
            "200 steps do not fit into int8, so the code wrapped around; clamp before you cast": steps.round()
            .to(torch.int8)
            .clamp(lowest, highest),
            "these are the numbers again, not codes; stop before multiplying by the scale": expected
            * scale,
        }
        found = tensor(fn(x, scale, lowest, highest), "your codes", shape=tuple(x.shape), mistakes=mistakes)
        equal(found, expected, "your code", mistakes=mistakes)


def dequantize(codes: Tensor, scale: float, zero: int | Tensor) -> Tensor:
    """The numbers that ``codes`` (uint8, any shape) stand for, as float32."""
    return (codes.float() - float(zero)) * scale


def _check_dequantize(fn):  # type: ignore[no-untyped-def]
    codes = torch.tensor([[0, 3, 4], [5, 14, 15], [0, 200, 255]], dtype=torch.uint8)
    for scale, zero in [(0.25, 4), (0.5, 0), (2.0, 15)]:
        z = torch.tensor(zero, dtype=torch.uint8)
        expected = (codes.float() - zero) * scale
        found = fn(codes, scale, z)
        mistakes = {
            "codes and zero are uint8, and 3 - 4 in uint8 is 255; make them floats before subtracting": (
                codes - z
            ).float()
            * scale,
            "int8 ends at 127: code 255 became -1; make floats before subtracting": (
                codes.to(torch.int8) - z.to(torch.int8)
            ).float()
            * scale,
            "you leave the zero point out; subtract it before multiplying": codes.float() * scale,
            "you add the zero point; adding was quantizing, here it is subtracted": (codes.float() + zero)
            * scale,
            "you subtract the zero point last; it counts codes, so subtract before multiplying by the scale": (
                codes.float() * scale - zero
            ),
            "you divide by the scale; a code counts steps of this size, so multiply": (codes.float() - zero)
            / scale,
        }
        close(found, expected, "your number", mistakes=mistakes)


def scale_and_zero(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of an affine grid over [low, high], widened to contain 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def _check_scale_and_zero(fn):  # type: ignore[no-untyped-def]
    for low, high, bits in [
        (-1.0, 2.75, 4),
        (-1.0, 2.6, 4),
        (2.0, 5.75, 4),
        (-3.0, -1.0, 3),
        (-0.7, 1.9, 8),
    ]:
        found = fn(low, high, bits)
        require(
            isinstance(found, tuple | list) and len(found) == 2,
            "return two things: the scale and the zero point",
        )
        scale, zero = number(found[0], "your scale"), number(found[1], "your zero point")
        right_scale, right_zero = scale_and_zero(low, high, bits)
        wide = max(high, 0.0) - min(low, 0.0)
        end = "begin at 0: low = min(low, 0)" if low > 0 else "end at 0: high = max(high, 0)"
        close(
            scale,
            right_scale,
            "your scale",
            mistakes={
                f"widen the range first; {low} to {high} must {end}": (high - low) / (2**bits - 1),
                "you divide by 2**bits; between 2**bits codes there are 2**bits - 1 steps": wide / 2**bits,
                "this is the scale of a symmetric grid; an affine one spans high - low": 2
                * max(abs(low), abs(high))
                / (2**bits - 1),
            },
        )
        require(
            zero == round(zero),
            f"your zero point is {zero:.6g}, which is not whole, so no code is 0.0 exactly; round it",
        )
        equal(
            int(zero),
            right_zero,
            "your zero point",
            mistakes={
                "your zero point is negative; low = (0 - zero) * scale, so zero = -low / scale": -right_zero,
                "your zero point cuts off the fraction; round to the nearest": math.floor(
                    -min(low, 0.0) / right_scale
                ),
                "your zero point is one too high; the lowest code is 0, not 1": right_zero + 1,
                "your zero point counts from the upper end; it is the code of 0.0, counted from low": round(
                    max(high, 0.0) / right_scale
                ),
            },
        )


def best_clip(x: Tensor, bits: int) -> float:
    """The range [-a, a] whose symmetric grid has the least squared error on ``x``; returns a."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    absmax = x.abs().max()
    best, least = 0.0, float("inf")
    for percent in range(100, 0, -1):
        a = percent / 100 * absmax
        scale = a / ((2**bits - 1) / 2)
        x_hat = torch.round(x / scale).clamp(lowest, highest) * scale
        error = (x - x_hat).double().square().sum().item()
        if error < least:
            best, least = a.item(), error
    return best


def _best(
    x: Tensor,
    bits: int,
    cost: Callable[[Tensor], Tensor] = torch.square,
    *,
    largest: float | None = None,
    narrow: bool = False,
) -> float:
    """What a search with another cost, another largest element or the narrow scale would return."""
    largest = x.abs().max().item() if largest is None else largest
    spec = QuantSpec.parse(f"int{bits} tensor scale=fp32")
    wider = (2**bits - 1) / (2**bits - 2) if narrow else 1.0

    def error(a: float) -> float:
        end = torch.tensor([[a * wider]])
        return cost(x - fake_quantize(x, spec, params_for(-end, end, spec))).double().sum().item()

    return min((percent / 100 * largest for percent in range(100, 0, -1)), key=error)


def _check_best_clip(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator)
    heavy = x.sign() * x.abs() ** 1.6
    lopsided = torch.where(heavy > 0, 0.3 * heavy, heavy)  # the largest |x| is negative
    for values, bits in [(x, 4), (heavy, 4), (heavy, 3), (lopsided, 4)]:
        spec = QuantSpec.parse(f"int{bits} tensor scale=fp32")
        expected = fit(values, spec, "mse").dense()[0].item() * (2**bits - 1) / 2
        absmax = values.abs().max().item()
        search = functools.partial(_best, values, bits)
        mistakes = {
            "your search never clips; try smaller ranges, and sum the squares, do not take the largest error": absmax,
            "this is the share of the largest element; return a itself": expected / absmax,
            "this is the scale; return the end of the range, a": expected / ((2**bits - 1) / 2),
            "your search ends at the smallest range, as if clipping cost nothing: clamp the codes, and count the "
            "elements outside the range as well as those inside": 0.01 * absmax,
            "you sum the absolute errors; square them first": search(torch.abs),
            "you took the largest x; take the largest |x|": search(largest=values.max().item()),
            "your scale divides by 2**(bits-1) - 1, the narrow rule; divide by (2**bits - 1) / 2": search(
                narrow=True
            ),
        }
        close(number(fn(values, bits), "your clip"), expected, "your clip", mistakes=mistakes)


EXERCISES = [
    Exercise(
        "02.1",
        "Quantize",
        difficulty=1,
        minutes=5,
        statement="""
            Turn each element of `x` into a code, a whole number:

            $$\\text{code} =
            \\text{clamp}\\big(\\text{round}(x / \\text{scale}),\\ \\text{lowest},\\ \\text{highest}\\big)$$

            A tie, such as 2.5, goes to the even neighbour.
        """,
        starter='''
            def my_quantize(x: torch.Tensor, scale: float, lowest: int, highest: int) -> torch.Tensor:
                """Whole codes between lowest and highest, in the shape of x."""
                raise NotImplementedError
        ''',
        solution=quantize,
        check=_check_quantize,
        hints=[
            "How many steps is x? Divide.",
            "`torch.round` rounds half to even already.",
            "`torch.round(x / scale)`, then `.clamp(lowest, highest)`.",
        ],
    ),
    Exercise(
        "02.2",
        "Dequantize",
        difficulty=1,
        minutes=4,
        statement="""
            Turn affine codes back into numbers:

            $$\\hat x = (\\text{code} - \\text{zero}) \\cdot \\text{scale}$$

            `codes` and `zero` are `uint8` tensors. Return `float32`.
        """,
        starter='''
            def my_dequantize(codes: torch.Tensor, scale: float, zero: torch.Tensor) -> torch.Tensor:
                """The numbers that codes (uint8, any shape) stand for; zero is a uint8 of shape ()."""
                raise NotImplementedError
        ''',
        solution=dequantize,
        check=_check_dequantize,
        hints=[
            "What is 3 - 4 in a type that has no negative numbers?",
            "Make floats of both first: `codes.float()` and `zero.float()`.",
            "`(codes.float() - zero.float()) * scale`.",
        ],
    ),
    Exercise(
        "02.3",
        "A grid in which zero is zero",
        difficulty=2,
        minutes=10,
        statement="""
            Return `(scale, zero)` of an affine grid over $[\\text{low}, \\text{high}]$ with `low < high`.
            First widen the range so that it contains 0. Then

            $$\\text{scale} = \\frac{\\text{high} - \\text{low}}{2^{\\text{bits}} - 1}, \\qquad
            \\text{zero} = \\text{round}\\Big(\\frac{-\\text{low}}{\\text{scale}}\\Big)$$

            `zero` must be whole: then 0.0 has a code of its own.
        """,
        starter='''
            def my_scale_and_zero(low: float, high: float, bits: int) -> tuple[float, int]:
                """Scale and whole zero point of the codes 0 .. 2**bits - 1 over [low, high] and 0."""
                raise NotImplementedError
        ''',
        solution=scale_and_zero,
        check=_check_scale_and_zero,
        hints=[
            "A range from 2 to 5.75 has to begin at 0; one from -3 to -1 has to end there.",
            "`low = min(low, 0.0)` and `high = max(high, 0.0)` widen it.",
            "Python's `round(-low / scale)` gives a whole number, and rounds half to even too.",
        ],
    ),
    Exercise(
        "02.4",
        "The best clip",
        difficulty=2,
        minutes=12,
        statement="""
            Find the range $[-a, a]$ whose symmetric grid has the least squared error on `x`. Try
            $a = 1.00,\\ 0.99,\\ 0.98,\\ \\dots,\\ 0.01$ times the largest $|x|$. For each,

            $$\\text{scale} = \\frac{a}{(2^{\\text{bits}} - 1) / 2}, \\qquad
            \\hat x = \\text{clamp}\\big(\\text{round}(x / \\text{scale})\\big) \\cdot \\text{scale}, \\qquad
            \\text{error} = \\sum (x - \\hat x)^2$$

            with codes from $-2^{\\text{bits}-1}$ to $2^{\\text{bits}-1} - 1$. Return the $a$ with the least error.
        """,
        starter='''
            def my_best_clip(x: torch.Tensor, bits: int) -> float:
                """The a of the range [-a, a] with the least squared error; x has any shape."""
                raise NotImplementedError
        ''',
        solution=best_clip,
        check=_check_best_clip,
        hints=[
            "A loop over `percent in range(100, 0, -1)` tries them all.",
            "Keep the least error so far, and the a that gave it.",
            "Forget neither the clamp nor the elements outside the range: they are what a small a costs.",
        ],
    ),
]

QUIZ = [
    Question(
        "A symmetric int8 range is made half as wide, and nothing is clipped. The SQNR",
        {
            "rises by about 6 dB": "Half the step is a quarter of the noise: 6 dB, as much as one more bit.",
            "rises by about 3 dB": "The noise goes with the square of the step.",
            "stays as it is": "The step is half as large, and the noise comes from the step.",
        },
        answer="a",
    ),
    Question(
        "Why is the zero point of an affine grid rounded to a whole number?",
        {
            "So that it fits into fewer bits": "A side effect. A real zero point of 16 bits would be affordable.",
            "So that the largest element is exact": "The ends of the range may even move by half a step.",
            "So that 0.0 comes back as exactly 0.0": "Padding, masks and pruned weights rely on it.",
        },
        answer="c",
    ),
    Question(
        "A weight matrix has one element 50 times as large as is usual. At 4 bits with min-max and one scale,",
        {
            "that element is clipped": "Min-max never clips. It is the element that the range is made for.",
            "almost all codes are 0": "The step is larger than almost every element.",
            "nothing happens, one element does not count": "The range hangs on the largest element alone.",
        },
        answer="b",
    ),
]

# --- pictures


def staircase(bits: int = 3) -> go.Figure:
    """What a symmetric grid of step 1 makes of a straight line."""
    spec = QuantSpec.parse(f"int{bits} tensor")
    grid = Grid(spec)
    one = torch.ones(())
    span = grid.highest + 2.5
    x = torch.linspace(-span, span, 601)
    stored = grid.round(x, one)
    made = plot.lines(
        x.tolist(),
        {"exact": x.tolist(), f"int{bits}, scale 1": stored.tolist()},
        title=f"{2**bits} codes: off by half a step at most, until the stairs end",
        x_title="number x (no unit)",
        y_title="stored as (no unit)",
        markers=False,
    )
    for at, text in ((grid.lowest, "lowest code"), (grid.highest, "highest code")):
        made.add_hline(y=at, line={"color": "#888888", "dash": "dot", "width": 1})
        made.add_annotation(
            x=-0.98 * span if at > 0 else 0.98 * span,
            y=at,
            text=f"{text} {at}",
            showarrow=False,
            yshift=10,
            xanchor="left" if at > 0 else "right",
        )
    exact, stairs = made.data
    exact.line.dash, stairs.line.dash = "dash", "solid"
    return made.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1.0, "xanchor": "left"})


def ruler(low: float = -1.0, high: float = 2.75, bits: int = 4) -> go.Figure:
    """The affine grid over a range as a ruler: every code at the number it stands for."""
    low, high = min(low, high), max(low, high)
    spec = QuantSpec.parse(f"int{bits} tensor asym scale=fp32")
    params = params_for(torch.tensor([[low]]), torch.tensor([[high]]), spec)
    scale, zero = params.dense()
    codes = torch.arange(2**bits)
    numbers = Grid(spec).dequantize(codes, scale, zero).flatten().tolist()
    stride = next((n for n in (1, 2, 4, 8) if n * scale.item() >= 0.3), 16)  # labels that do not touch
    made = plot.figure(
        f"scale {scale.item():.4f}, zero point {int(zero)}: code {int(zero)} is 0.0 exactly",  # type: ignore[arg-type]
        "number (no unit)",
        "",
        height=260,
    )
    made.add_scatter(
        x=[low, high],
        y=[0.5, 0.5],
        mode="lines",
        name="range asked for",
        line={"color": plot.ORANGE, "width": 8},
    )
    made.add_scatter(
        x=numbers,
        y=[0.0] * len(numbers),
        mode="markers+text",
        name="codes",
        text=[str(c) if c % stride == 0 else "" for c in codes.tolist()],
        textposition="bottom center",
        textfont={"size": 10},
        marker={
            "symbol": "line-ns",
            "size": 16,
            "color": plot.BLUE,
            "line": {"width": 2, "color": plot.BLUE},
        },
    )
    made.add_scatter(
        x=[0.0],
        y=[0.0],
        mode="markers",
        name="0.0",
        marker={"symbol": "diamond", "size": 12, "color": plot.RED},
    )
    made.update_yaxes(visible=False, range=[-0.6, 1.0])
    return made.update_xaxes(range=[-4.3, 6.3]).update_layout(
        legend={"orientation": "h", "y": 1.0, "x": 0.45}
    )


def clipping_of(weight: Tensor) -> Callable[..., go.Figure]:
    """A function of ``bits`` and ``clip`` that draws what a range of +-clip max|weight| does to ``weight``."""
    weight = weight.detach().float()
    absmax = weight.abs().max().item()
    power = weight.double().square().mean().item()
    counts = torch.histc(weight, 120, -absmax, absmax)
    places = ((torch.arange(120) + 0.5) / 60 - 1).tolist()

    def errors(bits: int, clip: float) -> tuple[float, float, float]:
        """Rounding and clipping in percent of the mean square, and the SQNR."""
        spec = QuantSpec.parse(f"int{bits} tensor")
        a = torch.tensor([[clip * absmax]])
        params = params_for(-a, a, spec)
        x_hat = fake_quantize(weight, spec, params)
        rounding, clipped = rounding_and_clipping(weight, x_hat, params.dense()[0])
        return 100 * rounding / power, 100 * clipped / power, sqnr_db(weight, x_hat)

    clips = [c / 100 for c in range(10, 101, 3)]

    @functools.cache
    def curve(bits: int) -> list[tuple[float, float, float]]:
        return [errors(bits, clip) for clip in clips]

    def clipping(bits: int = 4, clip: float = 1.0) -> go.Figure:
        """The clipping range over the weights' histogram, and what it costs."""
        rounding, clipped, sqnr = errors(bits, clip)
        return _clipping_figure(
            (places, counts.tolist()),
            (clips, curve(bits)),
            (clip, rounding, clipped),
            f"{bits} bits, {sqnr:.1f} dB",
        )

    return clipping


def _clipping_figure(
    bars: tuple[list[float], list[float]],
    curve: tuple[list[float], list[tuple[float, float, float]]],
    now: tuple[float, float, float],
    head: str,
) -> go.Figure:
    clip, rounding, clipped = now
    made = make_subplots(rows=2, cols=1, shared_xaxes=False, vertical_spacing=0.2, row_heights=[0.42, 0.58])
    inside = [abs(x) <= clip for x in bars[0]]
    made.add_bar(
        x=bars[0],
        y=bars[1],
        showlegend=False,
        marker_color=[plot.SKY if i else plot.ORANGE for i in inside],
        row=1,
        col=1,
    )
    for end in (-clip, clip):
        made.add_scatter(
            x=[end, end],
            y=[0.5, 1e5],
            mode="lines",
            showlegend=False,
            line={"color": plot.BLACK, "width": 2},
            row=1,
            col=1,
        )
    clips, errors = curve
    parts = {
        "rounding": ([e[0] for e in errors], rounding),
        "clipping": ([e[1] for e in errors], clipped),
        "both": ([e[0] + e[1] for e in errors], rounding + clipped),
    }
    for (name, (y, at)), color, dash, symbol in zip(
        parts.items(),
        (plot.BLUE, plot.ORANGE, plot.BLACK),
        ("dash", "dot", "solid"),
        plot.SYMBOLS,
        strict=False,
    ):
        made.add_scatter(
            x=clips,
            y=[v or None for v in y],
            mode="lines",
            name=name,
            line={"color": color, "dash": dash},
            row=2,
            col=1,
        )
        made.add_scatter(
            x=[clip],
            y=[at or None],
            mode="markers",
            showlegend=False,
            marker={"color": color, "symbol": symbol, "size": 11},
            row=2,
            col=1,
        )
    title = f"{head}: rounding {rounding:.2g} % + clipping {clipped:.2g} % of the weights' power"
    made.update_layout(
        title_text=title,
        height=600,
        width=700,
        bargap=0,
        legend={"orientation": "h", "x": 0.0, "y": -0.16},
        margin_b=100,
    )
    made.update_xaxes(title_text="weight (share of the largest)", range=[-1.02, 1.02], row=1, col=1)
    made.update_yaxes(title_text="count", type="log", range=[-0.2, 4.3], row=1, col=1)
    made.update_xaxes(
        title_text="clip: end of the range (share of the largest)", range=[0.0, 1.02], row=2, col=1
    )
    return made.update_yaxes(title_text="error (% of power)", type="log", range=[-3, 2.1], row=2, col=1)


def ranges(weight: Tensor, ends: Mapping[str, float]) -> go.Figure:
    """Where each observer ends its range, over the histogram of abs(weight)."""
    made = plot.histogram(
        weight.abs(),
        title="Four observers, four ranges, one weight matrix",
        x_title="|weight| (no unit)",
        log_y=True,
    )
    for i, (name, a) in enumerate(ends.items()):
        made.add_scatter(
            x=[a, a],
            y=[0.7, 1e4],
            mode="lines",
            name=f"{name}: a = {a:.2f}",
            line={"color": plot.COLORS[i + (i > 4)], "dash": plot.DASHES[i], "width": 3},
        )
    made.update_layout(legend={"x": 0.02, "y": 0.05, "bgcolor": "white"})
    made.update_xaxes(range=[0, 1.04 * weight.abs().max().item()])
    return made.update_yaxes(range=[-0.2, 4.0], dtick=1)
