"""``evaluate``: how far a model's predictions are from its reference's, by the frozen protocol.

Everything here is exact float32: codes are dequantized, once per layer and pass, and multiplied as plain
weights are. Some kernels round activations too, which is a property of the server and not of the
quantization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.models.calibrate import bar, shared_copy
from labkit.models.llama import Linear, Llama
from labkit.models.protocol import Protocol, protocol_for
from labkit.models.store import load


@dataclass(frozen=True)
class Report:
    """What one evaluation found.

    model, recipe          the model's name, and its recipe's or "none"
    perplexity             exp of the mean negative log-likelihood, nats per token, of the scored tokens
    kl                     mean KL(reference || model) over the full vocabulary, nats per token
    top1                   share of scored positions at which both put the same token first
    bits_per_weight        over the quantized layers, scales and zero points counted; over all linear
                           layers of a model that has none
    bits_per_weight_model  over all of the model's weights
    bytes                  of the weights, as the checkpoint's file stores them
    windows                how many were evaluated
    protocol               hash of the protocol: only reports with the same hash can be compared
    seconds                for this model, the reference's pass left out
    """

    model: str
    recipe: str
    perplexity: float
    kl: float
    top1: float
    bits_per_weight: float
    bits_per_weight_model: float
    bytes: int
    windows: int
    protocol: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> dict[str, str]:
        """The report for reading: label to value, with units."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "perplexity": f"{self.perplexity:.2f}",
            "KL to the original": f"{self.kl:.4f} nats per token",
            "top-1 agreement": f"{self.top1:.1%}",
            "bits per weight": f"{self.bits_per_weight:.2f} over the quantized layers, "
            f"{self.bits_per_weight_model:.2f} over the model",
            "weights": f"{self.bytes / 1e6:.1f} MB",
            "protocol": f"{self.protocol}, {self.windows} windows",
            "time": f"{self.seconds:.1f} s",
        }

    def __str__(self) -> str:
        return "\n".join(f"{label:20}{value}" for label, value in self.rows().items())


def evaluate(
    model: Llama,
    reference: Llama | None = None,
    protocol: str | Protocol = "full",
    progress: bool | None = None,
) -> Report:
    """Measure one model against its reference; ``compare`` does it for several.

    reference  None: the model that the quantized one was made from, loaded by its name and seed; an
               unquantized model is its own reference (KL 0)
    protocol   "full" (32 windows of 256 tokens), "lesson" (8 of them) or a Protocol
    progress   a bar over decoder layers; None is ``LABKIT_PROGRESS``

    Raises ValueError when the vocabularies differ or the model was made from another reference.
    """
    return compare([model], reference, protocol, progress)[0]


def compare(
    models: Iterable[Llama],
    reference: Llama | None = None,
    protocol: str | Protocol = "full",
    progress: bool | None = None,
) -> list[Report]:
    """Measure several models against one reference: ``compare_each``, all at once."""
    return list(compare_each(models, reference, protocol, progress))


@torch.no_grad()
def compare_each(
    models: Iterable[Llama],
    reference: Llama | None = None,
    protocol: str | Protocol = "full",
    progress: bool | None = None,
) -> Iterator[Report]:
    """Measure several models against one reference, whose pass through the decoder is made once.

    ``models`` may be a generator: each is asked for when its turn comes. What is kept of a pass is the
    normed residual stream, (windows, tokens, hidden); logits exist for one window at a time. The rest is
    as in ``evaluate``.
    """
    known: Tensor | None = None
    for model in models:
        if reference is None:
            reference = reference_of(model)
        _check_pair(model, reference)
        if not isinstance(protocol, Protocol):
            protocol = protocol_for(reference.tokenizer, protocol)
        if known is None:
            known = final_stream(reference, protocol.tokens, "reference", progress)
        start = time.perf_counter()
        recipe = model.made.recipe.name if model.made else "none"
        final = known if model is reference else final_stream(model, protocol.tokens, recipe, progress)
        nll, kl, top1 = score(final, model.lm_head, known, reference.lm_head, protocol)
        over_layers, over_model, size = sizes(model)
        yield Report(
            model=model.made.model if model.made else model.name,
            recipe=recipe,
            perplexity=math.exp(nll),
            kl=kl,
            top1=top1,
            bits_per_weight=over_layers,
            bits_per_weight_model=over_model,
            bytes=size,
            windows=len(protocol.windows),
            protocol=protocol.hash,
            seconds=time.perf_counter() - start,
        )


