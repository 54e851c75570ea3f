"""Notebook 04: non-uniform grids. What it asks, checks and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, equal, require, tensor
from labkit.quant import lloyd, near_optimal, sqnr_db

# --- exercises


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """For each number of ``x`` (any shape) the index of the entry of ``table`` (k,) that is closest to it."""
    return (x[..., None] - table).abs().argmin(dim=-1)


def _check_nearest(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for table, shape in [
        (torch.tensor([-1.0, -0.3, 0.3, 1.0]), (12,)),
        (torch.tensor([-2.0, -0.5, 0.1, 0.2, 3.0]), (4, 6)),
    ]:
        x = 1.5 * torch.randn(shape, generator=generator)
        x.view(-1)[:4] = torch.tensor([-9.0, 9.0, 0.25, -0.7])
        expected = nearest(x, table)
        last = len(table) - 1
        step = (table[-1] - table[0]) / last
        mistakes = {
            "these are entries of the table; return their indices": table[expected],
            "you take the entry below x; the one above may be closer": (
                (torch.searchsorted(table, x, right=True) - 1).clamp(min=0)
            ),
            "you take the entry above x; the one below may be closer": torch.searchsorted(table, x).clamp(
                max=last
            ),
            "you look for the smallest difference with its sign, which is the most negative one; take the absolute "
            "difference": (x[..., None] - table).argmin(-1),
            "you look for the smallest difference with its sign; take the absolute difference": (
                (table - x[..., None]).argmin(-1)
            ),
            "this is the entry that is furthest away; take the smallest difference": (
                (x[..., None] - table).abs().argmax(-1)
            ),
            "you round as if the entries were equally far apart; compare with each of them": (
                ((x - table[0]) / step).round().clamp(0, last)
            ),
        }
        found = tensor(fn(x.clone(), table.clone()), "your codes", shape=shape, mistakes=mistakes)
        equal(found, expected, "your code", mistakes=mistakes)


def lloyd_step(x: Tensor, centres: Tensor) -> Tensor:
    """Each centre (k,) to the mean of the numbers ``x`` (n,) that are closest to it; one without any stays."""
    chosen = (x[:, None] - centres).abs().argmin(dim=1)  # (n,)
    moved = centres.clone()
    for i in range(len(centres)):
        mine = x[chosen == i]
        if len(mine):
            moved[i] = mine.mean()
    return moved


def _check_lloyd_step(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    cases = [
        (torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([0.5, 8.0, 30.0])),
        (torch.randn(200, generator=generator) ** 3, torch.tensor([-2.0, -0.5, 0.4, 2.5])),
    ]
    for x, centres in cases:
        k = len(centres)
        chosen = (x[:, None] - centres).abs().argmin(1)
        expected = lloyd_step(x, centres)
        below = (torch.searchsorted(centres, x, right=True) - 1).clamp(min=0)

        def with_rule(rule: Callable[[Tensor], Tensor], which: Tensor, empty: str = "stay") -> Tensor:
            parts = [rule(x[which == i]) if bool((which == i).any()) else centres[i] for i in range(k)]  # noqa: B023
            if empty == "zero":
                parts = [p if bool((which == i).any()) else torch.zeros(()) for i, p in enumerate(parts)]
            return torch.stack(parts)

        mistakes = {
            "you moved each centre to the median; the mean has the least squared error": with_rule(
                lambda part: part.quantile(0.5), chosen
            ),
            "you moved each centre to the median, the lower of two; the mean has the least squared error": with_rule(
                torch.median, chosen
            ),
            "you moved each centre to the middle of its range; take the mean of its numbers": with_rule(
                lambda part: (part.min() + part.max()) / 2, chosen
            ),
            "a centre that no number chose went to 0; leave it where it was": with_rule(
                torch.mean, chosen, "zero"
            ),
            "each number went to the centre below it; it goes to the closest": with_rule(torch.mean, below),
            "the centres did not move; each goes to the mean of its numbers": centres,
            "these are the borders between the centres; return the centres": (centres[1:] + centres[:-1])
            / 2,
            "these are sums; divide each by how many numbers it has": with_rule(torch.sum, chosen),
        }
        found = tensor(
            fn(x.clone(), centres.clone()), "your centres", shape=(k,), finite=False, mistakes=mistakes
        )
        require(
            not bool(found.isnan().any()),
            "one of your centres is NaN: no number chose it, and 0/0 has no value. Leave such a centre where it was",
        )
        close(found, expected, "your centre", mistakes=mistakes)


def equal_use(x: Tensor, k: int) -> Tensor:
    """The k entries that cut ``x`` (n,) into parts of equal size and stand in their middles: (k,)."""
    return torch.quantile(x, (torch.arange(k) + 0.5) / k)


def _check_equal_use(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for n, k in [(101, 4), (1000, 8), (64, 16)]:
        x = torch.randn(n, generator=generator) ** 3
        at = lambda p: torch.quantile(x, p)  # noqa: E731, B023
        i = torch.arange(k, dtype=torch.float32)
        mistakes = {
            "your entries reach from the smallest to the largest number, i / (k - 1); each part's middle is at "
            "(i + 1/2) / k": at(i / (k - 1)),
            "your entries stand at the lower end of each part, i / k; its middle is at (i + 1/2) / k": at(
                i / k
            ),
            "your entries stand at the upper end of each part; its middle is at (i + 1/2) / k": at(
                (i + 1) / k
            ),
            "(i + 1) / (k + 1) leaves the outer parts larger; the middles are at (i + 1/2) / k": at(
                (i + 1) / (k + 1)
            ),
            "your entries are equally far apart; the shares of x between them should be equal": torch.linspace(
                x.min().item(), x.max().item(), k
            ),
            "these are the shares (i + 1/2) / k; return the numbers of x that stand there": (i + 0.5) / k,
        }
        found = tensor(fn(x.clone(), k), "your table", shape=(k,), mistakes=mistakes)
        # Whoever picks the nearest element instead of interpolating is right too.
        ordered = x.sort().values
        place = (i + 0.5) / k * (n - 1)
        low, high = ordered[place.floor().long()], ordered[place.ceil().long()]
        if not bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all()):
            close(found, equal_use(x, k), "your entry", mistakes=mistakes)


def weighted_centres(x: Tensor, weight: Tensor, codes: Tensor, k: int) -> Tensor:
    """The mean of the numbers of each code, weighted with their importance: (k,)."""
    total = torch.zeros(k).index_add(0, codes, weight)
    return torch.zeros(k).index_add(0, codes, weight * x) / total


def _check_weighted_centres(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for n, k in [(12, 3), (300, 8)]:
        x = torch.randn(n, generator=generator)
        weight = torch.rand(n, generator=generator) ** 3 + 0.01
        codes = torch.arange(n) % k
        expected = weighted_centres(x, weight, codes, k)

        def of(w: Tensor, over: Tensor | None = None) -> Tensor:
            total = torch.zeros(k).index_add(0, codes, w if over is None else over)  # noqa: B023
            return torch.zeros(k).index_add(0, codes, w * x) / total  # noqa: B023

        mistakes = {
            "this is the plain mean; an important number counts for more": of(torch.ones(n)),
            "you divide by how many numbers there are; divide by the sum of their weights": of(
                weight, torch.ones(n)
            ),
            "you weigh with the square of the weight; in w (x - c)^2 it stands once": of(weight**2),
            "you weigh with the root of the weight; in w (x - c)^2 it stands once": of(weight.sqrt()),
            "you forgot to divide; a mean is the weighted sum over the sum of the weights": expected
            * torch.zeros(k).index_add(0, codes, weight),
            "you divide by the sum of all weights; each code has a sum of its own": (
                torch.zeros(k).index_add(0, codes, weight * x) / weight.sum()
            ),
        }
        found = tensor(
            fn(x.clone(), weight.clone(), codes.clone(), k), "your centres", shape=(k,), mistakes=mistakes
        )
        close(found, expected, "your centre", mistakes=mistakes)


EXERCISES = [
    Exercise(
        "04.1",
        "The nearest entry",
        difficulty=1,
        minutes=6,
        statement="""
            A `table` holds `k` ascending numbers. The code of $x$ is the index of the entry that is closest to it:

            $$\\text{code} = \\arg\\min_i |x - \\text{table}_i|$$

            Return the codes of `x`, which has any shape. (No number here is equally far from two entries.)
        """,
        starter='''
            def my_nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
                """Indices, in the shape of x, of the closest entries of table (k,)."""
                raise NotImplementedError
        ''',
        solution=nearest,
        check=_check_nearest,
        hints=[
            "Compare every number with every entry: an axis more.",
            "`x[..., None] - table` has shape (..., k).",
            "`.abs().argmin(dim=-1)`.",
        ],
    ),
    Exercise(
        "04.2",
        "One step of Lloyd",
        difficulty=2,
        minutes=12,
        statement="""
            Given numbers `x` of shape `(n,)` and ascending `centres` of shape `(k,)`: let each number choose its
            closest centre, then move each centre to the mean of the numbers that chose it. A centre that nobody
            chose stays where it is. Return the moved centres; leave the old ones as they are.
        """,
        starter='''
            def my_lloyd_step(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
                """The centres (k,) after one step, for numbers x (n,)."""
                raise NotImplementedError
        ''',
        solution=lloyd_step,
        check=_check_lloyd_step,
        hints=[
            "The first half is exercise 04.1.",
            "`x[chosen == i]` are the numbers of centre i.",
            "Start from `centres.clone()`, and move centre i only where `len(x[chosen == i])` is not 0.",
        ],
    ),
    Exercise(
        "04.3",
        "Codes of equal use",
        difficulty=2,
        minutes=8,
        statement="""
            Make a table in which each code is used about equally often. Cut the sorted numbers `x` (shape `(n,)`) into
            `k` parts of equal size and take the middle of each: entry $i$ is the $\\frac{i + 1/2}{k}$ quantile,
            for $i = 0, \\dots, k - 1$.
        """,
        starter='''
            def my_equal_use(x: torch.Tensor, k: int) -> torch.Tensor:
                """The (i + 1/2) / k quantiles of x (n,): a table (k,)."""
                raise NotImplementedError
        ''',
        solution=equal_use,
        check=_check_equal_use,
        hints=[
            "The 0.5 quantile is the number below which half of all lie.",
            "The shares are `(torch.arange(k) + 0.5) / k`.",
            "`torch.quantile(x, shares)` takes them all at once.",
        ],
    ),
    Exercise(
        "04.4",
        "Centres that listen to the loss",
        difficulty=2,
        minutes=8,
        statement="""
            Each number $x_j$ now has an importance $w_j > 0$, and a code already. Find the centre of each code $i$ with
            the least $\\sum_j w_j (x_j - c_i)^2$ over its numbers. Set the derivative to zero:

            $$c_i = \\frac{\\sum_j w_j x_j}{\\sum_j w_j}, \\quad j \\text{ over the numbers with code } i$$

            Every code occurs.
        """,
        starter='''
            def my_weighted_centres(
                x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, k: int
            ) -> torch.Tensor:
                """The weighted means (k,) of x (n,), weight (n,), by codes (n,) int64."""
                raise NotImplementedError
        ''',
        solution=weighted_centres,
        check=_check_weighted_centres,
        hints=[
            "A loop over the k codes does it: `mine = codes == i`.",
            "`(weight[mine] * x[mine]).sum() / weight[mine].sum()`.",
            "Without a loop: `torch.zeros(k).index_add(0, codes, weight)` sums the weights by code.",
        ],
    ),
]

QUIZ = [
    Question(
        "A k-means codebook has a lower squared error than a uniform grid of as many codes, on the same numbers,",
        {
            "always, if the iteration ended at the optimum": "A uniform grid is one of those it could have chosen.",
            "only for normal distributions": "The optimum is taken over all codebooks, whatever the numbers.",
            "never at 8 bits": "There the gain is small in decibels, but it is not negative.",
        },
        answer="a",
    ),
    Question(
        "All 16 codes are used equally often. That means",
        {
            "the squared error is as low as it can be": "k-means uses its outer codes seldom, and is better.",
            "no code could be spared without losing information": "The entropy is 4 bits. Information is not error.",
            "the entries are equally far apart": "Only where the numbers are spread evenly.",
        },
        answer="b",
    ),
    Question(
        "What does a table cost that a uniform grid does not?",
        {
            "More bits for each code": "4 bits are 4 bits.",
            "A look-up, and it cannot be summed in whole numbers": "table[code] must be found before multiplying.",
            "A zero point": "A table needs none: 0 may be one of its entries.",
        },
        answer="b",
    ),
]

# --- pictures


def usage(series: Mapping[str, Tensor]) -> go.Figure:
    """How often each code is used, in percent; each entry of ``series`` holds the codes counted from 0."""
    shares = {
        name: (100 * torch.bincount(codes.flatten().int(), minlength=16) / codes.numel()).tolist()
        for name, codes in series.items()
    }
    made = plot.lines(
        list(range(16)),
        shares,
        title="How often each of 16 codes is used",
        x_title="code, the lowest first",
        y_title="share of the weights (%)",
    )
    made.update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.98})
    return made.update_yaxes(rangemode="tozero")


def codebook_of(x: Tensor) -> Callable[..., go.Figure]:
    """A function of four entries and a number of Lloyd's steps that draws the codebook over ``x``'s histogram."""
    x = x.detach().flatten().float()
    counts = torch.histc(x, 100, -1, 1)
    places = ((torch.arange(100) + 0.5) / 50 - 1).tolist()
    best = quality(x, near_optimal(x[None], 4)[0])

    def codebook(
        a: float = -0.9, b: float = -0.8, c: float = -0.7, d: float = 0.6, steps: int = 0
    ) -> go.Figure:
        """Four entries and the borders between them, after so many steps of Lloyd's iteration."""
        centres = torch.tensor(sorted((a, b, c, d)), dtype=torch.float64)
        if steps:
            centres = lloyd(x[None], centres[None], iterations=steps)[0]
        made = plot.figure(
            f"{quality(x, centres):.2f} dB; the best four entries have {best:.2f} dB",
            "weight over its group's largest (no unit)",
            "count",
        )
        made.add_bar(x=places, y=counts.tolist(), marker_color=plot.SKY, showlegend=False)
        top = float(counts.max()) * 1.08
        for name, at, color, dash in (
            ("entry", centres, plot.BLACK, "solid"),
            ("border", (centres[1:] + centres[:-1]) / 2, plot.RED, "dot"),
        ):
            made.add_scatter(
                x=[v for place in at.tolist() for v in (place, place, None)],
                y=[v for _ in at for v in (0, top, None)],
                name=name,
                mode="lines",
                line={"color": color, "dash": dash, "width": 2},
            )
        made.update_layout(bargap=0, legend={"orientation": "h", "x": 0.72, "y": 1.0})
        made.update_yaxes(range=[0, top])
        return made.update_xaxes(range=[-1.02, 1.02])

    return codebook


