"""transformers in bfloat16, its own cache and attention, from a folder in Hugging Face layout."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Peer:
    """One model."""

    def version(self) -> str:
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def open(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        ).eval()

    @torch.inference_mode()
    def decode(self, prompt: list[int], tokens: int) -> float:
        """Read the prompt, then time ``tokens`` steps, each a token more, the likeliest."""
        out = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(tokens):
            new = out.logits[:, -1:].argmax(-1)  # (1, 1)
            out = self._model(new, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    @torch.inference_mode()
    def logits(self, window: list[int], out: str) -> None:
        """Save the logits (tokens, vocab) float32 of a window to a .npy file."""
        import numpy as np

        np.save(out, self._model(torch.tensor([window])).logits[0].float().numpy())
