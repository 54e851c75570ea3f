"""Notebook 17: Ray's tasks, actors and objects, and a model behind a URL. What it asks, checks and draws."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import exp
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, close, equal, number, require
from labkit.quant import QuantSpec, mse, rtn, sqnr_db

DRAWS = 32  # answers that the widget asks for at each setting
SHOWN = 5  # tokens with a bar of their own, as many as the API tells


def measure(weight: Tensor, spec: str) -> tuple[float, float]:
    """Bits per weight and SQNR in dB of ``weight`` (out, in), rounded to the grid that ``spec`` names."""
    quantized = rtn(weight, QuantSpec.parse(spec))
    return quantized.bits_per_weight, sqnr_db(weight, quantized)


def _check_measure(fn):  # type: ignore[no-untyped-def]
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for spec in ("int4 channel", "int3 g32", "int8 g64 asym"):
        found = fn(weight, spec)
        require(
            isinstance(found, tuple | list) and len(found) == 2,
            "return two things: the bits per weight and the SQNR in dB",
        )
        quantized = rtn(weight, QuantSpec.parse(spec))
        always = rtn(weight, QuantSpec.parse("int4 g64"))
        bits, sqnr = measure(weight, spec)
        close(
            found[0],
            bits,
            "your bits per weight",
            mistakes={
                "you count the codes and forget the scales; the QuantizedTensor knows its bits_per_weight": float(
                    QuantSpec.parse(spec).bits
                ),
                "these are bytes of the whole matrix; expected bits for one weight": float(
                    quantized.nbytes
                ),
                "these are bytes per weight; a byte has eight bits": bits / 8,
                "your bits per weight do not depend on spec; parse it": always.bits_per_weight,
                "the two results are in the wrong order; bits per weight come first": sqnr,
            },
        )
        close(
            found[1],
            sqnr,
            "your SQNR",
            mistakes={
                "this is the mean squared error; expected the SQNR in dB, sqnr_db": mse(weight, quantized),
                "the sign is the wrong way round: the signal comes above the noise": -sqnr,
                "you measured the codes; compare the weight with the dequantized weight": sqnr_db(
                    weight, quantized.codes.float()
                ),
                "your SQNR does not depend on spec; parse it": sqnr_db(weight, always),
            },
        )


def streamed_text(lines: Iterable[str]) -> str:
    """The text of a chat answer, from the lines of its event stream."""
    text = ""
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            break
        for choice in json.loads(data)["choices"]:
            text += choice["delta"].get("content") or ""
    return text


def _event(**delta: Any) -> list[str]:
    """A chunk as the server sends it: a line of data and an empty one."""
    chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
    return [f"data: {json.dumps(chunk)}", ""]


def _check_streamed_text(fn):  # type: ignore[no-untyped-def]
    pieces = ["The", " sea", ".", "\n", " data: x"]
    plain = [line for piece in pieces for line in _event(content=piece)]
    text = "".join(pieces)
    _read(
        fn,
        plain,
        text,
        "Lines that do not begin with 'data: ' hold no chunk: skip them",
        {
            "you keep the last piece only; join them all": pieces[-1],
            "you keep the first piece only; go on after the empty line between two events": pieces[0],
            "you put blanks between the pieces; each piece brings its own": " ".join(pieces),
            "you strip the pieces; their blanks belong to the text": "".join(p.strip() for p in pieces),
            "you strip the whole text; its blanks and line breaks belong to it": text.strip(),
            "you return a list; expected one text": pieces,
        },
    )
    opening, closing = _event(role="assistant", content=""), _event()
    whole = [*opening, *plain, *closing]
    _read(fn, whole, text, "The last chunk's delta is empty: it has no 'content'", {})
    usage = ['data: {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 9}}', ""]
    _read(fn, [*whole, *usage], text, "A chunk that tells the usage has an empty list of choices", {})
    done = ["data: [DONE]", ""]
    _read(fn, [*whole, *usage, *done], text, "The stream ends with 'data: [DONE]', which is not JSON", {})
    _read(
        fn, [": ping", "", *whole, *done], text, "A line that begins with a colon is a comment: skip it", {}
    )
    _read(fn, done, "", "A stream without any chunk is an empty text", {})


def _read(fn: Any, lines: list[str], text: str, about: str, mistakes: Mapping[str, Any]) -> None:
    try:
        found = fn(lines)
    except Wrong as wrong:
        raise Wrong(f"{about}. {wrong}") from wrong
    if found != text and not any(found == value for value in mistakes.values()):
        raise Wrong(f"{about}. Your text is {found!r}; expected {text!r}.")
    equal(found, text, "your text", mistakes=mistakes)


def replicas_that_fit(cores: int, memory_mb: int, threads: int, replica_mb: int, reserved_mb: int) -> int:
    """How many replicas a machine holds, when each wants ``threads`` cores and ``replica_mb`` of memory."""
    by_cores = cores // threads
    by_memory = (memory_mb - reserved_mb) // replica_mb
    return max(0, min(by_cores, by_memory))


def _check_replicas(fn):  # type: ignore[no-untyped-def]
    cases = [
        (16, 64_000, 2, 900, 2_000),  # cores decide
        (16, 6_000, 2, 900, 2_000),  # memory decides, with a remainder
        (7, 6_000, 2, 1_700, 900),  # three either way, the reserve included
        (1, 8_000, 2, 900, 2_000),  # not even one
        (8, 1_500, 2, 900, 2_000),  # less memory than the reserve
    ]
    for cores, memory_mb, threads, replica_mb, reserved_mb in cases:
        by_cores, by_memory = cores // threads, (memory_mb - reserved_mb) // replica_mb
        right = max(0, min(by_cores, by_memory))
        scarcer = "the scarcer of cores and memory decides; your number is what the other one would allow"
        mistakes: dict[str, float] = {
            "a number of replicas is never negative": min(by_cores, by_memory),
            scarcer: max(by_cores, by_memory),
            "you leave out the memory that is reserved": min(by_cores, memory_mb // replica_mb),
            "you round up; a part of a replica answers nobody": min(
                -(-cores // threads), -(-(memory_mb - reserved_mb) // replica_mb)
            ),
            "you keep the fraction; a part of a replica answers nobody": min(
                cores / threads, (memory_mb - reserved_mb) / replica_mb
            ),
        }
        if right == 0:
            mistakes = {"your answer has one replica where none fits": 1, **mistakes}
        found = number(fn(cores, memory_mb, threads, replica_mb, reserved_mb), "your number of replicas")
        equal(found, right, "your number of replicas", mistakes=mistakes)


EXERCISES = [
    Exercise(
        "17.1",
        "The task of the sweep",
        difficulty=1,
        minutes=5,
        statement="""
            Write what one task of the sweep does. Round one weight matrix $W$ to the grid that `spec` names,
            and return two numbers: the bits per weight $b$, scales included, and the
            signal-to-quantization-noise ratio in decibels,

            $$\\mathrm{SQNR} = 10 \\log_{10} \\frac{\\sum w^2}{\\sum (w - q)^2}$$

            `QuantSpec.parse(spec)` reads the text, and `rtn(weight, spec)` rounds. What it returns has
            `.bits_per_weight` and `.dequantize()`; `sqnr_db(weight, rounded)` is the ratio.
        """,
        starter='''
            def my_measure(weight: torch.Tensor, spec: str) -> tuple[float, float]:
                """Bits per weight and SQNR in dB of weight (out, in), rounded to the grid of spec."""
                raise NotImplementedError
        ''',
        solution=measure,
        check=_check_measure,
        hints=[
            "`QuantSpec.parse(spec)` makes a spec of the text; `rtn(weight, ...)` makes a QuantizedTensor.",
            "The QuantizedTensor has `.bits_per_weight`; `sqnr_db(weight, quantized)` compares the two.",
            "`quantized = rtn(weight, QuantSpec.parse(spec))`, then return the two numbers as a tuple.",
        ],
    ),
    Exercise(
        "17.2",
        "Read a stream",
        difficulty=1,
        minutes=5,
        statement="""
            `lines` are the lines of a chat stream, as printed above. Return the text of the answer. Skip lines
            that do not begin with `data: `. Stop at `data: [DONE]`. Each other line holds a chunk as JSON; its text
            stands at `chunk["choices"][0]["delta"]["content"]`. A delta may lack `content`, and a chunk may
            have no choices.
        """,
        starter='''
            def my_streamed_text(lines: list[str]) -> str:
                """The text of a chat answer, from the lines of its event stream."""
                raise NotImplementedError
        ''',
        solution=streamed_text,
        check=_check_streamed_text,
        hints=[
            "Start with `text = ''` and go through the lines; `continue` skips one, `break` ends the loop.",
            "`json.loads(line.removeprefix('data: '))` is the chunk, once you know that the line is not [DONE].",
            "`for choice in chunk['choices']: text += choice['delta'].get('content') or ''`",
        ],
    ),
    Exercise(
        "17.3",
        "How many replicas fit",
        difficulty=1,
        minutes=5,
        statement="""
            A machine has $C$ cores and $M$ MB of memory, of which $R$ MB are reserved for everything else. A
            replica takes $t$ cores and $m$ MB. Return how many whole replicas fit. Never
            fewer than 0.
        """,
        starter='''
            def my_replicas_that_fit(
                cores: int, memory_mb: int, threads: int, replica_mb: int, reserved_mb: int
            ) -> int:
                """Whole replicas that fit: threads cores and replica_mb of memory for each."""
                raise NotImplementedError
        ''',
        solution=replicas_that_fit,
        check=_check_replicas,
        hints=[
            "How many would the cores allow if memory were endless? And the other way round?",
            "`//` divides and rounds down. The smaller of the two numbers decides.",
            "`max(0, min(cores // threads, ...))`",
        ],
    ),
]

QUIZ = [
    Question(
        "Why is a served model an actor, and not a task?",
        {
            "Only actors may use more than one core": "A task may reserve any number of cores too.",
            "It is loaded once and its memory is needed again for each request": (
                "A task would load the model anew, and what it keeps of the texts so far (its KV cache) would be gone."
            ),
            "Tasks cannot return text": "A task returns whatever can be pickled.",
        },
        answer="b",
    ),
    Question(
        "Eight tasks need the same 3.5 MB matrix. What goes through the object store with `ray.put`?",
        {
            "28.3 MB": "That is what eight calls by value store.",
            "Nothing": "The matrix must be stored once for the workers to read it.",
            "3.5 MB": "It is stored once; each task gets a reference.",
        },
        answer="c",
    ),
    Question(
        "A task asks for more cores than Ray has. What happens?",
        {
            "It waits, without an error": "Another node might still join. One sees it by `ray.wait` with a timeout.",
            "It raises at once": "Ray knows clusters that grow, so it keeps the task.",
            "It runs with fewer cores": "What a task reserves is never cut down.",
        },
        answer="a",
    ),
]


def sweep_figure(table: Mapping[tuple[int, str], tuple[float, float]]) -> go.Figure:
    """How well bits are spent: SQNR less 6.02 dB a bit, for each way of sharing scales.

    ``table[bits, group]`` is (bits per weight, SQNR in dB).
    """
    made = plot.figure(
        "One scale for 64 weights spends its bits best, at every width",
        "size (bits per weight, scales included)",
        "SQNR less 6.02 dB per bit of size (dB)",
    )
    names = {"channel": "one scale per row", "g64": "one per 64 weights", "g32": "one per 32 weights"}
    for i, (group, name) in enumerate(names.items()):
        points = [table[key] for key in sorted(table) if key[1] == group]
        made.add_scatter(
            x=[x for x, _ in points],
            y=[y - 6.02 * x for x, y in points],
            name=name,
            mode="lines+markers",
            line={"color": plot.COLORS[i], "dash": plot.DASHES[i]},
            marker={"symbol": plot.SYMBOLS[i], "size": 9},
        )
    return made.update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.03, "yanchor": "bottom"})


def draws(client: Any, model: str, prompt: str, temperature: float, top_p: float) -> Counter[str]:
    """The next token that the endpoint draws for each of the seeds 0 .. DRAWS - 1, counted."""

    def draw(seed: int) -> str:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=1, temperature=temperature, top_p=top_p, seed=seed
        )
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(draw, range(DRAWS)))


@cache
def likeliest(client: Any, model: str, prompt: str) -> dict[str, float]:
    """The model's own probabilities of the SHOWN likeliest next tokens, largest first."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=1, logprobs=SHOWN)
    top = answer.choices[0].logprobs.top_logprobs[0]
    return {token: exp(value) for token, value in sorted(top.items(), key=lambda item: -item[1])}


