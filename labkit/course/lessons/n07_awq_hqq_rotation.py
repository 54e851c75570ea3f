"""Notebook 07: AWQ, AdaRound, HQQ and rotation. What it asks, checks and draws."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, require, tensor
from labkit.models import Report
from labkit.quant import QuantSpec, Stats, hadamard_transform, hessian_error, rtn

# --- exercises

Rounding = Callable[[Tensor], Tensor]


def awq_scale(w: Tensor, x: Tensor, quantized: Rounding, steps: int) -> Tensor:
    """The factor for each column of w (out, in) with the least output error on x (tokens, in)."""
    size = x.abs().mean(dim=0)  # (in,)
    candidates = [size ** (step / steps) for step in range(steps + 1)]
    errors = [((quantized(w * s) / s - w) @ x.T).square().sum() for s in candidates]
    return candidates[int(torch.stack(errors).argmin())]


def _by_row(w: Tensor) -> Tensor:
    """int3, one scale a row: what the check of the scale search rounds with."""
    scale = w.abs().amax(dim=1, keepdim=True) / 3.5
    return (w / scale).round().clamp(-4, 3) * scale


def _search(
    w: Tensor,
    x: Tensor,
    steps: int,
    *,
    size: Callable[[Tensor], Tensor] = lambda x: x.abs().mean(dim=0),
    undo: bool = True,
    divide: bool = False,
    inputs: bool = True,
) -> Tensor:
    """``awq_scale`` with a mistake."""
    best, least = torch.ones(x.shape[1]), torch.inf
    for step in range(steps + 1):
        s = size(x) ** (step / steps)
        rounded = _by_row(w / s) * s if divide else _by_row(w * s) / (s if undo else 1)
        error = float((((rounded - w) @ x.T) if inputs else (rounded - w)).square().sum())
        if error < least:
            best, least = s, error
    return best


def _check_awq_scale(fn):  # type: ignore[no-untyped-def]
    # The first tells all mistakes apart that are named below.
    for seed, out, columns, steps in [(100, 8, 6, 10), (3, 16, 32, 20)]:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(out, columns, generator=generator)
        w = w * 10 ** (0.6 * torch.randn(columns, generator=generator))
        loud = 10 ** torch.linspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
        x = torch.randn(60, columns, generator=generator)
        x = loud * (x + 0.5 * torch.randn(columns, generator=generator))
        calls: list[tuple[int, ...]] = []

        def quantized(weights: Tensor) -> Tensor:
            calls.append(tuple(weights.shape))  # noqa: B023
            return _by_row(weights)

        expected = awq_scale(w, x, _by_row, steps)
        mean = x.abs().mean(dim=0)
        found = tensor(fn(w.clone(), x.clone(), quantized, steps), "your scale", shape=(columns,))
        require(
            calls, "you never called quantized(); the error to compare is that of the quantized weights"
        )
        mistakes = {
            "you divide the weights by s before they are rounded; multiply, and divide afterwards": _search(
                w, x, steps, divide=True
            ),
            "you do not divide by s after rounding, so weights of another size are compared with w": _search(
                w, x, steps, undo=False
            ),
            "you compare weights; what counts is the output: the difference times x": _search(
                w, x, steps, inputs=False
            ),
            "a channel's size is the mean of |x|, not its largest": _search(
                w, x, steps, size=lambda x: x.abs().amax(dim=0)
            ),
            "take the mean of |x|; in the mean of x positive and negative inputs cancel": _search(
                w, x, steps, size=lambda x: x.mean(dim=0).abs()
            ),
            "a channel's size is the mean of |x|, not the root of its mean square": _search(
                w, x, steps, size=lambda x: x.square().mean(dim=0).sqrt()
            ),
            "this is the size itself, alpha = 1; try all powers and take the best": mean,
            "all your factors are 1, alpha = 0; try all powers and take the best": torch.ones(columns),
        }
        for step in range(steps + 1):
            alpha = step / steps
            sentence = (
                f"this is alpha = {alpha:g}, which another alpha beats; compare the errors of all of them"
            )
            mistakes.setdefault(sentence, mean**alpha)
        close(found, expected, "your scale", mistakes=mistakes)


def best_rounding(w: Tensor, scale: float, h: Tensor) -> Tensor:
    """Codes (n,) of w (n,), each rounded down or up, with the least (w - q) H (w - q)^T; h (n, n)."""
    low = torch.floor(w / scale)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(w))))  # (2^n, n)
    codes = low + choices
    off = w - codes * scale  # (2^n, n)
    return codes[((off @ h) * off).sum(dim=1).argmin()]


def _check_best_rounding(fn):  # type: ignore[no-untyped-def]
    for seed, n, scale in [(8, 4, 0.5), (4, 6, 0.25)]:
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(40, 1, generator=generator) * (-1.0) ** torch.arange(n)
        x = common + 0.4 * torch.randn(40, n, generator=generator)
        h = x.T @ x / 40
        w = torch.randn(n, generator=generator)
        low = torch.floor(w / scale)
        expected = best_rounding(w, scale, h)
        mistakes = {
            "this is rounding to nearest; all combinations of down and up are to be tried, with all of H": torch.round(
                w / scale
            ),
            "all of them are rounded down; try up as well": low,
            "all of them are rounded up; try down as well": low + 1,
            "this is the worst combination; take the least": best_rounding(w, scale, -h),
            "these are the numbers; return the codes, whole numbers of steps": expected * scale,
            "these are 0 for down and 1 for up; return the codes": expected - low,
        }
        found = tensor(fn(w.clone(), scale, h.clone()), "your codes", shape=(n,), mistakes=mistakes)
        close(found, expected, "your code", mistakes=mistakes)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """HQQ's W_e for x = W - W_r: sign(x) max(|x| - |x|^(p - 1) / beta, 0)."""
    return torch.sign(x) * (x.abs() - x.abs() ** (p - 1) / beta).clamp(min=0)


