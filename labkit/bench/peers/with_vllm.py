"""vllm on the CPU in bfloat16, compiled, from a folder in Hugging Face layout."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)  # fmt: skip


class Peer:
    """One model."""

    def version(self) -> str:
        import vllm

        return f"vllm-cpu {vllm.__version__}"

    def open(self, folder: str, sequences: int, length: int, threads: int) -> None:
        """Room for so many sequences of that length, on the first ``threads`` processors. Compiling takes minutes."""
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        from vllm import LLM

        self._model: Any = LLM(
            model=folder, dtype="bfloat16", max_num_seqs=sequences, max_model_len=length, skip_tokenizer_init=True
        )

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds for ``tokens`` steps of all prompts together: what they take beyond their first token."""
        return self._seconds(prompts, tokens + 1) - self._seconds(prompts, 1)

    def _seconds(self, prompts: list[list[int]], tokens: int) -> float:
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answers = self._model.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        seconds = time.perf_counter() - start
        found = [len(answer.outputs[0].token_ids) for answer in answers]
        if found != [tokens] * len(prompts):
            raise RuntimeError(f"expected {tokens} tokens for each prompt, found {found}")
        return seconds
