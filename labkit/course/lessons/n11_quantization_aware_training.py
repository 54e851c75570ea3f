"""Notebook 11: quantization-aware training. What it asks, checks and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go
import torch
from IPython.display import display
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import close, number, require, tensor

# --- exercises


def straight_through(x: Tensor, scale: float, lowest: int, highest: int) -> Tensor:
    """``x`` on its grid; the gradient passes where ``x`` lies in the range and is 0 outside."""
    clipped = x.clamp(lowest * scale, highest * scale)  # the gradient of this is what is wanted
    rounded = torch.round(clipped / scale) * scale
    return clipped + (rounded - clipped).detach()


def _check_straight_through(fn):  # type: ignore[no-untyped-def]
    for scale, lowest, highest in [(0.5, -2, 1), (0.25, -4, 3)]:
        x = torch.tensor([-9.0, -0.8, -0.3, 0.0, 0.2, 0.3, 0.45, 7.0], requires_grad=True)
        slope = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        steps = x.detach() / scale
        expected = steps.round().clamp(lowest, highest) * scale
        out = fn(x, scale, lowest, highest)
        require(isinstance(out, Tensor), "return a tensor, so that a gradient can flow through it")
        mistakes = {
            "these are codes; multiply by the scale": steps.round().clamp(lowest, highest),
            "you do not clamp; codes end at lowest and highest": steps.round() * scale,
            "these are the numbers themselves, not rounded": x.detach(),
            "you clamp and do not round": x.detach().clamp(lowest * scale, highest * scale),
        }
        close(out.detach(), expected, "your number", mistakes=mistakes)
        require(
            out.requires_grad,
            "no gradient flows through your result; detach only the difference that rounding makes",
        )
        [found] = torch.autograd.grad((out * slope).sum(), x, allow_unused=True)
        if found is None:
            found = torch.zeros_like(x)
        inside = (steps > lowest) & (steps < highest)
        wanted = torch.where(inside, slope, 0.0)
        close(
            found,
            wanted,
            "the gradient",
            mistakes={
                "the gradient is 0 everywhere: torch.round has none. Add the rounding as a constant: "
                "x + (rounded - x).detach()": torch.zeros_like(x),
                "the gradient passes outside the range too; there the clamp holds x and nothing should flow": slope,
                "the gradient is scaled; forward multiplies by the scale after dividing by it, and both count": (
                    wanted * scale
                ),
                "the gradient is divided by the scale; forward multiplies by it as well": wanted / scale,
            },
        )


def step_gradient(v: Tensor, s: float, q_n: int, q_p: int) -> Tensor:
    """LSQ: how the rounded form of each ``v`` moves when the step ``s`` grows."""
    x = v / s
    return torch.where(x <= -q_n, -q_n, torch.where(x >= q_p, q_p, torch.round(x) - x))


def _check_step_gradient(fn):  # type: ignore[no-untyped-def]
    for s, q_n, q_p in [(0.5, 2, 1), (0.25, 4, 3)]:
        v = torch.tensor([-5.1, -0.6, -0.3, -0.05, 0.0, 0.1, 0.2, 0.3, 4.1])
        x = v / s
        inside = torch.round(x) - x
        expected = step_gradient(v, s, q_n, q_p)
        clipped = (x <= -q_n) | (x >= q_p)
        mistakes = {
            "beyond the range the rounded form is -Q_N s or Q_P s, so it moves with -Q_N or Q_P": inside,
            "beyond the range it does move: the end of the range is -Q_N s or Q_P s": torch.where(
                clipped, 0.0, inside
            ),
            "inside you forgot - v/s: with the code fixed, v/s is rounded, and the step pulls against it": torch.where(
                clipped, expected, torch.round(x)
            ),
            "your sign is the wrong way round: round(v/s) - v/s": torch.where(clipped, expected, -inside),
            "all signs are the wrong way round": -expected,
            "the lower end is -Q_N, not Q_N": torch.where(x <= -q_n, float(q_n), expected),
            "this is in units of v; the formula has v/s": torch.where(clipped, expected, inside * s),
        }
        found = tensor(fn(v.clone(), s, q_n, q_p), "your gradient", shape=tuple(v.shape), mistakes=mistakes)
        close(found, expected, "your gradient", mistakes=mistakes)


def distillation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) over the positions; logits (tokens, vocab) each."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _check_distillation_loss(fn):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    for tokens, vocab in [(3, 5), (7, 11)]:
        teacher = 3 * torch.randn(tokens, vocab, generator=generator)
        student = (teacher + torch.randn(tokens, vocab, generator=generator)).requires_grad_()
        log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        expected = per_token.mean().item()
        out = fn(teacher.clone(), student)
        mistakes = {
            "the direction is the other way round; weigh with the teacher's probabilities": (
                (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()
            ),
            "you take the sum over the tokens; take the mean": per_token.sum().item(),
            "you take the mean over the words too; sum over the words, then the mean over the tokens": (
                per_token.mean().item() / vocab
            ),
            "this is the squared difference of the logits; a constant added to all of them should not matter": (
                (teacher - student.detach()).square().mean().item()
            ),
            "this is the cross-entropy; the teacher's own entropy is still in it": -(log_p.exp() * log_q)
            .sum(-1)
            .mean()
            .item(),
        }
        close(number(out, "your loss"), expected, "your loss", mistakes=mistakes)
        require(
            isinstance(out, Tensor) and out.requires_grad,
            "no gradient flows to the student; return a tensor, and do not detach or take .item()",
        )
        [found] = torch.autograd.grad(out, student)
        close(found, (log_q.exp() - log_p.exp()) / tokens, "the gradient for the student")


EXERCISES = [
    Exercise(
        "11.1",
        "A gradient through rounding",
        difficulty=2,
        minutes=12,
        statement="""
            Forward: put `x` on its grid,

            $$\\hat x = \\text{clamp}(\\text{round}(x / \\text{scale}),
            \\text{lowest}, \\text{highest}) \\cdot \\text{scale}$$

            Backward: let the gradient pass unchanged where $x / \\text{scale}$ lies between `lowest` and `highest`, and
            let nothing pass outside.
        """,
        starter='''
            def my_straight_through(x: torch.Tensor, scale: float, lowest: int, highest: int) -> torch.Tensor:
                """x on its grid, in its shape; the gradient is 1 inside the range and 0 outside."""
                raise NotImplementedError
        ''',
        solution=straight_through,
        check=_check_straight_through,
        hints=[
            "`y.detach()` has y's value and no gradient: a constant.",
            "`x + (rounded - x).detach()` has the value of `rounded` and the gradient of x.",
            "Clamp first: `clipped = x.clamp(lowest * scale, highest * scale)` has the gradient that is asked for.",
        ],
    ),
    Exercise(
        "11.2",
        "How the step learns",
        difficulty=2,
        minutes=10,
        statement="""
            LSQ's gradient of $\\hat v$ by the step $s$, for each $v$. With $x = v / s$:

            $$\\frac{\\partial \\hat v}{\\partial s} = \\begin{cases} -Q_N & x \\le -Q_N \\\\ Q_P & x \\ge Q_P \\\\
            \\text{round}(x) - x & \\text{between} \\end{cases}$$

            Return it for every element of `v`.
        """,
        starter='''
            def my_step_gradient(v: torch.Tensor, s: float, q_n: int, q_p: int) -> torch.Tensor:
                """The derivative of each rounded v by s, in the shape of v; codes run from -q_n to q_p."""
                raise NotImplementedError
        ''',
        solution=step_gradient,
        check=_check_step_gradient,
        hints=[
            "Inside, the rounded form is round(v/s) s. The product rule has two terms; rounding passes the second one.",
            "`torch.where(condition, a, b)` chooses element by element.",
            "`torch.where(x <= -q_n, -q_n, torch.where(x >= q_p, q_p, torch.round(x) - x))`.",
        ],
    ),
    Exercise(
        "11.3",
        "A loss that knows only the teacher",
        difficulty=1,
        minutes=8,
        statement="""
            The teacher's logits and the student's are both `(tokens, vocab)`. Return the mean over the tokens of

            $$\\text{KL}(p \\,\\|\\, q) = \\sum_v p_v (\\ln p_v - \\ln q_v)$$

            as a tensor that a gradient can flow through to the student.
        """,
        starter='''
            def my_distillation_loss(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
                """Mean KL(teacher || student) in nats per token, a scalar; logits (tokens, vocab) each."""
                raise NotImplementedError
        ''',
        solution=distillation_loss,
        check=_check_distillation_loss,
        hints=[
            "`logits.log_softmax(dim=-1)` are the logarithms of the probabilities.",
            "The weights are the teacher's probabilities: `log_p.exp()`.",
            "Sum over the last axis, then `.mean()` over the tokens.",
        ],
    ),
]

QUIZ = [
    Question(
        "Why does a weight in training keep a float beside its code?",
        {
            "So that many small updates add up": "Each is far less than a step; only their sum reaches the next code.",
            "Because the optimizer cannot read integers": "It could be made to. The updates would still vanish.",
            "To store the model in more bits": "The float is thrown away at the end.",
        },
        answer="a",
    ),
    Question(
        "The loss is the KL to the original model alone. Why not the next word of the text?",
        {
            "It is cheaper": "Both need one pass of the student; the KL needs the teacher's as well.",
            "Otherwise learning the text would look like recovering from quantization": "A model that reads "
            "a novel for the second time predicts it better, quantized or not.",
            "The next word has no gradient": "It has.",
        },
        answer="b",
    ),
    Question(
        "Inside the range, the straight-through gradient of rounding is",
        {
            "0, as the real one is": "Then nothing would ever be learned.",
            "1, which is wrong at each point and right on average": "The stairs climb as fast as the line.",
            "1 / scale": "Dividing and multiplying by the scale cancel.",
        },
        answer="b",
    ),
]

# --- pictures


def stairs(target: float = 0.62, w: float = 0.2, bits: int = 2) -> go.Figure:
    """The loss of one weight on its grid and without one, and where w is."""
    scale = 2 / (2**bits - 1)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    places = torch.linspace(-1.2, 1.2, 481)
    rounded = straight_through(places, scale, lowest, highest)
    at = straight_through(torch.tensor(w), scale, lowest, highest).item()
    gradient = 2 * (at - target)
    made = plot.lines(
        places.tolist(),
        {
            "on the grid": ((rounded - target) ** 2).tolist(),
            "without a grid": ((places - target) ** 2).tolist(),
        },
        title=f"w = {w:.2f} is stored as {at:.2f}; gradient {gradient:.2f}: {'down' if gradient > 0 else 'up'}",
        x_title="weight w (no unit)",
        y_title="loss (no unit)",
        markers=False,
    )
    made.add_scatter(
        x=[w],
        y=[(at - target) ** 2],
        name="w",
        mode="markers",
        marker={"size": 14, "color": plot.RED, "symbol": "diamond"},
    )
    return made.update_layout(legend={"x": 0.02, "y": 0.98})


def losses(seen: Sequence[float], steps: int, levels: Mapping[str, float]) -> go.Figure:
    """The loss after each step so far, and, as level lines, what needs no training."""
    made = plot.lines(
        list(range(1, len(seen) + 1)),
        {"trained": seen},
        title="Training a 2-bit model",
        x_title="step",
        y_title="KL to the original (nats per token)",
        log_y=True,
        markers=False,
    )
    for i, (name, level) in enumerate(levels.items()):
        made.add_scatter(
            x=[1, steps],
            y=[level, level],
            name=f"{name}, untrained",
            mode="lines",
            line={"color": plot.COLORS[1 + i], "dash": plot.DASHES[1 + i]},
        )
    made.update_xaxes(range=[0, steps + 1])
    return made.update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.98})


def live(steps: int, levels: Mapping[str, float]) -> Callable[[int, float], None]:
    """Show a figure that grows while a model trains: the callback for ``train`` that feeds it."""
    seen: list[float] = []

    def bundle() -> dict[str, object]:
        # A figure that displays itself would not know that it replaces another.
        text = f"{len(seen)} of {steps} steps"
        return {
            "text/plain": text,
            "application/vnd.plotly.v1+json": losses(seen, steps, levels).to_plotly_json(),
        }

    shown = display(bundle(), raw=True, display_id=True)

    def callback(step: int, loss: float) -> None:
        seen.append(loss)
        if shown is not None:  # there is nobody to show it to outside a notebook
            shown.update(bundle(), raw=True)

    return callback
