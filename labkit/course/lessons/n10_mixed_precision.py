"""Notebook 10: mixed precision. What it asks, checks and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go

from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, close, describe, number, require
from labkit.models import Report, Rule, Sensitivity, allocate
from labkit.quant import QuantSpec

# --- exercises


def mean_bits(sizes: Mapping[str, int], bits: Mapping[str, int], group: int) -> float:
    """Bits per weight over all parts; each group has a scale of 16 bits and a zero point of a code's bits."""
    total = sum(n * bits[part] + n / group * (16 + bits[part]) for part, n in sizes.items())
    return total / sum(sizes.values())


def _check_mean_bits(fn):  # type: ignore[no-untyped-def]
    for sizes, bits, group in [
        ({"q": 640, "down": 1280}, {"q": 4, "down": 2}, 64),
        ({"a": 320, "b": 64, "c": 1600}, {"a": 3, "b": 8, "c": 2}, 32),
    ]:
        count = sum(sizes.values())
        plain = sum(n * bits[p] for p, n in sizes.items()) / count
        zeros = sum(n * bits[p] for p, n in sizes.items()) / group / count
        expected = mean_bits(sizes, bits, group)
        each = [b + (16 + b) / group for b in bits.values()]
        mistakes = {
            "scales and zero points are not in it; each group stores 16 bits and a zero point besides": plain,
            "the zero points are not in it; each group stores one, of as many bits as a code": plain
            + 16 / group,
            "the scales are not in it; each group stores one, of 16 bits": plain + zeros,
            "a zero point has as many bits as a code here, not 16": plain + 32 / group,
            "one scale and one zero point for a part: they come once for each group": (
                sum(n * bits[p] + 16 + bits[p] for p, n in sizes.items()) / count
            ),
            "this is the mean over the parts; a large part counts for more": sum(each) / len(each),
            "this is the mean over the parts, and scales and zero points are not in it": (
                sum(bits.values()) / len(bits)
            ),
            "these are all the bits; divide by the number of weights": expected * count,
            "these are bytes per weight; asked for are bits": expected / 8,
        }
        close(
            number(fn(dict(sizes), dict(bits), group), "your mean"),
            expected,
            "your mean",
            mistakes=mistakes,
        )


Widths = Mapping[str, Mapping[int, float]]


def greedy(sizes: Mapping[str, int], kl: Widths, budget: float) -> dict[str, int]:
    """A width for each part: from the smallest up, each time the raise that saves most KL per bit it adds."""
    chosen = {part: min(kl[part]) for part in sizes}
    left = budget * sum(sizes.values()) - sum(n * chosen[part] for part, n in sizes.items())
    while True:
        raises = []
        for part, n in sizes.items():
            wider = [width for width in kl[part] if width > chosen[part]]
            if wider and (cost := n * (min(wider) - chosen[part])) <= left:
                raises.append(
                    ((kl[part][chosen[part]] - kl[part][min(wider)]) / cost, part, min(wider), cost)
                )
        if not raises:
            return chosen
        _, part, width, cost = max(raises)
        chosen[part], left = width, left - cost


# The first tells all mistakes apart that the check names; in the second the next width is not one bit more.
_CASES: list[tuple[dict[str, int], Widths, float]] = [
    (
        {"q": 50, "k": 20, "v": 20, "o": 30},
        {
            "q": {2: 0.76, 3: 0.30, 4: 0.11},
            "k": {2: 0.42, 3: 0.17, 4: 0.06},
            "v": {2: 0.58, 3: 0.49, 4: 0.15},
            "o": {2: 0.55, 3: 0.20, 4: 0.16},
        },
        2.75,
    ),
    (
        {"first": 10, "wide": 100, "last": 10},
        {
            "first": {2: 0.30, 4: 0.10, 8: 0.05},
            "wide": {2: 0.90, 4: 0.10, 8: 0.01},
            "last": {2: 0.20, 4: 0.02, 8: 0.01},
        },
        2.5,
    ),
]


def _climb(
    sizes: Mapping[str, int],
    kl: Widths,
    budget: float,
    score: Callable[[float, float, float], float],
    *,
    stop: bool = False,
    strict: bool = False,
    last: bool = False,
) -> dict[str, int]:
    """``greedy`` with a mistake: another ``score`` of (KL saved, bits added, KL now), or another end."""
    chosen = {part: min(kl[part]) for part in sizes}
    left = budget * sum(sizes.values()) - sum(n * chosen[part] for part, n in sizes.items())
    while True:
        raises = []
        for part, n in sizes.items():
            wider = [width for width in kl[part] if width > chosen[part]]
            if wider:
                cost = n * (min(wider) - chosen[part])
                now = kl[part][chosen[part]]
                raises.append((score(now - kl[part][min(wider)], cost, now), part, min(wider), cost))
        fits = [r for r in raises if r[3] < left or (r[3] == left and not strict)]
        best = max(raises if stop or last else fits, default=None)
        if best is None or (best[3] > left and not last):
            return chosen
        chosen[best[1]], left = best[2], left - best[3]
        if left < 0:
            return chosen