class NextToken:
    """The widget's function, bound to a running endpoint: what it draws next at a temperature and top_p."""

    def __init__(self, client: Any, model: str, prompt: str) -> None:
        self.client, self.model, self.prompt = client, model, prompt
        self.__name__ = "next_token"

    def __call__(self, temperature: float = 1.0, top_p: float = 1.0) -> go.Figure:
        own = likeliest(self.client, self.model, self.prompt)
        counts = draws(self.client, self.model, self.prompt, temperature, top_p)
        names = [repr(token) for token in own] + ["all others"]
        shares = [counts[token] / DRAWS for token in own]
        different = len(counts)
        made = plot.figure(
            f"{self.prompt!r}: {different} different next token{'s' * (different > 1)} in {DRAWS} answers",
            "next token",
            "share",
        )
        made.add_bar(
            x=names, y=[*shares, 1 - sum(shares)], name="drawn by the endpoint", marker_color=plot.SKY
        )
        made.add_scatter(
            x=names,
            y=[*own.values(), 1 - sum(own.values())],
            name="probability at temperature 1, top_p 1",
            mode="markers",
            marker={"symbol": "diamond", "size": 10, "color": plot.RED},
        )
        return made.update_yaxes(range=[0, 1.05]).update_layout(
            legend={"x": 0.98, "xanchor": "right", "y": 0.98}
        )
