"""From logits to the next token: what a request may ask for, and how a token is drawn."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens.

    max_tokens   at most so many new tokens, at least 1
    temperature  0 = the likeliest token each time; else logits are divided by it before the draw
    top_p        draw only among the likeliest tokens that together hold this probability (Holtzman 2020)
    seed         the same seed gives the same tokens, whoever else is in the batch; None = always different
    stop         texts that end the answer and are not part of it; a single string is one of them
    logprobs     None, or how many alternatives to report beside each token's log-probability, 0 to 20
    ignore_eos   go on to max_tokens where the model would end; for measurements

    Raises ValueError for anything outside these.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, found {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more and finite, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}")
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError(f"stop must be texts of at least one character, found {stop!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be None or 0 to {MAX_LOGPROBS}, found {self.logprobs}")


def choose(logits: Tensor, params: SamplingParams, draw: random.Random, likeliest: int | None = None) -> int:
    """The next token's id, from one position's logits (vocab,), of which ``likeliest`` is the largest, where known.

    ``draw`` is the request's own source of randomness: one number is taken from it for each drawn token,
    so that a request's tokens depend on its seed alone. Raises ValueError for logits that are not finite.
    """
    if params.temperature == 0 and likeliest is not None:
        return likeliest
    values = logits.numpy()  # whose argmax is several times as fast as torch's, and finds NaN first
    top = values[best := int(values.argmax())]
    if not math.isfinite(top):
        raise ValueError(f"the model's largest logit is {top}; its weights or this prompt overflow")
    if params.temperature == 0:
        return best
    # The largest is subtracted first: no temperature, however small, can then overflow.
    probabilities = ((logits.double() - float(top)) / params.temperature).softmax(dim=-1)  # (vocab,)
    if params.top_p < 1:
        probabilities = nucleus(probabilities, params.top_p)
    # The draw walks the vocabulary in its own order, so near-ties in probability cannot swap places.
    mass = probabilities.cumsum(dim=-1)  # (vocab,)
    return int(torch.searchsorted(mass, draw.random() * mass[-1], right=True))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens that hold at least ``top_p``. (vocab,), not renormalised."""
    for count in (64, 1024, probabilities.shape[-1]):  # a full sort of a large vocabulary is rarely needed
        largest, ids = probabilities.topk(min(count, probabilities.shape[-1]))
        before = largest.cumsum(dim=-1) - largest  # what the likelier ones hold already
        if before[-1] >= top_p or count >= probabilities.shape[-1]:
            break
    kept = ids[before < top_p]
    return torch.zeros_like(probabilities).index_copy(-1, kept, probabilities[kept])


def log_probabilities(
    logits: Tensor, chosen: int, alternatives: int
) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's log-probability, and the likeliest ids with theirs, from one position's (vocab,).

    They are the model's own, before temperature and top_p, in nats.
    """
    logprobs = logits.double().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, logits.shape[-1]))
    return float(logprobs[chosen]), list(zip(ids.tolist(), values.tolist(), strict=True))
