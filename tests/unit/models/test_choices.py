"""Multiple-choice questions against the text itself, answers against one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from labkit import models
from labkit.models.protocol import evaluation_chapters


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def asked(tiny: models.Llama) -> models.Choices:
    return models.choices(tiny.tokenizer, 12, context=24, continuation=8)


def test_the_right_option_goes_on_where_the_passage_ends(tiny: models.Llama, asked: models.Choices) -> None:
    text = "\n\n".join(chapter.text for chapter in evaluation_chapters())
    known = tiny.tokenizer.decode(tiny.tokenizer.encode(text))
    for context, options, answer in zip(asked.contexts, asked.options, asked.answers, strict=True):
        in_text = [
            tiny.tokenizer.decode([*context.tolist(), *option.tolist()]).strip("�") in known
            for option in options
        ]
        assert in_text == [i == answer for i in range(4)]


def test_options_are_told_apart_and_answers_stand_anywhere(asked: models.Choices) -> None:
    assert asked.contexts.shape == (12, 24) and asked.options.shape == (12, 4, 8) and len(asked) == 12
    for options in asked.options:
        assert len({tuple(option.tolist()) for option in options}) == 4
    assert asked.answers.unique().tolist() == [0, 1, 2, 3]


def test_the_seed_draws_the_false_ones_and_never_the_passages(
    tiny: models.Llama, asked: models.Choices
) -> None:
    again, other = (models.choices(tiny.tokenizer, 12, context=24, continuation=8, seed=s) for s in (0, 1))
    assert torch.equal(again.options, asked.options) and torch.equal(again.answers, asked.answers)
    assert torch.equal(other.contexts, asked.contexts) and not torch.equal(other.options, asked.options)


def test_the_likeliest_option_is_chosen(tiny: models.Llama, asked: models.Choices) -> None:
    """By the definition: the product of the probabilities of an option's tokens, one token after the other."""
    expected = []
    for context, options in zip(asked.contexts.tolist(), asked.options.tolist(), strict=True):
        scores = []
        for option in options:
            total, so_far = 0.0, list(context)
            for token in option:
                with torch.no_grad():
                    logits = tiny(torch.tensor([so_far]))[0, -1]
                total += math.log(float(logits.double().softmax(-1)[token]))
                so_far.append(token)
            scores.append(total)
        expected.append(scores.index(max(scores)))
    assert models.pick(tiny, asked, progress=False).tolist() == expected


def test_a_model_that_has_read_is_better_than_guessing(tiny: models.Llama) -> None:
    asked = models.choices(tiny.tokenizer, 64)
    right = int((models.pick(tiny, asked, progress=False) == asked.answers).sum())
    assert models.confidence(right, 64)[0] > 0.25


def test_a_quantized_model_chooses_too(tiny: models.Llama, asked: models.Choices) -> None:
    recipe = models.Recipe.load("w8a16-rtn-channel")
    chosen = models.pick(models.quantize(tiny, recipe, progress=False), asked, progress=False)
    assert chosen.tolist() == models.pick(tiny, asked, progress=False).tolist()


def test_wilsons_interval() -> None:
    """By his formula, and the rule of three's neighbourhood: none of 30 does not mean never."""
    for right, count in [(45, 64), (0, 30), (30, 30), (1, 2)]:
        z, p = 1.959963984540054, right / count
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
        assert models.confidence(right, count) == pytest.approx((middle - half, middle + half), abs=1e-9)
    with pytest.raises(ValueError):
        models.confidence(3, 2)


@pytest.mark.parametrize("count", [3, 100_000])
def test_too_few_or_too_many_questions_are_refused(tiny: models.Llama, count: int) -> None:
    with pytest.raises(ValueError, match="expected from 4 to"):
        models.choices(tiny.tokenizer, count)
