"""Notebook 05: post-training quantization. What it asks, checks and draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, number, require
from labkit.models import Llama, Recipe, Report, Rule, load, quantize
from labkit.quant import QuantSpec

# --- exercises


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """exp of the mean cross-entropy; logits (T, V) at position t are about tokens[t + 1], tokens (T,)."""
    log_p = logits[:-1].log_softmax(dim=-1)  # (T - 1, V); the last position's next token is not in the text
    nll = -log_p.gather(1, tokens[1:, None])  # (T - 1, 1)
    return nll.double().mean().exp().item()


def _check_perplexity(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    large = 300 * torch.randn(6, 5, generator=generator)
    tokens = torch.tensor([3, 0, 4, 1, 1, 2])
    large[torch.arange(5), tokens[1:]] = (
        large[:-1].max(dim=-1).values - 1.0
    )  # so that the answer stays finite
    for logits in (2 * torch.randn(6, 5, generator=generator), large):
        log_p = logits.log_softmax(dim=-1)
        right = log_p[:-1].gather(1, tokens[1:, None]).flatten()  # (T - 1,)
        mistakes: dict[str, Any] = {
            "you score each token with its own position; logits[t] are about tokens[t + 1]": (
                -log_p.gather(1, tokens[:, None]).mean()
            ).exp(),
            "you score each token with its own position and leave out the last; logits[t] are about tokens[t + 1]": (
                -log_p[:-1].gather(1, tokens[:-1, None]).mean()
            ).exp(),
            "this is the cross-entropy in nats; the perplexity is its exponential": -right.mean(),
            "you average the perplexities of the positions; average the cross-entropies, then take exp once": (
                (-right).exp().mean()
            ),
            "you add the cross-entropies up; take their mean": (-right.sum()).exp(),
            "you divide by the number of tokens; one fewer is predicted": (
                -right.sum() / len(tokens)
            ).exp(),
            "you use log2 with exp; both must have the same base": (-right.mean() / math.log(2)).exp(),
        }
        found = fn(logits, tokens)
        _require_finite(
            found,
            "your perplexity is not finite for logits of a few hundred: exp overflows; use log_softmax",
        )
        mistakes = {why: float(value) for why, value in mistakes.items()}
        close(
            number(found, "your perplexity"),
            perplexity(logits, tokens),
            "your perplexity",
            mistakes=mistakes,
        )


def _require_finite(found: Any, why: str) -> None:
    try:
        value = float(found)
    except (TypeError, ValueError):
        return  # no number at all: number() says what it is
    require(math.isfinite(value), why)


def kl(reference: Tensor, quantized: Tensor) -> float:
    """KL(reference || quantized) in nats, averaged over positions, from logits (T, V) each."""
    log_p = reference.log_softmax(dim=-1)  # (T, V)
    log_q = quantized.log_softmax(dim=-1)  # (T, V)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().mean().item()


def _check_kl(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    p = 2 * torch.randn(4, 7, generator=generator)
    q = p + torch.randn(4, 7, generator=generator)
    far = torch.tensor([[400.0, 0.0, -400.0], [0.0, 2.0, 1.0]])
    for reference, quantized in ((p, q), (far, far + torch.tensor([0.0, 1.0, 0.5]))):
        log_p, log_q = reference.log_softmax(-1), quantized.log_softmax(-1)
        expected = kl(reference, quantized)
        terms = log_p.exp() * (log_p - log_q)  # (T, V)
        mistakes: dict[str, Any] = {
            "this is KL(quantized || reference), the wrong direction; weight with the reference's probabilities": kl(
                quantized, reference
            ),
            "you take the mean over the vocabulary; sum over it, and take the mean over positions": terms.mean(),
            "you add the positions up; take their mean": terms.sum(),
            "the sign is turned round; a KL is never negative": -expected,
            "these logits are not normalised; take log_softmax of both first": (
                reference.softmax(-1) * (reference - quantized)
            )
            .sum(-1)
            .mean(),
            "this is in bits; nats take the natural logarithm": expected / math.log(2),
            "this is the cross-entropy; subtract the reference's own entropy": -(log_p.exp() * log_q)
            .sum(-1)
            .mean(),
        }
        found = fn(reference, quantized)
        _require_finite(
            found,
            "your KL is not finite for logits of a few hundred: a probability became 0 and its logarithm -inf; "
            "subtract log_softmax values instead",
        )
        mistakes = {why: float(value) for why, value in mistakes.items()}
        close(number(found, "your KL"), expected, "your KL", mistakes=mistakes)


def choose(reports: Sequence[Report], budget: int) -> str | None:
    """The recipe with the lowest KL among those of at most ``budget`` bytes; None where none fits."""
    fitting = [report for report in reports if report.bytes <= budget]
    return min(fitting, key=lambda report: report.kl).recipe if fitting else None


def _report(recipe: str, size: int, kl: float, perplexity: float) -> Report:
    return Report("example", recipe, perplexity, kl, 0.5, 4.0, 8.0, size, 8, "example", 1.0)


def _check_choose(fn):  # type: ignore[no-untyped-def]
    table = [
        _report("fine", 220, 0.004, 81.4),
        _report("small", 167, 0.716, 131.9),
        _report("lucky", 170, 0.372, 95.0),
        _report("good", 171, 0.202, 96.7),
        _report("tiny", 157, 1.479, 273.9),
    ]
    asked = [
        (171, "good", {"tiny": "is the smallest, not the best", "fine": "is over the budget"}),
        (
            170,
            "lucky",
            {"small": "fits, yet another has a lower KL", "tiny": "is the smallest, not the best"},
        ),
        (
            1000,
            "fine",
            {
                "tiny": "is the smallest, not the best",
                "good": "is the largest under 200; the budget is 1000",
            },
        ),
    ]
    for budget, expected, why in asked:
        found = fn(table, budget)
        if budget == 171 and found == "lucky":
            require(
                False, "you chose 'lucky' for a budget of 171 bytes: its perplexity is lower; rank by KL"
            )
        require(
            found == expected,
            f"for a budget of {budget} bytes expected {expected!r}, found {found!r}"
            + (f", which {why[found]}" if found in why else "; return the recipe's name, or None"),
        )
    found = fn(table, 100)
    require(found is None, f"no recipe fits 100 bytes; expected None, found {found!r}")


EXERCISES = [
    Exercise(
        "05.1",
        "Perplexity from logits",
        difficulty=1,
        minutes=6,
        statement="""
            `logits[t]` is about the token that *follows* position $t$. Score tokens $1 \\dots T-1$, each with the
            logits of the position before it, and return

            $$\\mathrm{perplexity} = \\exp\\Big(-\\frac{1}{T-1}\\sum_{t=0}^{T-2} \\ln p_t(x_{t+1})\\Big)$$

            Logits of a few hundred must not overflow.
        """,
        starter='''
            def my_perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
                """exp of the mean cross-entropy; logits (T, V), tokens (T,) int64."""
                raise NotImplementedError
        ''',
        solution=perplexity,
        check=_check_perplexity,
        hints=[
            "The last row of logits is about a token that is not in the text; no row is about the first token.",
            "`logits[:-1].log_softmax(dim=-1)` is (T - 1, V) and safe. `.gather(1, tokens[1:, None])` picks from it.",
            "Minus, then mean, then exp, in this order; return `.item()`.",
        ],
    ),
    Exercise(
        "05.2",
        "KL from two sets of logits",
        difficulty=2,
        minutes=8,
        statement="""
            Return $\\mathrm{KL}(p \\,\\|\\, q) = \\sum_v p_v (\\ln p_v - \\ln q_v)$ in nats, averaged over the $T$
            positions, where $p$ is the reference and $q$ the quantized model. A probability may be too small for a
            float: the result must stay finite.
        """,
        starter='''
            def my_kl(reference: torch.Tensor, quantized: torch.Tensor) -> float:
                """KL(reference || quantized) in nats, mean over positions; logits (T, V) each."""
                raise NotImplementedError
        ''',
        solution=kl,
        check=_check_kl,
        hints=[
            "Whose probabilities are the weights? The reference's: it decides which words matter.",
            "`log_softmax` gives the logarithms without ever forming a probability that is rounded to 0.",
            "Sum over the vocabulary (`dim=-1`), then mean over the positions.",
        ],
    ),
    Exercise(
        "05.3",
        "The best recipe under a budget",
        difficulty=1,
        minutes=4,
        statement="""
            Each report has `.recipe`, `.bytes`, `.kl` and `.perplexity`. Return the name of the recipe that is closest
            to the reference among those of at most `budget` bytes, or `None` where none fits.
        """,
        starter='''
            def my_choose(reports: list, budget: int) -> str | None:
                """The name of the best recipe of at most budget bytes; None where none fits."""
                raise NotImplementedError
        ''',
        solution=choose,
        check=_check_choose,
        hints=[
            "Filter first: `report.bytes <= budget`.",
            "Closest to the reference is a matter of `.kl`, not of `.perplexity`.",
        ],
    ),
]

# --- quiz

QUIZ = [
    Question(
        "A quantized model has the same perplexity as its original. What follows?",
        {
            "They give the same predictions": "Perplexity reads one probability a position; the others may have moved.",
            "The recorded text is on average as likely to both": "That is all that perplexity says.",
            "The KL is zero": "A softened reference showed lower perplexity and a KL well above zero.",
        },
        answer="b",
    ),
    Question(
        "Why is the KL weighted with the reference's probabilities?",
        {
            "Because the reference's are larger": "Both sets of probabilities add up to 1.",
            "It makes no difference": "The two directions differ; the four words gave 0.43 and 0.35.",
            "A word counts as much as the reference would have used it": "So a likely word that was lost is expensive.",
        },
        answer="c",
    ),
    Question(
        "`w4a16-rtn-g64` stores 4.31 bits per weight, and its file holds 10.15 bits per weight. Why?",
        {
            "Embedding and head stay in 32 bits": "They are one matrix, a fifth of the model, and were left alone.",
            "The scales are stored in 32 bits": "They are fp16, and the 4.31 has them counted already.",
            "The file is padded": "Rows are padded to whole bytes at most.",
        },
        answer="a",
    ),
]

# --- pictures

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = ("The capital of France is", "Call me", "The captain of the", "One, two, three,")


def toy(p: Sequence[float], q: Sequence[float], words: Sequence[str]) -> go.Figure:
    """Two distributions over a small vocabulary, side by side."""
    made = plot.figure("The same words, other probabilities", "next word", "probability")
    for name, values, color in (
        ("p: reference", p, plot.BLUE),
        ("q: quantized", q, plot.ORANGE),
    ):
        made.add_bar(
            x=list(words),
            y=list(values),
            name=name,
            marker_color=color,
            text=[f"{v:g}" for v in values],
            textposition="outside",
            cliponaxis=False,
        )
    return made.update_yaxes(range=[0, 0.6])


def ladder(measured: Mapping[str, Any], recipes: Sequence[str]) -> go.Figure:
    """Perplexity against KL for these recipes and every seed of ``data/measurements/ladder.json``."""
    seeds = len(measured["seeds"])
    made = plot.figure(
        f"KL and perplexity: one order, other distances ({seeds} seed{'s' if seeds > 1 else ''}, full protocol)",
        "perplexity",
        "KL to the reference (nats per token)",
        log_x=True,
        log_y=True,
        height=440,
    )
    for i, name in enumerate(recipes):
        rows = [row for row in measured["rows"] if row["recipe"] == name]
        made.add_scatter(
            x=[row["perplexity"] for row in rows],
            y=[row["kl"] for row in rows],
            name=name,
            mode="markers",
            marker={"symbol": plot.SYMBOLS[i], "size": 11, "color": plot.COLORS[i]},
        )
    original = [row["perplexity"] for row in measured["rows"] if row["recipe"] == "none"]
    made.add_vline(x=sum(original) / len(original), line={"color": "#444444", "dash": "dot"})
    made.add_annotation(
        x=math.log10(sum(original) / len(original)),
        y=0.5,
        yref="paper",
        text="the original's perplexity",
        textangle=-90,
        showarrow=False,
        xshift=-10,
    )
    made.update_xaxes(tickvals=[80, 100, 150, 200, 300])
    return made.update_yaxes(tickvals=[0.003, 0.01, 0.03, 0.1, 0.3, 1], range=[-2.7, 0.4])


def sensitivity(reports: Sequence[Report], names: Sequence[str], title: str, x_title: str) -> go.Figure:
    """KL of each report as a bar; ``names`` label them."""
    made = plot.bars(
        {name: report.kl for name, report in zip(names, reports, strict=True)},
        title=title,
        x_title=x_title,
        y_title="KL to the reference (nats per token)",
        digits=2,
    )
    made.update_traces(marker_color=plot.BLUE)
    if len(names) > 10:  # no room for a number on each
        made.update_traces(text=None)
        made.update_xaxes(type="category", tickangle=0, tickvals=list(names)[::5])
    return made


def softened(
    temperatures: Sequence[float], perplexities: Sequence[float], kls: Sequence[float]
) -> go.Figure:
    """Perplexity (left axis) and KL (right axis) of the reference's own logits divided by a temperature."""
    made = plot.lines(
        temperatures,
        {"perplexity (left)": perplexities},
        title="Perplexity falls while the KL rises",
        x_title="temperature that divides the reference's logits",
        y_title="perplexity",
    )
    made.add_scatter(
        x=list(temperatures),
        y=list(kls),
        name="KL (right)",
        yaxis="y2",
        mode="lines+markers",
        line={"color": plot.ORANGE, "dash": "dash"},
        marker={"symbol": "square", "size": 8},
    )
    made.update_layout(
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "title": {"text": "KL to the reference (nats per token)"},
            "showgrid": False,
            "range": [-0.02, 0.5],
            "tickmode": "array",
            "tickvals": [0, 0.1, 0.2, 0.3, 0.4, 0.5],
        },
        legend={"x": 0.35, "y": 0.98},
        margin={"r": 80},
    )
    return made


