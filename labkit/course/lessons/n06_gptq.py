"""Notebook 06: GPTQ. What it asks, checks and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, describe, equal, require, tensor
from labkit.quant import QuantSpec, Stats, gptq, hessian_error, rtn


def _torch(found: Any, name: str) -> Tensor:
    """The next cells go on with the answer, so an array that would pass a check is not enough."""
    require(
        found is None or isinstance(found, Tensor), f"{name} is {describe(found)}; expected a torch tensor"
    )
    return tensor(found, name)


# --- exercise 1 ---


def hessian(inputs: Tensor) -> Tensor:
    """H (in, in): the mean of x^T x over all tokens x of ``inputs`` (..., in)."""
    x = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in)
    return x.T @ x / len(x)


def _check_hessian(fn: Callable[..., Any]) -> None:
    for shape in [(8, 2), (2, 5, 3)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
        flat = x.reshape(-1, shape[-1])
        centred = flat - flat.mean(dim=0)
        close(
            _torch(fn(x), "your H"),
            hessian(x),
            "your H",
            mistakes={
                "your H is a sum over the tokens; expected the mean: divide by how many tokens there are": flat.T
                @ flat,
                "you divide by the first axis, the windows; expected the mean over all tokens": flat.T
                @ flat
                / len(x),
                "your H has a row for each token; expected one for each input, shape (in, in): "
                "x.T @ x, not x @ x.T": flat @ flat.T / len(flat),
                "you subtract the mean first: that is a covariance. H is the mean of x^T x as it stands": centred.T
                @ centred
                / len(flat),
                "your H is twice too large: the paper's 2 X X^T. No result depends on the factor, but the "
                "exercise asks for the mean": 2 * hessian(x),
            },
        )


# --- exercise 2 ---


def column_update(weights_right: Tensor, error: Tensor, hinv_row: Tensor) -> Tensor:
    """W[:, j+1:] - Err[:, j] U[j, j+1:]: what the columns not yet rounded take over of one error.

    weights_right (out, remaining), error (out,), hinv_row (remaining,); returns (out, remaining).
    """
    return weights_right - error[:, None] * hinv_row[None, :]  # (out, remaining)


class _Calls(TorchFunctionMode):
    """Counts the calls of torch that are made while it is entered."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def loops_over(fn: Callable[..., Any]) -> str | None:
    """The axis, "rows" or "columns", over which a column update loops: with more of them it calls torch more often."""

    def calls(out: int, remaining: int) -> int:
        arguments = torch.zeros(out, remaining), torch.zeros(out), torch.zeros(remaining)
        with _Calls() as seen:
            fn(*arguments)
        return seen.count

    few = calls(16, 16)
    return "rows" if calls(32, 16) > few else "columns" if calls(16, 32) > few else None


def why_slow(fn: Callable[..., Any]) -> str:
    """Why GPTQ with the column update ``fn`` takes longer than the text says."""
    axis = loops_over(fn)
    return (
        f"your update loops over {axis}: use error[:, None] * hinv_row"
        if axis
        else "other work shares the machine"
    )


def _check_column_update(fn: Callable[..., Any]) -> str | None:
    for out, remaining in [(3, 3), (2, 4), (1, 1)]:
        generator = torch.Generator().manual_seed(out)
        w = torch.randn(out, remaining, generator=generator, dtype=torch.float64)
        error = torch.randn(out, generator=generator, dtype=torch.float64)
        row = torch.rand(remaining, generator=generator, dtype=torch.float64) - 0.7
        step = error[:, None] * row[None, :]
        first = w.clone()
        first[:, 0] -= error * row[0]
        mistakes: dict[str, Any] = {
            "you add; the others must move against the error: subtract": w + step,
            "you return the change alone; expected the new weights_right": -step,
            "you changed the first column alone; every column to the right takes its share": first,
            "you divide by hinv_row[0] too; error has been divided by the diagonal already": w
            - step / row[0],
        }
        if out == remaining:
            mistakes |= {
                "your outer product is transposed: error runs down the rows, hinv_row along the columns": w
                - step.T,
                "you multiply error and hinv_row element by element; every row needs its own error times "
                "the whole hinv_row: error[:, None]": w - error * row,
            }
        if remaining == 1:
            del mistakes["you changed the first column alone; every column to the right takes its share"]
        found = _torch(fn(w, error, row), "your weights_right")
        require(
            found.dtype == w.dtype, f"your weights_right is {found.dtype}; keep the dtype of the argument"
        )
        close(found, w - step, "your weights_right", rtol=1e-9, atol=1e-12, mistakes=mistakes)
    axis = loops_over(fn)
    return f"it loops over {axis}: use error[:, None] * hinv_row" if axis else None