def _check_shrink(fn):  # type: ignore[no-untyped-def]
    for beta, p in [(10.0, 0.7), (4.0, 0.5), (2.0, 1.0)]:
        x = torch.tensor([-2.0, -0.6, -0.05, 0.01, 0.3, 0.9, 3.0])
        size = x.abs()
        expected = shrink(x, beta, p)
        mistakes = {
            "the sign is lost; W_e has that of x": expected.abs(),
            "you do not stop at 0: what is smaller than the threshold is not forgiven at all": torch.sign(x)
            * (size - size ** (p - 1) / beta),
            "the power is p - 1: small errors have the higher threshold": torch.sign(x)
            * (size - size**p / beta).clamp(min=0),
            "the threshold is divided by beta, not multiplied": torch.sign(x)
            * (size - size ** (p - 1) * beta).clamp(min=0),
            "the threshold depends on |x|; this is the one for p = 1": torch.sign(x)
            * (size - 1 / beta).clamp(min=0),
            "these are not shrunk, only cut: subtract the threshold too": torch.where(
                size > size ** (p - 1) / beta, x, 0.0
            ),
            "this is x minus W_e; return W_e": x - expected,
        }
        found = tensor(fn(x.clone(), beta, p), "your W_e", shape=(7,), mistakes=mistakes)
        close(found, expected, "your W_e", mistakes=mistakes)


def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of order n, a power of two, over the root of n: (n, n), orthogonal."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h / n**0.5