def windows(perplexities: Mapping[str, Sequence[float]]) -> go.Figure:
    """The perplexity of each window, a line for each model."""
    count = len(next(iter(perplexities.values())))
    return plot.lines(
        list(range(count)),
        perplexities,
        title="Windows differ as much as recipes do, and one much more",
        x_title="evaluation window",
        y_title="perplexity of that window",
    )


@functools.cache
def _reference() -> Llama:
    return load()


@functools.cache
def _logits(prompt: str) -> Tensor:
    reference = _reference()
    with torch.no_grad():
        return reference(torch.tensor([reference.tokenizer.encode(prompt)]))[0, -1]  # (vocab,)


def next_token(prompt: str = PROMPTS[0], block: int = 29, bits: int = 3) -> go.Figure:
    """The reference's eight likeliest tokens after ``prompt``, and their probabilities when all linear layers of one
    decoder block are rounded to ``bits`` bits in groups of 64."""
    reference = _reference()
    rule = Rule(f"model.layers.{block}.*", QuantSpec.parse(f"int{bits} g64 asym"), "rtn")
    model = quantize(reference, Recipe(name="one block", rules=(rule,)), progress=False)
    with torch.no_grad():
        logits = model(torch.tensor([reference.tokenizer.encode(prompt)]))[0, -1]  # (vocab,)
    known = _logits(prompt)
    p, q = F.softmax(known, -1), F.softmax(logits, -1)
    top = p.topk(8).indices
    words = [f"{rank}: {reference.tokenizer.decode([i])!r}" for rank, i in enumerate(top.tolist(), start=1)]
    distance = kl(known[None], logits[None])
    made = plot.figure(
        f"After {prompt!r}, block {block} in {bits} bits: KL {distance:.4f} nats",
        "the reference's eight likeliest next tokens",
        "probability",
    )
    for name, values, color in (
        ("reference", p, plot.BLUE),
        ("quantized", q, plot.ORANGE),
    ):
        made.add_bar(x=words, y=values[top].tolist(), name=name, marker_color=color)
    made.update_layout(legend={"x": 0.75, "y": 0.98})
    return made.update_yaxes(range=[0, 1])
