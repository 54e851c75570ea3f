"""Multiple choice: which of several continuations is the book's?

A passage of the evaluation chapters, its true continuation, and as many false ones from other passages. A
model chooses the one to which it gives the highest probability, as the harness of Gao et al. ("A framework
for few-shot language model evaluation", 2021) has it; all are equally long, so no length is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit import kernels
from labkit.models.evaluate import dense, final_stream
from labkit.models.llama import Llama
from labkit.models.protocol import evaluation_stream
from labkit.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choices:
    """Questions with one right answer each.

    contexts  int64 (questions, context): the passage that is given
    options   int64 (questions, options, continuation): what may follow
    answers   int64 (questions,): which option does
    """

    contexts: Tensor
    options: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)


def choices(
    tokenizer: Tokenizer,
    count: int = 64,
    *,
    context: int = 48,
    continuation: int = 16,
    options: int = 4,
    seed: int = 0,
) -> Choices:
    """``count`` questions from passages spread evenly over the evaluation chapters; ``seed`` draws the rest.

    context, continuation: in tokens. The false options are continuations of other passages of the same
    questions. Raises ValueError when the text does not hold so many, or there are too few to choose from.
    """
    stream, length = evaluation_stream(tokenizer), context + continuation
    available = len(stream) // length
    if not options <= count <= available:
        raise ValueError(
            f"expected from {options} to {available} questions of {length} tokens, found {count}"
        )
    starts = torch.tensor([i * available // count * length for i in range(count)])
    passages = stream[starts[:, None] + torch.arange(length)]  # (count, length)
    generator = torch.Generator().manual_seed(seed)
    # The others in a drawn order; the first few are the false ones, and the true one is put among them.
    order = torch.rand(count, count, generator=generator).fill_diagonal_(2).argsort(dim=1)
    which = torch.cat([torch.arange(count)[:, None], order[:, : options - 1]], dim=1)  # (count, options)
    answers = torch.randint(options, (count,), generator=generator)
    place = torch.arange(count)
    which[place, 0] = which[place, answers]
    which[place, answers] = place
    return Choices(passages[:, :context], passages[which, context:], answers)


@torch.no_grad()
def pick(model: Llama, asked: Choices, progress: bool | None = None) -> Tensor:
    """The option that the model finds likeliest, int64 (questions,). Exact float32, as ``evaluate``.

    progress: a bar over decoder layers; None is ``LABKIT_PROGRESS``.
    """
    questions, options, continuation = asked.options.shape
    context = asked.contexts[:, None].expand(-1, options, -1)
    tokens = torch.cat([context, asked.options], dim=-1).flatten(0, 1)  # (questions * options, length)
    final = final_stream(model, tokens, "choices", progress)[:, -continuation - 1 : -1]
    weight = dense(model.lm_head)
    scores = torch.stack(
        [
            kernels.dense(states, weight).log_softmax(dim=-1).gather(1, ids[:, None]).sum(dtype=torch.float64)
            for states, ids in zip(final, tokens[:, -continuation:], strict=True)
        ]
    )  # one sequence at a time: logits of all would be gigabytes
    return scores.view(questions, options).argmax(dim=1)


def confidence(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Between which shares the true one lies, at that level of confidence, when ``right`` of ``count`` were.

    Wilson's interval (1927). Raises ValueError unless 0 <= right <= count and count is at least 1.
    """
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)
