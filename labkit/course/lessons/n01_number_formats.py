"""Notebook 01: number formats. What it asks, checks and draws."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import torch
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, close, equal, number, require, tensor
from labkit.models.memory import KNOWN, kv_bytes, parameters, weight_bytes
from labkit.quant.formats import FLOATS, bits_of, round_to_format, values_of
from labkit.quant.patterns import neighbours, number_of, widths

# ---------------------------------------------------------------- exercises


def decode_e4m3(pattern: int) -> float:
    """The number that an e4m3 bit pattern (0 to 255) stands for; NaN for 0x7F and 0xFF."""
    sign = -1.0 if pattern >> 7 else 1.0
    e = (pattern >> 3) & 0b1111
    m = pattern & 0b111
    if e == 15 and m == 7:
        return math.nan
    if e == 0:
        return sign * (m / 8) * 2.0**-6
    return sign * (1 + m / 8) * 2.0 ** (e - 7)


def _check_decode(fn):  # type: ignore[no-untyped-def]
    def at(pattern, mistakes=None):  # type: ignore[no-untyped-def]
        close(
            fn(pattern),
            decode_e4m3(pattern),
            f"your number for 0b{pattern:08b}",
            rtol=0,
            atol=0,
            mistakes=mistakes,
        )

    at(
        0b0_0111_100,
        {
            "your number lacks the leading one: a normal number is (1 + m/8) * 2**(e - 7)": 0.5,
            "you subtract 8 from the exponent; the bias of e4m3 is 2**(4-1) - 1 = 7": 0.75,
            "you take e as it is; subtract the bias, 7, from it": 1.5 * 2.0**7,
            "you read two bits of mantissa, as in e5m2; e4m3 has three": number_of(
                0b0_0111_100, "fp8_e5m2"
            ),
        },
    )
    at(0b1_1000_010, {"your number is positive; the first bit is 1, so its sign is minus": 2.5})
    at(
        0b0_0000_011,
        {
            "you give a number with e = 0 a leading one; there it is (m/8) * 2**-6": 1.375 * 2.0**-7,
            "with e = 0 the exponent is -6, as for e = 1, not -7": 0.375 * 2.0**-7,
        },
    )
    at(0b1_0000_001)
    at(0)
    found = fn(0b0_1111_110)
    found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    require(
        not (isinstance(found, float) and math.isnan(found)),
        "only 0x7F and 0xFF are NaN; with e = 15 and m < 7 it is an ordinary number (0x7E is 448)",
    )
    at(
        0b0_1111_110,
        {"you treat e = 15 as infinity; e4m3 has none, and only 0x7F and 0xFF are NaN": math.inf},
    )
    for pattern in (0x7F, 0xFF):
        found = fn(pattern)
        found = found.item() if isinstance(found, Tensor) else found
        require(
            isinstance(found, float) and math.isnan(found),
            f"your number for 0b{pattern:08b} is {found}; all seven bits after the sign are 1, which means NaN in e4m3",
        )
    for pattern in range(256):
        if pattern & 0x7F != 0x7F:
            at(pattern)


def spacing(x: float, mantissa: int, smallest_exponent: int) -> float:
    """The distance between neighbouring numbers of a format around ``x``."""
    exponent = smallest_exponent
    if x != 0:
        exponent = max(math.frexp(abs(x))[1] - 1, smallest_exponent)  # floor(log2 |x|), exactly
    return 2.0 ** (exponent - mantissa)


def _check_spacing(fn):  # type: ignore[no-untyped-def]
    for x, m, low in [
        (1.0, 10, -14),
        (100.0, 3, -6),
        (-5.0, 7, -126),
        (448.0, 3, -6),
        (0.9999, 2, -14),
        (2.0**-12, 3, -6),
    ]:
        exact = spacing(x, m, low)
        size = abs(x)
        above = math.ceil(math.log2(size) + 1e-12)
        close(
            fn(x, m, low),
            exact,
            f"your spacing at {x:.6g} with {m} bits of mantissa",
            rtol=1e-9,
            atol=0,
            mistakes={
                "below the smallest normal number the spacing stops shrinking; mind smallest_exponent": 2.0
                ** (math.floor(math.log2(size)) - m),
                "you round the exponent up; between 2**k and 2**(k+1) the exponent is k = floor(log2(|x|))": 2.0
                ** (max(above, low) - m),
                "your spacing is that of the numbers from 1 to 2; it doubles with every power of two": 2.0
                ** -m,
                "your spacing is relative to x; expected the distance itself": exact / size,
                "mantissa bits cut [2**k, 2**(k+1)) into 2**mantissa steps, not into 2**mantissa - 1": exact
                * 2**m
                / (2**m - 1),
            },
        )
    close(fn(0.0, 3, -6), 2.0**-9, "your spacing at 0")


def round_float(x: Tensor, mantissa: int, smallest_exponent: int, largest: float) -> Tensor:
    """``x`` (any shape) to the nearest number of the format, ties to even, clamped to -largest .. largest."""
    exponent = torch.frexp(x)[1] - 1  # floor(log2 |x|)
    step = 2.0 ** (exponent.clamp(min=smallest_exponent) - mantissa)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def _check_round(fn):  # type: ignore[no-untyped-def]
    fmt = FLOATS["fp8_e4m3"]
    few = torch.tensor([[0.3, -1.07, 17.0, 19.0], [500.0, -1e6, 0.0011, 0.0]])
    many = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 20
    for x in (few, many):
        steps = torch.exp2((torch.frexp(x)[1] - 1).clamp(min=-6).float() - 3)
        free = torch.exp2((torch.frexp(x)[1] - 1).float() - 3)
        away = torch.floor(x.abs() / steps + 0.5) * steps * x.sign()
        expected = round_to_format(x, "fp8_e4m3")
        found = tensor(
            fn(x, 3, -6, fmt.largest),
            "your result",
            shape=tuple(x.shape),
            finite=False,
            mistakes={"your result is flat; keep the shape of x": expected.flatten()},
        )
        require(
            not bool(found[x == 0].isnan().any()),
            "your result is NaN at 0 (element [1, 3]): log2 is -inf there and the step 0; use the smallest exponent",
        )
        close(
            found,
            expected,
            "your result",
            rtol=1e-6,
            atol=0,
            mistakes={
                "your result leaves the range; clamp it to -largest .. largest": torch.round(x / steps)
                * steps,
                "your ties do not go to even: 17, halfway from 16 to 18, becomes 16; use torch.round": away.clamp(
                    -fmt.largest, fmt.largest
                ),
                "you cut off; expected the nearest number": (torch.trunc(x / steps) * steps).clamp(
                    -448, 448
                ),
                "you round small numbers too finely; the exponent never goes below smallest_exponent": (
                    torch.round(x / free) * free
                )
                .nan_to_num(0.0)
                .clamp(-448, 448),
                "you round to whole numbers; round x / step and multiply by step": x.round().clamp(
                    -448, 448
                ),
            },
        )


def shared_exponent(block: Tensor) -> int:
    """The exponent that an mxfp4 block (32,) shares: floor(log2(absmax)) - 2; -127 for a block of zeros."""
    absmax = float(block.abs().max())
    if absmax == 0:
        return -127
    return math.frexp(absmax)[1] - 1 - 2


def _check_shared(fn):  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(0)
    for largest in (5.0, 6.0, 8.0, -8.0, 7.9, 0.02, -3.0, 1000.0):
        block = torch.rand(32, generator=draw) * abs(largest) * 0.2
        block[5] = largest
        exact = shared_exponent(block)
        log = math.log2(abs(largest))
        found = number(fn(block), "your exponent")
        require(
            found == math.floor(found),
            f"your exponent is {found:.6g}; expected a whole number, so take floor",
        )
        equal(
            int(found),
            exact,
            f"your exponent for a block whose largest number is {largest}",
            mistakes={
                "you forget the element's own exponent; 6 in e2m1 is 1.5 * 2**2, so subtract 2": exact + 2,
                "you round the logarithm to the nearest; the rule of the specification takes floor": round(
                    log
                )
                - 2,
                "you round the logarithm up; the rule of the specification takes floor": math.ceil(log) - 2,
                "you leave out the sign; the largest magnitude counts, block.abs()": math.floor(
                    math.log2(float(block.max()))
                )
                - 2,
            },
        )
    try:
        found = number(fn(torch.zeros(32)), "your exponent")
    except Wrong as wrong:  # say which block it was: its logarithm is that of 0
        raise Wrong(f"for a block of zeros, {wrong}") from wrong
    equal(int(found), -127, "your exponent for a block of zeros")


EXERCISES = [
    Exercise(
        "01.1",
        "Read eight bits",
        difficulty=1,
        minutes=10,
        statement="""
            A pattern of e4m3 is a sign $s$ (1 bit), an exponent $e$ (4 bits) and a mantissa $m$ (3 bits). It stands for

            $$(-1)^s \\left(1 + \\frac{m}{8}\\right) 2^{\\,e-7} \\quad (e > 0), \\qquad
            (-1)^s \\,\\frac{m}{8}\\, 2^{-6} \\quad (e = 0)$$

            and for NaN where all seven bits after the sign are 1. Work out `0b0_1000_100` on paper
            first, then write it down.
        """,
        starter='''
            def my_decode(pattern: int) -> float:
                """The number that an e4m3 pattern (0 to 255) stands for; float("nan") for 0x7F and 0xFF."""
                raise NotImplementedError
        ''',
        solution=decode_e4m3,
        check=_check_decode,
        hints=[
            "`pattern >> 7` is the sign, `pattern & 0b111` the mantissa. What is left is the exponent.",
            "`(pattern >> 3) & 0b1111` is the exponent. Two cases: zero and not zero.",
            "Test for NaN first: `pattern & 0x7F == 0x7F`. Then `e == 0`, then all the rest.",
        ],
    ),
    Exercise(
        "01.2",
        "How far apart?",
        difficulty=1,
        minutes=8,
        statement="""
            Let $k = \\lfloor \\log_2 |x| \\rfloor$, but never below the exponent of the smallest normal number.
            With $M$ bits of mantissa there are $2^M$ even steps between $2^k$ and $2^{k+1}$. Return the length of one
            step. At 0 use $k$ = `smallest_exponent`, then the same formula.
        """,
        starter='''
            def my_spacing(x: float, mantissa: int, smallest_exponent: int) -> float:
                """The distance between neighbouring numbers of a format around x."""
                raise NotImplementedError
        ''',
        solution=spacing,
        check=_check_spacing,
        hints=[
            "The stretch from 2**k to 2**(k+1) is 2**k long. Divide it by the number of steps.",
            "The step is `2.0 ** (k - mantissa)`. Mind a negative x and x = 0.",
            "`k = max(math.floor(math.log2(abs(x))), smallest_exponent)` where x is not 0.",
        ],
    ),
    Exercise(
        "01.3",
        "Round to a format",
        difficulty=2,
        minutes=12,
        statement="""
            Round each element of `x` to the nearest number of a float format: divide by the step at that
            element, round to a whole number (ties to even, as `torch.round` does), multiply again, and keep the result
            within `-largest .. largest`.
        """,
        starter='''
            def my_round(x: torch.Tensor, mantissa: int, smallest_exponent: int, largest: float) -> torch.Tensor:
                """x (any shape) to the nearest number of the format, ties to even, saturating."""
                raise NotImplementedError
        ''',
        solution=round_float,
        check=_check_round,
        hints=[
            "The spacing of the last exercise, for a whole tensor: `torch.frexp(x)[1] - 1` is floor(log2 |x|).",
            "`step = 2.0 ** (exponent.clamp(min=smallest_exponent) - mantissa)`.",
            "`(torch.round(x / step) * step).clamp(-largest, largest)`.",
        ],
    ),
    Exercise(
        "01.4",
        "One exponent for 32 numbers",
        difficulty=1,
        minutes=6,
        statement="""
            The largest number of e2m1 is $6 = 1.5 \\cdot 2^2$. The specification of the MX formats shares the exponent

            $$X = \\left\\lfloor \\log_2 \\max_i |x_i| \\right\\rfloor - 2$$

            among the 32 numbers of an mxfp4 block. Return $X$ as a whole number, and -127 (the
            lowest there is) for a block of zeros.
        """,
        starter='''
            def my_shared_exponent(block: torch.Tensor) -> int:
                """The exponent X that the numbers of an mxfp4 block (32,) share."""
                raise NotImplementedError
        ''',
        solution=shared_exponent,
        check=_check_shared,
        hints=[
            "`block.abs().max()` is the one number that decides.",
            "`math.floor(math.log2(...))`, then subtract 2. Treat the block of zeros first.",
        ],
    ),
]

QUIZ = [
    Question(
        "bf16 and fp16 both take 16 bits. Which statement is true?",
        {
            "bf16 is finer near 1, fp16 reaches further": "The other way round: "
            "bf16 has 8 bits of exponent and 7 of mantissa.",
            "fp16 is finer near 1, bf16 reaches further": "10 bits of mantissa against 7, and 65504 against 3.4e38.",
            "They differ only in how they round": "fp16 has 5 bits of exponent and 10 of mantissa; bf16 8 and 7.",
        },
        answer="b",
    ),
    Question(
        "A server writes text for one request. Its weights are stored in half the bytes. "
        "How long does a token take at best?",
        {
            "About half as long": "One row reads every weight once: bytes decide.",
            "As long as before: the multiplications stay the same": "That holds for many rows: they share each read.",
            "About a quarter as long": "Half the bytes at the same bytes per second is half the time.",
        },
        answer="a",
    ),
    Question(
        "A block of mxfp4 holds 31 numbers near 0.01 and one 100. What do the 31 become?",
        {
            "They keep two significant bits each": "They would with an exponent of their own. Here all 32 share one.",
            "NaN": "Nothing overflows: the shared exponent is made for the largest.",
            "Zero": "The exponent is made for 100: the smallest step is 8, and 0.01 rounds to 0.",
        },
        answer="c",
    ),
]

# ---------------------------------------------------------------- pictures

SHOWN = ["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8", "int4"]
DEVICES = {"a 16 GB laptop": 16, "a 24 GB card": 24, "an 80 GB card": 80}
FREE = 0.9  # of a device's memory is for weights and cache; the rest holds activations and the program


def bit_flipper(format: str = "fp8_e4m3", bits: str = "0100010000000000") -> go.Figure:
    """The first of ``bits`` read as ``format``, and the numbers on either side; fp32's other 16 bits are 0."""
    sign, exponent, _ = widths(format)
    width = min(sum(widths(format)), 16)
    pattern = int(bits[:width], 2) << (sum(widths(format)) - width)
    value = number_of(pattern, format)
    below, above = neighbours(pattern, format)
    made = plot.figure(f"{format}: {_formula(pattern, format)} = {_text(value)}", height=300)
    ends = [0, sign, sign + exponent, width, 16]
    names = ["sign", "exponent", "mantissa" if exponent else "value", "not used"]
    for i, (name, colour) in enumerate(
        zip(names, (plot.RED, plot.BLUE, plot.GREEN, "#DDDDDD"), strict=True)
    ):
        at = list(range(min(ends[i], width), ends[i + 1])) if i < 3 else list(range(width, 16))
        made.add_scatter(
            x=at,
            y=[1.0] * len(at),
            text=[bits[b] for b in at],
            name=name,
            mode="markers+text",
            marker={"symbol": "square", "size": 34, "color": colour},
            textfont={"size": 16, "color": "white" if i < 3 else "#777777"},
            hoverinfo="name",
        )
    made.add_scatter(
        x=[2, 7.5, 13],
        y=[0.0] * 3,
        text=[
            f"below<br>{_text(below)}",
            f"<b>this number<br>{_text(value)}</b>",
            f"above<br>{_text(above)}",
        ],
        mode="lines+markers+text",
        textposition="bottom center",
        marker={"size": [9, 15, 9], "color": plot.BLACK},
        line={"color": "#999999"},
        showlegend=False,
        hoverinfo="skip",
    )
    made.update_layout(legend={"orientation": "h", "x": 0, "y": 1.08, "itemsizing": "constant"})
    made.update_xaxes(range=[-0.8, 15.8], visible=False)
    return made.update_yaxes(range=[-0.55, 1.45], visible=False)


