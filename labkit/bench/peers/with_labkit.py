"""labkit itself in a process of its own, for what is measured of a whole process."""

from __future__ import annotations

import time

import memory
import torch

from labkit import models
from labkit.bench import model
from labkit.models import checkpoint
from labkit.serving.engine import Engine
from labkit.serving.kv_cache import KVCache
from labkit.serving.sampling import SamplingParams


class Peer:
    """Of ``first`` and ``gptq`` one measurement a process, since its peak of memory is part of the answer."""

    def open(self, folder: str, kernel: str, threads: int) -> None:
        """A checkpoint in the model's own pass, multiplied by one of ``labkit.bench.model``'s kernels for torch."""
        torch.set_num_threads(threads)
        self._model = model.with_kernel(model.with_floats(checkpoint.load(folder)), getattr(model, kernel))

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the logits after the prompt."""
        return self._run(prompt, 0)[0]

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Seconds for ``tokens`` more, each the likeliest."""
        return self._run(prompt, tokens)[1]

    @torch.inference_mode()
    def _run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        config, kv = self._model.config, self._model.kv
        cache = KVCache(config, max_batch=1, max_len=len(prompt) + tokens, kv=kv)
        cache.add(0)
        start = time.perf_counter()
        x, rotary, batch = self._model.begin(torch.tensor([prompt]), cache.batch([0], len(prompt)))
        for block in self._model.blocks:
            x = block(x, rotary, batch)
        last = self._model.end(x[:, -1:]).argmax(-1)  # (1, 1)
        middle = time.perf_counter()
        for _ in range(tokens):
            last = self._model(last, cache.batch([0], 1)).argmax(-1)
        return middle - start, time.perf_counter() - middle

    def first(self, folder: str, threads: int, prompt: list[int]) -> list[float]:
        """Seconds from a checkpoint to the first token after the prompt, and the process's peak of memory in bytes."""
        torch.set_num_threads(threads)
        start = time.perf_counter()
        with Engine(checkpoint.load(folder), max_len=2 * len(prompt)) as engine:
            next(engine.submit(prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
            return [time.perf_counter() - start, memory.peak()]

    def gptq(self, name: str | None, recipe: str, threads: int, out: str) -> list[float]:
        """Quantize by a recipe and save the checkpoint. Seconds of the quantization alone, and the process's peak."""
        torch.set_num_threads(threads)
        original = models.load(name, seed=0)
        start = time.perf_counter()
        made = models.quantize(original, recipe, seed=0, progress=False)
        seconds = time.perf_counter() - start
        models.save(made, out, overwrite=True)
        return [seconds, memory.peak()]