def _check_sylvester(fn):  # type: ignore[no-untyped-def]
    for n in (1, 2, 8, 32):
        found = tensor(fn(n), f"your matrix of order {n}", shape=(n, n))
        found = found.float()
        if n > 1 and bool(torch.allclose(found.abs(), torch.ones(n, n))):
            message = "these entries are 1 and -1; divide by the root of n, so that lengths stay the same"
            require(False, message)
        if n > 1 and bool(torch.allclose(found.abs(), torch.full((n, n), 1 / n))):
            require(
                False, "you divide by n; a row of n entries has length 1 when they are 1 over the root of n"
            )
        require(
            torch.allclose(found.abs(), torch.full((n, n), n**-0.5), atol=1e-5),
            f"for n = {n} all entries should have the size 1 / sqrt(n), {n**-0.5:.4g}; "
            f"yours lie between {found.abs().min():.4g} and {found.abs().max():.4g}",
        )
        product = found @ found.T
        off = (product - torch.eye(n)).abs()
        require(
            off.max() < 1e-4,
            f"for n = {n} two rows are not at right angles: their product is {product.flatten()[off.argmax()]:.4g}. "
            "The lower right quarter has the opposite sign",
        )


EXERCISES = [
    Exercise(
        "07.1",
        "How loud a channel should be",
        difficulty=2,
        minutes=15,
        statement="""
            `quantized(w)` rounds a matrix and gives it back as floats. AWQ multiplies the columns of $W$ by factors
            $s$ before it is rounded, and divides by them afterwards. Column $i$'s factor is $s_i = m_i^\\alpha$, where
            $m_i$ is the mean of $|x_i|$ over the tokens. Try
            $\\alpha = 0, \\tfrac{1}{steps}, \\tfrac{2}{steps}, \\dots, 1$ and return the $s$ with the least squared
            error of the output,

            $$\\left\\| \\left(\\text{quantized}(W \\, \\text{diag}(s))\\, \\text{diag}(s)^{-1} - W\\right)
            X^T \\right\\|^2$$

            exactly as it is, not rescaled. (No channel is silent.)
        """,
        starter='''
            def my_awq_scale(w: torch.Tensor, x: torch.Tensor, quantized, steps: int) -> torch.Tensor:
                """Factors s (in,) for the columns of w (out, in), with inputs x (tokens, in)."""
                raise NotImplementedError
        ''',
        solution=awq_scale,
        check=_check_awq_scale,
        hints=[
            "`x.abs().mean(dim=0)` is m, one number per column.",
            "`quantized(w * s) / s` is what the layer will use: s has shape (in,) and goes along the columns.",
            "Keep the s with the least `((quantized(w * s) / s - w) @ x.T).square().sum()`.",
        ],
    ),
    Exercise(
        "07.2",
        "Down or up",
        difficulty=2,
        minutes=12,
        statement="""
            A row `w` of few weights and a `scale`. Each code is `floor(w / scale)` or one more. Try all combinations
            and return the codes $c$ with the least loss
            $(w - c \\cdot \\text{scale})\\, H\\, (w - c \\cdot \\text{scale})^T$. A grid has no ends here.
        """,
        starter='''
            def my_best_rounding(w: torch.Tensor, scale: float, h: torch.Tensor) -> torch.Tensor:
                """The codes (n,) of w (n,) with the least loss; h (n, n)."""
                raise NotImplementedError
        ''',
        solution=best_rounding,
        check=_check_best_rounding,
        hints=[
            "`itertools.product((0, 1), repeat=n)` gives all combinations of down and up.",
            "The loss of codes c: `d = w - c * scale`, then `d @ h @ d`.",
            "`min(candidates, key=loss)` takes the best.",
        ],
    ),
    Exercise(
        "07.3",
        "What to forgive",
        difficulty=1,
        minutes=8,
        statement="""
            HQQ splits the error $x = W - W_r$ into a part that it forgives, $W_e$, and the rest. For a given $x$ the
            forgiven part is

            $$W_e = \\text{sign}(x) \\cdot \\max\\left(|x| - \\frac{|x|^{p - 1}}{\\beta},\\; 0\\right)$$

            Return it for each element. (No element is 0.)
        """,
        starter='''
            def my_shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
                """W_e, in the shape of x."""
                raise NotImplementedError
        ''',
        solution=shrink,
        check=_check_shrink,
        hints=[
            "Work with `x.abs()`, and put the sign back at the end.",
            "The threshold is `x.abs() ** (p - 1) / beta`: for p below 1 it is high where |x| is small.",
            "`torch.sign(x) * (x.abs() - threshold).clamp(min=0)`.",
        ],
    ),
    Exercise(
        "07.4",
        "A matrix that spreads",
        difficulty=2,
        minutes=10,
        statement="""
            Build the Hadamard matrix of order `n`, a power of two. Begin with $(1)$ and double:

            $$H_{2n} = \\begin{pmatrix} H_n & H_n \\\\ H_n & -H_n \\end{pmatrix}$$

            At the end divide by $\\sqrt n$, so that $H H^T$ is the identity.
        """,
        starter='''
            def my_hadamard(n: int) -> torch.Tensor:
                """The Hadamard matrix of order n over the root of n: (n, n), float32."""
                raise NotImplementedError
        ''',
        solution=sylvester,
        check=_check_sylvester,
        hints=[
            "`torch.cat([a, b], dim=1)` puts two matrices side by side, `dim=0` one above the other.",
            "A loop: `while len(h) < n: h = ...`.",
            "`torch.kron(torch.tensor([[1., 1.], [1., -1.]]), h)` is the doubled matrix in one call.",
        ],
    ),
]