def quality(x: Tensor, table: Tensor) -> float:
    """SQNR of ``x`` on the entries of ``table`` (k,), each number on its nearest, in dB."""
    table = table.to(x)
    return sqnr_db(x, table[nearest(x, table)])


def path(x: Tensor, start: Tensor, steps: int) -> list[float]:
    """SQNR before the first and after each of ``steps`` steps of Lloyd's iteration."""
    centres, found = start.double(), []
    for _ in range(steps + 1):
        found.append(quality(x, centres))
        centres = lloyd(x[None], centres[None], iterations=1)[0]
    return found


def descent(series: Mapping[str, Sequence[float]]) -> go.Figure:
    """SQNR after each step of Lloyd's iteration, for several starts."""
    longest = max(len(values) for values in series.values())
    return plot.lines(
        list(range(longest)),
        series,
        title="Lloyd's iteration, 16 entries, from three starts",
        x_title="steps",
        y_title="SQNR (dB)",
        markers=False,
    ).update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.05, "yanchor": "bottom"})


def rulers(tables: Mapping[str, Tensor]) -> go.Figure:
    """Tables above each other, in shares of the largest number of a group."""
    made = plot.figure(
        "Sixteen entries, five ways", "entry (share of the group's largest weight)", "", height=330
    )
    for i, (name, table) in enumerate(tables.items()):
        values = table.double()
        made.add_scatter(
            x=values.tolist(),
            y=[name] * len(values),
            mode="markers",
            showlegend=False,
            marker={
                "symbol": "line-ns",
                "size": 22,
                "line": {"width": 3, "color": plot.COLORS[i % len(plot.COLORS)]},
            },
        )
    made.update_yaxes(autorange="reversed")
    return made.update_xaxes(range=[-1.12, 1.12])


def at_equal_bits(points: Mapping[str, tuple[float, float]]) -> go.Figure:
    """SQNR over bits per weight, a mark with its name for each grid."""
    made = plot.figure(
        "Grids of about 4 bits, scales and codebooks counted",
        "bits per weight (bit)",
        "SQNR (dB)",
        height=460,
    )
    for i, (name, (bits, sqnr)) in enumerate(points.items()):
        made.add_scatter(
            x=[bits],
            y=[sqnr],
            name=name,
            mode="markers",
            marker={
                "symbol": plot.SYMBOLS[i % len(plot.SYMBOLS)],
                "size": 12,
                "color": plot.COLORS[i % len(plot.COLORS)],
            },
        )
    return made.update_layout(legend={"x": 1.02, "y": 1.0, "xanchor": "left"})