def _formula(pattern: int, name: str) -> str:
    _, exponent, mantissa = widths(name)
    bits = sum(widths(name))
    if not exponent:
        return f"{'-' + str(2 ** (bits - 1)) if pattern >> (bits - 1) else '0'} + {pattern & 2 ** (bits - 1) - 1}"
    s, e = pattern >> (bits - 1), pattern >> mantissa & 2**exponent - 1
    m, bias = pattern & 2**mantissa - 1, 2 ** (exponent - 1) - 1
    if not math.isfinite(number_of(pattern, name)):
        return f"e = {e}, m = {m}"
    lead, power = ("1 + ", e - bias) if e else ("", 1 - bias)
    return f"{'-' if s else '+'}({lead}{m}/{2**mantissa}) x 2<sup>{power}</sup>"


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def number_lines() -> go.Figure:
    """Every number from -8 to 8 that four formats have."""
    made = plot.figure("Integers are evenly spread, floats crowd around zero", "number", height=330)
    rows = {
        "int4": torch.arange(-8.0, 8.0),
        "fp4_e2m1": values_of("fp4_e2m1"),
        "fp6_e2m3": values_of("fp6_e2m3"),
        "fp8_e4m3": values_of("fp8_e4m3"),
    }
    for i, (name, values) in enumerate(rows.items()):
        seen = values[values.abs() <= 8].tolist()
        made.add_scatter(
            x=seen,
            y=[f"{name}<br>{bits_of(name)} bits"] * len(seen),
            mode="markers",
            marker={"symbol": "line-ns", "size": 22, "line": {"width": 1.5, "color": plot.COLORS[i]}},
            name=name,
            showlegend=False,
        )
    return made.update_xaxes(range=[-8.5, 8.5])