QUIZ = [
    Question(
        "AWQ multiplies a column of W by 4 and divides the input by 4. What does that change?",
        {
            "Nothing before rounding; its rounding error shrinks": "Unless the column now sets its group's scale.",
            "The layer's output": "W s and x / s have the same product.",
            "The bits per weight": "The factors are folded into the layer before; nothing is stored.",
        },
        answer="a",
    ),
    Question(
        "Which of these looks at text?",
        {
            "HQQ": "It solves for zero points with the weights alone.",
            "Rotation": "A Hadamard matrix is the same for every text.",
            "AWQ": "Its factors follow the size of each channel's inputs.",
        },
        answer="c",
    ),
    Question(
        "A rotated checkpoint goes to a program that knows no online transforms. It will",
        {
            "lose a little quality": "Its weights are those of no model without them.",
            "produce nonsense": "down reads what was never rotated.",
            "work: rotation keeps the function": "Only with the transforms that could not be folded in.",
        },
        answer="b",
    ),
]

# --- pictures


def channels(x: Tensor) -> go.Figure:
    """The mean size of each input channel of x (tokens, in), sorted."""
    size = x.abs().mean(dim=0).sort(descending=True).values
    return plot.lines(
        list(range(1, len(size) + 1)),
        {"mean |x|": size.tolist()},
        title="A few input channels are loud",
        x_title="channel, the loudest first",
        y_title="mean |x| (no unit)",
        log_x=True,
        log_y=True,
        markers=False,
    )


def scale_search_of(w: Tensor, x: Tensor) -> Callable[..., go.Figure]:
    """A function of bits and alpha that draws the output error over all alphas, and marks one."""
    h = Stats.of(x).hessian
    size = x.abs().mean(dim=0).clamp(min=1e-6)

    @functools.cache
    def errors(bits: int) -> list[float]:
        spec = QuantSpec.parse(f"int{bits} g64 asym")
        found = []
        for step in range(21):
            s = size ** (step / 20)
            s = s / (s.max() * s.min()).sqrt()  # scales are stored in fp16: keep them in its range
            found.append(hessian_error(w, rtn(w * s, spec).dequantize() / s, h))
        return found

    def search(alpha: float = 0.0, bits: int = 3) -> go.Figure:
        """Error of the layer's output by alpha."""
        found = errors(bits)
        best = min(range(21), key=found.__getitem__)
        here = round(20 * alpha)
        made = plot.lines(
            [step / 20 for step in range(21)],
            {"error": [100 * e for e in found]},
            title=f"alpha = {here / 20:.2f}: {100 * found[here]:.2f} %; "
            f"best at {best / 20:.2f}: {100 * found[best]:.2f} %",
            x_title="alpha: how far the factors follow the inputs (no unit)",
            y_title="output error (% of its power)",
        )
        made.add_scatter(
            x=[here / 20], y=[100 * found[here]], name="alpha", mode="markers",
            marker={"size": 15, "symbol": "diamond", "color": plot.RED},
        )  # fmt: skip
        made.update_yaxes(rangemode="tozero")
        return made.update_layout(showlegend=False)

    return search


