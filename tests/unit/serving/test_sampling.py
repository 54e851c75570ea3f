from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from labkit.serving.sampling import SamplingParams, choose, log_probabilities, nucleus


class Fixed:
    """A source of randomness that says what it is told, and counts."""

    def __init__(self, value: float) -> None:
        self.value, self.drawn = value, 0

    def random(self) -> float:
        self.drawn += 1
        return self.value


def test_greedy_takes_the_largest_and_draws_nothing():
    draw = Fixed(0.99)
    assert choose(torch.tensor([0.0, 3.0, 2.9]), SamplingParams(), draw) == 1
    assert draw.drawn == 0


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 3), (0.9999999, 3)]
)
def test_a_draw_walks_the_vocabulary_by_its_probabilities(u: float, token: int):
    logits = torch.tensor([0.2, 0.3, 0.0, 0.5]).log()  # token 2 is impossible
    draw = Fixed(u)
    assert choose(logits, SamplingParams(temperature=1.0), draw) == token
    assert draw.drawn == 1


def test_an_impossible_first_token_is_not_drawn():
    assert choose(torch.tensor([-torch.inf, 0.0, 0.0]), SamplingParams(temperature=1.0), Fixed(0.0)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_softmax_at_the_temperature(temperature: float):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    draw, n = random.Random(1), 4000
    seen = Counter(choose(logits, SamplingParams(temperature=temperature), draw) for _ in range(n))
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(seen[token] - n * p) < 4 * math.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e6])
def test_no_temperature_overflows(temperature: float):
    logits = torch.tensor([-900.0, 900.0, 899.0])
    token = choose(logits, SamplingParams(temperature=temperature), Fixed(0.5))
    assert token == 1


def nucleus_by_hand(probabilities: list[float], top_p: float) -> set[int]:
    kept, held = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if held >= top_p:
            break
        kept.add(token)
        held += probabilities[token]
    return kept


@pytest.mark.parametrize("vocab", [3, 64, 65, 1500, 3000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 3.0])  # nearly uniform, so that the nucleus is large, and peaked
def test_the_nucleus_is_the_smallest_that_holds_top_p(vocab: int, top_p: float, spread: float):
    generator = torch.Generator().manual_seed(vocab)
    probabilities = (torch.randn(vocab, generator=generator, dtype=torch.float64) * spread).softmax(-1)
    kept = nucleus(probabilities, top_p)
    assert set(kept.nonzero().flatten().tolist()) == nucleus_by_hand(probabilities.tolist(), top_p)
    assert torch.equal(kept[kept > 0], probabilities[kept > 0])


def test_the_token_that_reaches_top_p_is_in_and_the_next_is_out():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    assert nucleus(probabilities, 0.75).tolist() == [0.5, 0.25, 0, 0]
    assert nucleus(probabilities, 0.76).count_nonzero() == 3
    drawn = {choose(logits, SamplingParams(temperature=1, top_p=0.75), Fixed(u / 100)) for u in range(100)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float):
    with pytest.raises(ValueError, match="largest logit is"):
        choose(torch.tensor([0.0, bad, 1.0]), SamplingParams(temperature=temperature), Fixed(0.5))


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    total = math.log(sum(math.exp(x) for x in (1, 3, 2, -1)))
    chosen, likeliest = log_probabilities(logits, 0, 2)
    assert chosen == pytest.approx(1 - total)
    assert [id for id, _ in likeliest] == [1, 2]
    assert [value for _, value in likeliest] == pytest.approx([3 - total, 2 - total])
    assert log_probabilities(logits, 3, 0) == (pytest.approx(-1 - total), [])
    assert len(log_probabilities(logits, 3, 20)[1]) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "at least 1, found 0"),
        ({"temperature": -0.1}, "0 or more and finite, found -0.1"),
        ({"temperature": float("nan")}, "found nan"),
        ({"temperature": float("inf")}, "found inf"),
        ({"top_p": 0.0}, r"\(0, 1\], found 0.0"),
        ({"top_p": 1.01}, "found 1.01"),
        ({"stop": ("",)}, "at least one character"),
        ({"stop": (3,)}, "stop must be texts"),
        ({"logprobs": 21}, "0 to 20, found 21"),
        ({"logprobs": -1}, "found -1"),
    ],
)
def test_parameters_outside_their_range_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


def test_a_single_stop_text_is_one_of_them():
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