# --- exercise 3 ---


def act_order(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (out, in) and H (in, in) with the inputs in descending order of H's diagonal, and the way back."""
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], hessian[order][:, order], order.argsort()


def _check_act_order(fn: Callable[..., Any]) -> None:
    # Neither its own inverse nor sorted already; the last case has more rows than columns.
    for out, diagonal in [(2, [3.0, 9.0, 1.0, 5.0]), (4, [2.0, 8.0, 4.0])]:
        n = len(diagonal)
        w = torch.arange(float(out * n)).reshape(out, n)
        h = torch.diag(torch.tensor(diagonal)) + 0.1 * torch.arange(n)[:, None] * torch.arange(n)[None, :]
        order = h.diagonal().argsort(descending=True)
        up = h.diagonal().argsort()
        found = fn(w, h)
        require(
            isinstance(found, tuple | list) and len(found) == 3,
            "return three things: the permuted weight, the permuted hessian, and back",
        )
        for part, name in zip(found, ("your weight", "your hessian", "your back"), strict=True):
            _torch(part, name)
        equal(
            found[0],
            w[:, order],
            "your weight",
            mistakes={
                "your order ascends; the largest diagonal element comes first": w[:, up],
                "your weight is not permuted; take weight[:, order]": w,
            },
        )
        equal(
            found[1],
            h[order][:, order],
            "your hessian",
            mistakes={
                "you permuted only the rows of the hessian; its columns are the same inputs": h[order],
                "you permuted only the columns of the hessian; its rows are the same inputs": h[:, order],
                "your hessian is not permuted; the inputs moved with the weights": h,
            },
        )
        back = tensor(found[2], "your back", shape=(n,), integral=True)
        require(
            not back.is_floating_point(), f"your back is {back.dtype}; indices are whole numbers, int64"
        )
        equal(
            back,
            order.argsort(),
            "your back",
            mistakes={
                "your back is the order itself; expected its inverse, so that weight[:, order][:, back] is "
                "the weight again": order
            },
        )


EXERCISES = [
    Exercise(
        "06.1",
        "The Hessian of a layer's inputs",
        difficulty=1,
        minutes=8,
        statement="""
            `inputs` holds what a layer is given: the last axis is the layer's inputs, the axes before it count
            tokens, for example (windows, tokens, in). Return the mean over all tokens $x$ (a row each) of

            $$H = x^T x$$

            a matrix of shape (in, in).
        """,
        starter='''
            def my_hessian(inputs: torch.Tensor) -> torch.Tensor:
                """H (in, in), the mean of x^T x over all tokens x of inputs (..., in)."""
                raise NotImplementedError
        ''',
        solution=hessian,
        check=_check_hessian,
        hints=[
            "Make one long list of tokens first: `inputs.reshape(-1, inputs.shape[-1])`, shape (tokens, in).",
            "The sum of x^T x over the rows x of a matrix X is the single product `X.T @ X`.",
            "Divide `X.T @ X` by the number of rows of X.",
        ],
    ),
    Exercise(
        "06.2",
        "The column update",
        difficulty=2,
        minutes=12,
        statement="""
            Column $j$ of all rows has just been rounded. `error` is $Err_{:,j}$, one number for each row; `hinv_row`
            is $U_{j,\\,j+1:}$, one number for each column that is not yet rounded; `weights_right` is
            $W_{:,\\,j+1:}$. Return the new

            $$W_{:,\\,j+1:} \\leftarrow W_{:,\\,j+1:} - Err_{:,j}\\; U_{j,\\,j+1:}$$

            It runs about 150,000 times for the whole model, so let torch do it in one expression, without a loop.
        """,
        starter='''
            def my_column_update(
                weights_right: torch.Tensor, error: torch.Tensor, hinv_row: torch.Tensor
            ) -> torch.Tensor:
                """New weights_right (out, remaining), from error (out,) and hinv_row (remaining,)."""
                raise NotImplementedError
        ''',
        solution=column_update,
        check=_check_column_update,
        hints=[
            "A column of `out` numbers times a row of `remaining` numbers is a matrix: the outer product.",
            "`error[:, None]` is a column, `hinv_row[None, :]` is a row; torch multiplies them to a matrix.",
            "Subtract that matrix from `weights_right` and return the result.",
        ],
    ),
    Exercise(
        "06.3",
        "Act-order",
        difficulty=2,
        minutes=10,
        statement="""
            Sort the inputs so that $H$'s diagonal descends. Return three things: the weight with its columns in
            that order, the hessian in that order, and `back`, the indices that undo it:
            `weight[:, order][:, back]` is the weight again.
        """,
        starter='''
            def my_act_order(
                weight: torch.Tensor, hessian: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                """(weight (out, in), hessian (in, in), back (in,)), inputs with the largest diagonal first."""
                raise NotImplementedError
        ''',
        solution=act_order,
        check=_check_act_order,
        hints=[
            "You need the places of the diagonal's elements in sorted order, not the sorted elements: an argsort. "
            "And H has an input along each of its two axes.",
            "`order = hessian.diagonal().argsort(descending=True)`. Then `weight[:, order]`, and so in both axes of H.",
            "H is `hessian[order][:, order]`, and the inverse of a permutation is its own argsort.",
        ],
    ),
]