def turned(outlier: float = 8.0, channels: int = 64) -> go.Figure:
    """Channels of a token with one outlier, before and after a Hadamard matrix."""
    x = torch.randn(channels, generator=torch.Generator().manual_seed(0))
    x[5] = outlier
    y = hadamard_transform(x)
    made = plot.figure(
        f"largest over root mean square: {_peak(x):.1f} before, {_peak(y):.1f} after",
        "channel",
        "value (no unit)",
    )
    for name, values, color in (("before", x, plot.ORANGE), ("after", y, plot.BLUE)):
        made.add_bar(x=list(range(channels)), y=values.tolist(), name=name, marker_color=color)
    made.update_layout(barmode="group", legend={"x": 0.8, "y": 0.98})
    return made.update_yaxes(range=[-5, 21])


def _peak(x: Tensor) -> float:
    return float(x.abs().max() / x.square().mean().sqrt())


def pareto(measured: Mapping[str, Any], live: Sequence[Report] = ()) -> go.Figure:
    """KL over bits per weight: every recipe of a ladder's file (means over the seeds), and what was measured now."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in measured["rows"]:
        if row["recipe"] != "none":
            rows.setdefault(row["recipe"], []).append(row)
    points = {
        name: (found[0]["bits_per_weight"], sum(row["kl"] for row in found) / len(found))
        for name, found in rows.items()
    }
    families: dict[str, list[str]] = {}
    for name in points:
        families.setdefault(family(name), []).append(name)
    made = plot.figure(
        "Every method: bits per weight against KL",
        "bits per weight, scales and codebooks counted (bit)",
        "KL to the original (nats per token)",
        log_y=True,
        height=440,
        width=740,
    )
    for i, (name, members) in enumerate(families.items()):
        made.add_scatter(
            x=[points[m][0] for m in members],
            y=[points[m][1] for m in members],
            text=members,
            name=name,
            mode="markers",
            marker={
                "symbol": plot.SYMBOLS[i % len(plot.SYMBOLS)],
                "size": 10,
                "color": plot.COLORS[(i + i // len(plot.SYMBOLS)) % len(plot.COLORS)],
            },
        )
    front = sorted(best(points))
    made.add_scatter(
        x=[bits for bits, _ in front], y=[kl for _, kl in front], name="nothing is better in both",
        mode="lines", line={"color": "#888888", "dash": "dot"},
    )  # fmt: skip
    if live:
        made.add_scatter(
            x=[report.bits_per_weight for report in live],
            y=[report.kl for report in live],
            text=[report.recipe for report in live],
            name="measured here, lesson protocol",
            mode="markers",
            marker={"symbol": "circle-open", "size": 18, "color": plot.BLACK, "line": {"width": 2}},
        )
    made.update_layout(legend={"x": 1.02, "y": 1.0, "xanchor": "left"})
    return made


def family(recipe: str) -> str:
    """The method in a recipe's name: "gptq" of "w4a16-gptq-g64-actorder"."""
    words = recipe.partition(",")[0].split("-")[1:]
    return "-".join(
        word for word in words if not (word[0] in "gb" and word[1:].isdigit()) and word != "channel"
    )


def best(points: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which no other has both fewer bits and a lower KL."""
    return [
        (bits, kl)
        for bits, kl in points.values()
        if not any((b <= bits and k < kl) or (b < bits and k <= kl) for b, k in points.values())
    ]