def memory(
    model: str = "Llama 3.1 8B",
    weight_bits: int = 16,
    cache_bits: int = 16,
    requests: int = 1,
    tokens: int = 8192,
) -> go.Figure:
    """What a model needs: weights, a 16-bit scale for 64 of them below 16 bits, the cache of all requests."""
    count = parameters(KNOWN[model])
    parts = {
        "weights": weight_bytes(count, weight_bits) / 1e9,
        "scales": (weight_bytes(count, 0, group=64) if weight_bits < 16 else 0.0) / 1e9,
        "KV cache": kv_bytes(KNOWN[model], requests * tokens, cache_bits) / 1e9,
    }
    parts["together"] = sum(parts.values())
    fits = [name for name, size in DEVICES.items() if parts["together"] <= FREE * size]
    made = plot.figure(
        f"{model}, {weight_bits} bits: {parts['together']:.4g} GB, fits {fits[0] if fits else 'none of the three'}",
        "memory (GB, logarithmic)",
        log_x=True,
        height=360,
    )
    made.add_bar(
        x=list(parts.values()),
        y=[f"{name}<br>{size:.3g} GB" for name, size in parts.items()],
        orientation="h",
        marker_color=[plot.BLUE, plot.ORANGE, plot.GREEN, plot.BLACK],
        showlegend=False,
    )
    for i, (name, size) in enumerate(DEVICES.items()):
        colour = (plot.RED, plot.PINK, plot.SKY)[i]
        made.add_vline(x=FREE * size, line={"color": colour, "dash": plot.DASHES[i + 1]})
        made.add_annotation(
            x=math.log10(FREE * size),
            y=1.02 + 0.09 * i,
            yref="paper",
            text=name,
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            font={"size": 12, "color": colour},
        )
    made.update_layout(margin={"t": 110}, title={"y": 0.95})
    made.update_xaxes(
        range=[-2, 3.8],
        tickvals=[0.01, 0.1, 1, 10, 100, 1000],
        ticktext=["0.01", "0.1", "1", "10", "100", "1000"],
    )
    return made.update_yaxes(autorange="reversed")