QUIZ = [
    Question(
        "Why does GPTQ need H inverse and not only H?",
        {
            "H is too large to store": "H inverse has the same shape.",
            "Its rows say how the weights that are still free move best when one is fixed": "The Lagrange "
            "condition gives the change as a multiple of a row of the inverse.",
            "It makes the loss smaller": "The loss is given by H; the inverse only helps to find the best change.",
        },
        answer="b",
    ),
    Question(
        "On its calibration text GPTQ's error is 0.001, on new text 0.008, and RTN has 0.006 on both. What now?",
        {
            "Ship it, GPTQ is six times better": "That was measured on the text it was fitted to.",
            "Use a larger block_size": "That changes the time and no result.",
            "Use more calibration text, or more damping": "H came from too few tokens, so GPTQ fitted their accidents.",
        },
        answer="c",
    ),
    Question(
        "With act-order and groups fitted on the way, what must be stored in addition?",
        {
            "The group of each column, g_idx": "Neighbours in the new order are not neighbours in the matrix.",
            "The Hessian": "It is needed only while quantizing.",
            "A second set of scales": "There are as many groups as before.",
        },
        answer="a",
    ),
]


# --- figures ---


def whole_numbers(blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An observer for examples on paper: with ``int4 narrow`` the grid is the whole numbers -7 to 7."""
    return blocks.new_full((len(blocks),), -7.0), blocks.new_full((len(blocks),), 7.0)


PAPER = QuantSpec.parse("int4 channel narrow scale=fp32")


def bowl(correlation: float = 0.75, w1: float = 0.4, w2: float = 0.4) -> go.Figure:
    """The loss around a pair of weights: ellipses of equal loss, and where RTN and GPTQ land."""
    H = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    w = torch.tensor([[w1, w2]], dtype=torch.float64)
    moved: list[Tensor] = []

    def update(right: Tensor, error: Tensor, row: Tensor) -> Tensor:
        moved.append(right - error[:, None] * row[None, :])
        return moved[-1]

    nearest = rtn(w, PAPER, observer=whole_numbers).dequantize(torch.float64)
    made = gptq(w, PAPER, Stats(H, 1), damp=0, observer=whole_numbers, update=update)
    chosen = made.dequantize(torch.float64)
    loss = {name: float((q - w) @ H @ (q - w).T) for name, q in (("RTN", nearest), ("GPTQ", chosen))}
    figure = plot.figure(
        f"Loss of RTN {loss['RTN']:.2f}, of GPTQ {loss['GPTQ']:.2f}",
        "first weight",
        "second weight",
        height=460,
        width=620,
    )
    for level in (0.05, 1.1, 2.5):
        _ellipse(figure, w, H, level, "#BBBBBB", "solid", 1, "equal loss" if level == 0.05 else None)
    _ellipse(figure, w, H, loss["RTN"], plot.RED, "dash", 2, "loss of RTN")
    _ellipse(figure, w, H, loss["GPTQ"], plot.BLUE, "solid", 2, "loss of GPTQ")
    ticks = [(a, b) for a in range(-2, 3) for b in range(-2, 3)]
    dot = {"color": "#888888", "size": 6, "symbol": "circle-open"}
    _points(figure, [list(p) for p in ticks], "whole numbers", dot)
    path = [w[0].tolist(), [chosen[0, 0].item(), moved[0][0, 0].item()], chosen[0].tolist()]
    x, y = zip(*path, strict=True)
    figure.add_scatter(
        x=x, y=y, mode="lines", name="GPTQ's way", line={"color": plot.BLUE, "dash": "dot", "width": 2}
    )
    _points(figure, [w[0].tolist()], "w", {"color": plot.BLACK, "size": 13, "symbol": "star"})
    _points(figure, [nearest[0].tolist()], "RTN", {"color": plot.RED, "size": 14, "symbol": "square"})
    _points(figure, [path[1]], "second moved", {"color": plot.SKY, "size": 10, "symbol": "diamond"})
    _points(figure, [chosen[0].tolist()], "GPTQ", {"color": plot.BLUE, "size": 11, "symbol": "circle"})
    figure.update_xaxes(range=[-2.1, 2.1], dtick=1, constrain="domain")
    return figure.update_yaxes(range=[-2.1, 2.1], dtick=1, scaleanchor="x", constrain="domain")


def _ellipse(
    figure: go.Figure,
    w: Tensor,
    H: Tensor,
    loss: float,
    color: str,
    dash: str,
    width: int,
    name: str | None,
) -> None:
    angle = torch.linspace(0, 2 * math.pi, 121, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])  # (2, points)
    # With H = L L^T the points L^-T circle have d H d^T = 1.
    d = torch.linalg.solve(torch.linalg.cholesky(H).T, circle) * math.sqrt(max(loss, 0.0))
    points = (w.T + d).round(decimals=4)
    figure.add_scatter(
        x=points[0].tolist(),
        y=points[1].tolist(),
        mode="lines",
        name=name or "",
        showlegend=name is not None,
        line={"color": color, "dash": dash, "width": width},
        hoverinfo="skip",
    )


def _points(figure: go.Figure, points: list[list[float]], name: str, marker: dict[str, Any]) -> None:
    x, y = zip(*points, strict=True)
    figure.add_scatter(x=list(x), y=list(y), mode="markers", name=name, marker=marker)


def sorted_diagonal(H: Tensor) -> go.Figure:
    """H's diagonal in descending order, on a logarithmic axis."""
    values = H.diagonal().sort(descending=True).values
    figure = plot.figure(
        "A few inputs carry most of the signal",
        "inputs, sorted: the largest is number 1",
        "mean square of the input (no unit)",
        log_x=True,
        log_y=True,
    )
    figure.add_scatter(
        x=list(range(1, len(values) + 1)),
        y=[float(f"{v:.4g}") for v in values.tolist()],
        mode="markers",
        marker={"color": plot.BLUE, "size": 6, "symbol": "circle-open"},
        showlegend=False,
    )
    return figure.update_xaxes(tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500], range=[-0.1, 2.85])