def reference_of(model: Llama) -> Llama:
    """The unquantized model that a quantized one was made from; an unquantized model itself.

    Raises what ``load`` raises when it is not found by its name any more.
    """
    if model.made is None:
        return model
    try:
        return load(model.made.model, seed=model.made.model_seed)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the model {model.made.model!r} that this one was made from is not found by its name; "
            "load it from where it lies and give it as the reference (labkit eval: --model FOLDER)"
        ) from error


def sizes(model: Llama) -> tuple[float, float, int]:
    """Bits per weight over the quantized layers, over the model, and bytes of all weights in a file.

    A tied head is counted once. A model without quantized layers gives the bits of its linear layers.
    """
    linears = model.linears()
    packed = [m.weight for m in linears.values() if not isinstance(m.weight, Tensor)]
    plain = {id(p): p for p in model.state_dict(keep_vars=True).values()}.values()
    bits = 8 * sum(w.nbytes for w in packed)
    count = sum(w.shape.numel() for w in packed)
    total_bytes = bits // 8 + sum(p.nbytes for p in plain)
    total_count = count + sum(p.numel() for p in plain)
    if not packed:
        weights = [m.weight for m in linears.values() if isinstance(m.weight, Tensor)]
        bits, count = 8 * sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
    return bits / count, 8 * total_bytes / total_count, total_bytes


def _check_pair(model: Llama, reference: Llama) -> None:
    if model.config.vocab_size != reference.config.vocab_size:
        raise ValueError(
            f"{model.name} has {model.config.vocab_size} tokens, its reference {reference.name} has "
            f"{reference.config.vocab_size}; compare a model with the one it was made from"
        )
    made = model.made
    if made and (made.model, made.model_seed) != (reference.name, reference.seed):
        raise ValueError(
            f"the model was made from {made.model} with off-grid seed {made.model_seed}, the reference is "
            f"{reference.name} with {reference.seed}; load the reference by the same name and seed"
        )


def final_stream(model: Llama, tokens: Tensor, what: str, progress: bool | None) -> Tensor:
    """What the head reads of ``tokens`` (windows, tokens): (windows, tokens, hidden), exact float32.

    A quantized layer is dequantized for its turn alone. The bar says that it is evaluating ``what``.
    """
    work = shared_copy(model)
    x, rotary, cache = work.begin(tokens)
    for block in bar(list(work.blocks), f"evaluating {what}", progress):
        for linear in block.modules():
            if isinstance(linear, Linear) and not isinstance(linear.weight, Tensor):
                linear.weight = linear.weight.dequantize()
        x = block(x, rotary, cache)
        for linear in block.modules():
            if isinstance(linear, Linear):
                linear.weight = torch.empty(0)  # the copy's: let go of the float32 weights
    return work.final(x)


def score(
    final: Tensor, head: Linear, known: Tensor, known_head: Linear, protocol: Protocol
) -> tuple[float, float, float]:
    """Mean negative log-likelihood, mean KL(reference || model), and the share of equal first choices."""
    first, end = protocol.positions
    weight, known_weight = dense(head), dense(known_head)
    nll = kl = same = 0.0
    for ids, h, r in zip(protocol.tokens, final, known, strict=True):
        log_q = F.log_softmax(kernels.dense(h[first:end], weight, head.bias), dim=-1)  # (positions, vocab)
        log_p = F.log_softmax(kernels.dense(r[first:end], known_weight, known_head.bias), dim=-1)
        nll -= log_q.gather(1, ids[first + 1 : end + 1, None]).double().sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()
        same += (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum().item()
    count = len(protocol.windows) * (end - first)
    return nll / count, kl / count, same / count


def dense(head: Linear) -> Tensor:
    """A layer's weight (out, in) as floats, dequantized where it is quantized."""
    return head.weight if isinstance(head.weight, Tensor) else head.weight.dequantize()