def time_against_bytes(
    sizes: dict[str, int], one: dict[str, float], many: dict[str, float], rows: int
) -> go.Figure:
    """Measured milliseconds of one product over the bytes of its weight, for one row and for ``rows``."""
    most, least = max(one, key=lambda name: sizes[name]), min(one, key=lambda name: sizes[name])
    rate = max(sizes[name] / one[name] for name in one)
    made = plot.figure(
        f"{most} to {least}: 1 row {one[most] / one[least]:.1f} times as fast, "
        f"{rows} rows {many[most] / many[least]:.1f} times",
        "bytes of the weight (MB)",
        "time of one product (ms)",
        log_x=True,
        log_y=True,
    )
    for i, (label, times) in enumerate({f"{rows} rows": many, "1 row": one}.items()):
        made.add_scatter(
            x=[sizes[name] / 1e6 for name in times],
            y=[seconds * 1e3 for seconds in times.values()],
            text=list(times),
            name=label,
            mode="lines+markers+text",
            textposition="top center",
            line={"color": plot.COLORS[i], "dash": plot.DASHES[i]},
            marker={"symbol": plot.SYMBOLS[i], "size": 10},
        )
    ends = [min(sizes.values()) / 1.3, max(sizes.values()) * 1.3]
    made.add_scatter(
        x=[end / 1e6 for end in ends],
        y=[end / rate * 1e3 for end in ends],
        name=f"{rate / 1e9:.0f} GB/s, the fastest here",
        mode="lines",
        line={"color": plot.BLACK, "dash": "dot"},
    )
    made.update_xaxes(tickvals=[10, 20, 50, 100], ticktext=["10", "20", "50", "100"])
    return made.update_yaxes(
        tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500],
        ticktext=["1", "2", "5", "10", "20", "50", "100", "200", "500"],
    )
