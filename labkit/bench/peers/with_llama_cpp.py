"""llama.cpp, through llama_cpp's own C interface, so that nothing of Python's stands in its way."""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from typing import Any

import llama_cpp as llama
import memory
import numpy as np

TYPES = {"Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_1": llama.LLAMA_FTYPE_MOSTLY_Q4_1}
Q8_0 = llama.GGML_TYPE_Q8_0


@llama.llama_log_callback
def _complain(level: int, text: bytes, data: Any) -> None:
    if level >= 4:  # an error
        print(text.decode(errors="replace"), end="")


class Peer:
    """One model with one context at a time."""

    def __init__(self) -> None:
        llama.llama_log_set(_complain, None)
        llama.llama_backend_init()
        self._model: Any = None
        self._context: Any = None

    def version(self) -> str:
        """Its version, and which of the processor's instructions and threads it was built with."""
        told = llama.llama_print_system_info().decode()
        features = [
            part.split("=")[0].strip() for part in told.replace("CPU :", "").split("|") if "= 1" in part
        ]
        return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')} ({', '.join(features)})"

    def quantize(self, source: str, target: str, kind: str, head: str, threads: int) -> None:
        """Write ``source`` again: the layers' matrices in ``kind``, the embedding and the head in ``head``."""
        params = llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.pure = threads, TYPES[kind], True
        if head == "Q8_0":
            params.token_embedding_type = params.output_tensor_type = Q8_0
        if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize {source} to {kind}")

    def open(self, path: str, threads: int, flash: bool, length: int, sequences: int = 1) -> None:
        """Load a file, with room for ``sequences`` texts of ``length`` tokens each."""
        self.close()
        params = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = length * sequences, sequences
        options.n_batch = options.n_ubatch = min(512, length * sequences)
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(flash)
        options.no_perf = True
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {length * sequences} tokens for {path}")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(max(512, sequences), 0, 1)

    def close(self) -> None:
        if self._context:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            llama.llama_model_free(self._model)
            self._context = self._model = None

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Read the prompts, then time ``tokens`` steps, each a token more for every one of them, the likeliest."""
        count, at = len(prompts), len(prompts[0])
        self._clear()
        new = []
        for sequence, prompt in enumerate(prompts):
            self._read(prompt, sequence)
            new.append(self._likeliest(-1))
        start = time.perf_counter()
        for step in range(tokens):
            self._run([(new[i], at + step, i, True) for i in range(count)])
            new = [self._likeliest(i) for i in range(count)]
        return time.perf_counter() - start

    def prefill(self, prompt: list[int]) -> float:
        """Time from the prompt to the first token after it."""
        self._clear()
        start = time.perf_counter()
        self._read(prompt, 0)
        self._likeliest(-1)
        return time.perf_counter() - start

    def first(self, path: str, threads: int, prompt: list[int]) -> list[float]:
        """Seconds from a file to the first token after the prompt, and the peak of this process's memory in bytes."""
        start = time.perf_counter()
        self.open(path, threads, True, 2 * len(prompt))
        self.prefill(prompt)
        return [time.perf_counter() - start, memory.peak()]

    def logits(self, window: list[int], out: str) -> None:
        """Save the logits (tokens, vocab) float32 of a window to a .npy file."""
        self._clear()
        self._run([(token, at, 0, True) for at, token in enumerate(window)])
        rows = [np.ctypeslib.as_array(self._row(i), (self._vocab,)) for i in range(len(window))]
        np.save(out, np.stack(rows))

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def _read(self, prompt: list[int], sequence: int) -> None:
        for start in range(0, len(prompt), 512):
            part = prompt[start : start + 512]
            last = len(prompt) - 1
            self._run([(t, start + i, sequence, start + i == last) for i, t in enumerate(part)])

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens")

    def _row(self, index: int) -> Any:
        return llama.llama_get_logits_ith(self._context, index)

    def _likeliest(self, index: int) -> int:
        return int(np.ctypeslib.as_array(self._row(index), (self._vocab,)).argmax())
