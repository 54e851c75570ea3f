"""labkit itself in a process of its own, for what is measured of a whole process."""

from __future__ import annotations

import time

import memory
import torch

from labkit import models
from labkit.models import checkpoint
from labkit.serving.engine import Engine
from labkit.serving.sampling import SamplingParams


class Peer:
    """One measurement a process, since its peak of memory is part of the answer."""

    def first(self, folder: str, threads: int, prompt: list[int]) -> list[float]:
        """Seconds from a checkpoint to the first token after the prompt, and the process's peak of memory in bytes."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        with Engine(checkpoint.load(folder), max_len=2 * len(prompt)) as engine:
            next(engine.submit(prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
            return [time.perf_counter() - start, memory.peak()]

    def gptq(self, model: str | None, recipe: str, threads: int, out: str) -> list[float]:
        """Quantize by a recipe and save the checkpoint. Seconds of the quantization alone, and the process's peak."""
        torch.set_num_threads(threads)
        original = models.load(model, seed=0)
        start = time.perf_counter()
        made = models.quantize(original, recipe, seed=0, progress=False)
        seconds = time.perf_counter() - start
        models.save(made, out, overwrite=True)
        return [seconds, memory.peak()]
