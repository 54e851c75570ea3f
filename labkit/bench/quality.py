"""The KL to the reference of what was timed: of the kernels' own logits, activations rounded as they round them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import kernels
from labkit.models import Llama, Protocol
from labkit.models.evaluate import dense, final_stream
from labkit.serving.kv_cache import KVCache
from labkit.serving.step import Step


class Reference:
    """What the unquantized model says of a protocol's windows, in float32."""

    def __init__(self, model: Llama, protocol: Protocol) -> None:
        self.protocol = protocol
        with torch.no_grad():
            self._final = final_stream(
                model, protocol.tokens, "reference", None
            )  # (windows, tokens, hidden)
        self._head = dense(model.lm_head).detach()

    @torch.inference_mode()
    def of_windows(self, logits_of: Callable[[list[int]], Tensor]) -> float:
        """Mean KL(reference || other), nats per token, where ``logits_of(window)`` gives (tokens, vocab)."""
        first, end = self.protocol.positions
        total = 0.0
        for window, final in zip(self.protocol.windows, self._final, strict=True):
            total += self._kl(final[first:end], logits_of(list(window))[first:end])
        return total / (len(self.protocol.windows) * (end - first))

    @torch.inference_mode()
    def of_decode(self, model: Llama, native: bool = True) -> float:
        """Mean KL of a model that is given the windows a token at a time, as the engine decodes them.

        native: by our own step where it can; else by the model's own pass, a token a time all the same.
        """
        first, end = self.protocol.positions
        tokens = self.protocol.tokens  # (windows, tokens)
        cache = KVCache(model.config, max_batch=len(tokens), max_len=tokens.shape[1], kv=model.kv)
        for i in range(len(tokens)):
            cache.add(i)
        step = Step(model, cache) if native and Step.why_not(model) is None else None
        total = 0.0
        for at in range(end):
            batch = cache.batch(range(len(tokens)), 1)
            new = tokens[:, at : at + 1]
            if step is None:
                logits = model(new, batch)[:, 0]  # (windows, vocab)
            else:
                logits = torch.stack([found for found, _ in step(new.tolist(), batch)])
            if at >= first:
                total += self._kl(self._final[:, at], logits)
        return total / (len(tokens) * (end - first))

    def _kl(self, final: Tensor, logits: Tensor) -> float:
        """Summed over positions: final (positions, hidden) of the reference, logits (positions, vocab)."""
        log_p = F.log_softmax(kernels.dense(final, self._head), dim=-1)
        log_q = F.log_softmax(logits.float(), dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum().item()