def _check_greedy(fn):  # type: ignore[no-untyped-def]
    for sizes, kl, budget in _CASES:
        found = fn(dict(sizes), {part: dict(costs) for part, costs in kl.items()}, budget)
        expected = greedy(sizes, kl, budget)
        require(
            isinstance(found, Mapping),
            f"your result is {describe(found)}; expected a dict from each part to its bits",
        )
        if set(found) != set(sizes):
            raise Wrong(f"your dict has the parts {sorted(map(str, found))}; expected {sorted(sizes)}")
        for part, width in found.items():
            require(
                width in kl[part],
                f"{part} gets {describe(width)}; its KL was measured at {', '.join(map(str, kl[part]))} bits only",
            )
        found = {part: int(width) for part, width in found.items()}
        if found == expected:
            continue

        def rate(saved: float, cost: float, now: float) -> float:
            return saved / cost

        mistakes = {
            "you take the raise that saves most KL; divide by the bits that it adds": _climb(
                sizes, kl, budget, lambda saved, cost, now: saved
            ),
            "you raise the part with the largest KL; what counts is what the raise saves, per bit": _climb(
                sizes, kl, budget, lambda saved, cost, now: now
            ),
            "you divide what a part costs now; what counts is what the raise saves": _climb(
                sizes, kl, budget, lambda saved, cost, now: now / cost
            ),
            "you take the raise that adds fewest bits": _climb(
                sizes, kl, budget, lambda saved, cost, now: -cost
            ),
            "you stop at the first raise that does not fit; a smaller one may still": _climb(
                sizes, kl, budget, rate, stop=True
            ),
            "a raise that fits exactly is allowed": _climb(sizes, kl, budget, rate, strict=True),
            "the last raise does not fit any more": _climb(sizes, kl, budget, rate, last=True),
            "every part stays at its fewest bits": {part: min(kl[part]) for part in sizes},
        }
        for sentence, value in mistakes.items():
            if found == value:
                raise Wrong(sentence)
        used = sum(n * found[part] for part, n in sizes.items()) / sum(sizes.values())
        if used > budget:
            raise Wrong(f"your widths come to {used:.4g} bits per weight; the budget is {budget:.4g}")
        raise Wrong(f"for sizes {dict(sizes)} your widths are {found}; expected {expected}")


EXERCISES = [
    Exercise(
        "10.1",
        "What an assignment costs",
        difficulty=1,
        minutes=8,
        statement="""
            `sizes` says how many weights each part has, `bits` how many bits its codes have. Every `group` weights
            share a scale of 16 bits and a zero point, which has as many bits as a code. Return the bits per weight over
            all parts: all bits, divided by all weights. (Sizes are multiples of `group`.)
        """,
        starter='''
            def my_mean_bits(sizes: dict[str, int], bits: dict[str, int], group: int) -> float:
                """Bits per weight over all parts, scales and zero points counted."""
                raise NotImplementedError
        ''',
        solution=mean_bits,
        check=_check_mean_bits,
        hints=[
            "A part of n weights has n / group groups.",
            "Its bits are `n * b + n / group * (16 + b)`.",
            "Add them up over the parts, and divide once, by `sum(sizes.values())`.",
        ],
    ),
    Exercise(
        "10.2",
        "Spend where it helps most",
        difficulty=3,
        minutes=20,
        statement="""
            `kl[part][b]` is the KL that a part costs at `b` bits; `budget` is the mean of the bits over all weights
            (no scales here). Begin with every part at its fewest bits. A *raise* takes one part to its next larger
            number of bits. Of the raises that still fit into the budget, take the one that saves most KL per bit that
            it adds, and go on until none fits. Return the bits of each part. (There are no ties, and more bits never
            cost more KL.)
        """,
        starter='''
            def my_greedy(
                sizes: dict[str, int], kl: dict[str, dict[int, float]], budget: float
            ) -> dict[str, int]:
                """Bits for each part, at most budget on average over the weights."""
                raise NotImplementedError
        ''',
        solution=greedy,
        check=_check_greedy,
        hints=[
            "Count in bits, not in bits per weight: `left = budget * sum(sizes.values())` minus what is used.",
            "The raise of a part with n weights from b to c bits adds `n * (c - b)` bits and saves "
            "`kl[part][b] - kl[part][c]`.",
            "In each round list all raises that add at most `left`, and take the largest by saved / added. "
            "`min(c for c in kl[part] if c > b)` is the next width; for the largest there is none.",
        ],
    ),
]

