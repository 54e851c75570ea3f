"""How sensitive the loss is to each weight: the diagonal of the empirical Fisher information.

``F = mean over windows of (d loss / d w)^2``, the loss being a window's mean negative log-likelihood, as in
SqueezeLLM (Kim et al. 2023, arXiv 2306.07629, section 4.1). It stands for the second derivative: near a
minimum, an error e in w raises the loss by about F e^2 / 2, up to a factor that is the same for all weights.

Gradients need the whole model at once, so memory is not bounded by one layer here. ``fisher_bytes`` says how
much it is, and ``fisher`` refuses before any work where that much is not free.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.models import memory
from labkit.models.calibrate import bar, shared_copy
from labkit.models.config import ModelConfig
from labkit.models.llama import Llama


def fisher(
    model: Llama,
    tokens: Tensor,
    layers: str | Collection[str] = "model.layers.*",
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The mean squared gradient of every weight of the linear layers whose name matches ``layers``.

    tokens    (windows, tokens) int64, for example of ``calibration_windows``; at least two tokens each
    layers    a shell pattern over Hugging Face names, or several
    progress  a bar over windows; None is ``LABKIT_PROGRESS``

    Returns float32 tensors of the weights' shapes, by name. A head that shares its matrix with the embedding
    gets the gradient of its use as a head. The model stays as it is. Peak memory beside the model:
    ``fisher_bytes``. Raises ValueError when no name matches, a layer is quantized already or there is no
    text, MemoryError where ``fisher_bytes`` exceeds what is free.
    """
    work = shared_copy(model)
    linears = work.linears()
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    names = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise ValueError(f"no linear layer matches {layers!r}; names are like {next(iter(linears))}")
    if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
        raise ValueError(
            f"expected windows of at least two tokens, (windows, tokens); found {tuple(tokens.shape)}"
        )
    originals = {name: w for name in names if isinstance(w := linears[name].weight, Tensor)}
    if taken := [name for name in names if name not in originals]:
        raise ValueError(f"{taken[0]} is quantized and has no gradient; start from the original")
    needed = fisher_bytes(model.config, tokens.shape[1], [w.numel() for w in originals.values()])
    memory.require(needed, f"the Fisher information of {len(names)} layers")

    found: dict[str, Tensor] = {}

    def accumulate(name: str, weight: Tensor) -> None:
        assert weight.grad is not None  # this is called when there is one
        found[name].addcmul_(weight.grad, weight.grad, value=1 / len(tokens))
        weight.grad = None  # so that the gradients of two layers never exist side by side

    for name, original in originals.items():
        # A parameter of its own around the same numbers: the original's asks for no gradient.
        weight = nn.Parameter(original.detach(), requires_grad=True)
        linears[name].weight = weight
        weight.register_post_accumulate_grad_hook(partial(accumulate, name))
        found[name] = torch.zeros_like(weight, requires_grad=False)
    with torch.enable_grad():
        for window in bar(list(tokens), "fisher", progress, unit="window"):
            logits = work(window[None])[0]  # (tokens, vocab)
            F.cross_entropy(logits[:-1], window[1:]).backward()
    return found


def fisher_bytes(config: ModelConfig, tokens: int, weights: Collection[int]) -> int:
    """Bytes that ``fisher`` takes beside the model, for windows of ``tokens`` and layers of so many weights.

    The Fisher itself, one layer's gradient, and what one window's pass keeps for its way back. A quarter is
    added for what the way back takes itself, and the allocator.
    """
    return 5 * (4 * (sum(weights) + max(weights)) + memory.pass_bytes(config, tokens, logits=4)) // 4