def seen_and_new(weight: Tensor, seen: Tensor, new: Tensor, spec: QuantSpec, damp: float) -> go.Figure:
    """The error of RTN and of GPTQ on the text that H was made of, and on text that is new to it."""
    made_of, other = Stats.of(seen), Stats.of(new)
    figure = plot.figure(
        f"{made_of.samples} tokens of calibration, damp {damp:.2g}",
        "",
        "output error, share of the output (no unit)",
        height=430,
    )
    on = ["on the calibration text", "on new text"]
    methods = {"RTN": rtn(weight, spec), "GPTQ": gptq(weight, spec, made_of, damp=damp)}
    for (name, q), color in zip(methods.items(), (plot.ORANGE, plot.BLUE), strict=True):
        errors = [hessian_error(weight, q, stats.hessian) for stats in (made_of, other)]
        figure.add_bar(
            x=on,
            y=errors,
            name=name,
            marker_color=color,
            text=[f"{name} {e:.4f}" for e in errors],
            textposition="outside",
            cliponaxis=False,
        )
    return figure.update_yaxes(range=[0, 0.01])


def ladder(rows: list[Mapping[str, Any]], recipes: Mapping[str, str]) -> go.Figure:
    """KL and perplexity of each recipe of the measurement file, one point a seed, KL ascending to the left."""
    seeds = sorted({row["seed"] for row in rows})
    word = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    figure = plot.figure(
        f"The ladder, full protocol, {word}: GPTQ below RTN, act-order below both",
        "KL to the original (nats per token)",
        "perplexity",
        log_x=True,
        log_y=True,
        height=430,
    )
    for i, (recipe, name) in enumerate(recipes.items()):
        found = [row for row in rows if row["recipe"] == recipe]
        figure.add_scatter(
            x=[round(row["kl"], 5) for row in found],
            y=[round(row["perplexity"], 3) for row in found],
            mode="markers",
            name=name,
            marker={
                "color": plot.COLORS[i % len(plot.COLORS)],
                "symbol": plot.SYMBOLS[i % len(plot.SYMBOLS)],
                "size": 13,
            },
        )
    figure.update_yaxes(tickvals=[80, 90, 100, 120, 150, 200, 300])
    return figure.update_xaxes(tickvals=[0.1, 0.2, 0.3, 0.5, 1, 1.5])