QUIZ = [
    Question(
        "A part's sensitivity is measured with all other parts left in full precision. So it says",
        {
            "what this part costs alone": "Whether the costs add up must be measured.",
            "what this part costs in the quantized model": "There its inputs are different ones.",
            "how large its weights are": "No weight was looked at.",
        },
        answer="a",
    ),
    Question(
        "Two assignments have equal bits per weight over the decoder layers. Their files",
        {
            "are equally large": "Bits times weights are the bits; head and norms are the same in both.",
            "differ by their scales": "Scales are in the bits per weight.",
            "differ by the order of the layers": "Order takes no bits.",
        },
        answer="a",
    ),
    Question(
        "The sum of the parts' KLs is far below the measured KL of the whole model. What is it still good for?",
        {
            "Nothing": "Uniform and mixed at equal size were ranked rightly by it.",
            "The order of assignments": "It is their order that the programme needs, and that is measured at the end.",
            "The perplexity": "KL and perplexity are different scales.",
        },
        answer="b",
    ),
]

# --- pictures


def uniform(sensitivity: Sensitivity, spec: str) -> tuple[float, float]:
    """(bits per weight, predicted KL) where every part has the same grid."""
    return sensitivity.predict([Rule("*", QuantSpec.parse(spec), sensitivity.method)])


def grids(sensitivity: Sensitivity) -> list[str]:
    """The candidate grids, the smallest first."""
    return list(next(iter(sensitivity.costs.values())))


def costs(sensitivity: Sensitivity) -> go.Figure:
    """The KL of each part alone, a line for each grid."""
    parts = list(sensitivity.costs)
    return plot.lines(
        list(range(len(parts))),
        {grid: [sensitivity.costs[part][grid].kl for part in parts] for grid in grids(sensitivity)},
        title="What each decoder layer costs when it alone is quantized",
        x_title="decoder layer",
        y_title="KL to the original (nats per token)",
        log_y=True,
        markers=False,
    ).update_layout(height=340, legend={"x": 0.5, "xanchor": "center", "y": 0.98})


def assignment_of(sensitivity: Sensitivity) -> Callable[[float], go.Figure]:
    """A function of the budget that draws which part gets how many bits."""
    same = {grid: uniform(sensitivity, grid) for grid in grids(sensitivity)}

    def assignment(budget: float = 3.0) -> go.Figure:
        """The codes' bits of each decoder layer, and the predicted KL beside that of one grid for all."""
        rules = allocate(sensitivity, budget)
        bits, kl = sensitivity.predict(rules)
        fits = {grid: found for grid, found in same.items() if found[0] <= budget}
        best = min(fits, key=lambda grid: fits[grid][1])
        made = plot.figure(
            f"{bits:.2f} bits per weight: predicted KL {kl:.3f}; {best} everywhere: {fits[best][1]:.3f}",
            "decoder layer",
            "bits of a code",
        )
        heights = [rule.weight.bits for rule in rules if isinstance(rule.weight, QuantSpec)]
        made.add_bar(x=list(range(len(rules))), y=heights, marker_color=plot.BLUE, showlegend=False)
        return made.update_yaxes(range=[0, max(QuantSpec.parse(grid).bits for grid in same) + 0.5])

    return assignment


def frontier(sensitivity: Sensitivity, measured: Mapping[str, Report]) -> go.Figure:
    """Predicted KL over the budget; one grid for all, predicted; and what was measured of whole models."""
    same = {grid: uniform(sensitivity, grid) for grid in grids(sensitivity)}
    low, high = min(b for b, _ in same.values()), max(b for b, _ in same.values())
    budgets = [low + (high - low) * i / 24 for i in range(25)]
    found = [sensitivity.predict(allocate(sensitivity, budget + 1e-9)) for budget in budgets]
    made = plot.lines(
        [bits for bits, _ in found],
        {"best assignment, predicted": [kl for _, kl in found]},
        title="Predicted from single layers, and measured",
        x_title="bits per weight over the decoder layers (bit)",
        y_title="KL to the original (nats per token)",
        log_y=True,
        markers=False,
    )
    series = {
        "one grid for all, predicted": list(same.values()),
        "one grid for all, measured": [
            (r.bits_per_weight, r.kl) for name, r in measured.items() if not name.startswith("mixed")
        ],
        "mixed, measured": [
            (r.bits_per_weight, r.kl) for name, r in measured.items() if name.startswith("mixed")
        ],
    }
    for i, (name, points) in enumerate(series.items(), start=1):
        made.add_scatter(
            x=[bits for bits, _ in points],
            y=[kl for _, kl in points],
            name=name,
            mode="markers",
            marker={"symbol": plot.SYMBOLS[i], "size": 12, "color": plot.COLORS[i]},
        )
    return made.update_layout(height=360, legend={"x": 0.98, "xanchor": "right", "y": 0.98})


def kinds(rules: Sequence[Rule]) -> dict[str, dict[str, int]]:
    """How many matrices of each kind got which grid: from the grid to ``{"q_proj": 12, ...}``."""
    found: dict[str, dict[str, int]] = {}
    for rule in rules:
        of_grid = found.setdefault(str(rule.weight), {})
        kind = rule.match.rpartition(".")[2]
        of_grid[kind] = of_grid.get(kind, 0) + 1
    return {grid: dict(sorted(found[grid].items())) for grid in sorted(found)}
