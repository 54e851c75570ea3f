"""llm-compressor: GPTQ of a whole model in Hugging Face layout."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

os.environ |= {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "LOGURU_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
logging.disable(logging.WARNING)

import memory  # noqa: E402
import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402


class Peer:
    """One quantization; each wants a process of its own, since its peak of memory is part of the answer."""

    def version(self) -> str:
        return ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("llmcompressor", "torch")
        )

    def gptq(
        self, folder: str, windows: str, group: int, damp: float, threads: int, out: str
    ) -> list[float]:
        """Quantize the model in ``folder`` to int4 with zero points on the windows of a JSON file, and save what its
        weights have become. Seconds of the quantization alone, and the process's peak of memory in bytes."""
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens: Any = [{"input_ids": torch.tensor([w])} for w in json.loads(Path(windows).read_text())]
        weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        modifier = GPTQModifier(
            config_groups={"all": scheme},
            ignore=["lm_head"],
            dampening_frac=damp,
            actorder=None,
            block_size=128,
        )
        # It wants a tokenizer, though it is given token ids.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
        start = time.perf_counter()
        oneshot(
            model=model, processor=tokenizer, dataset=DataLoader(tokens, batch_size=None), recipe=modifier,
            pipeline="sequential", num_calibration_samples=len(tokens),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        kept = model.state_dict()
        parts = {k: v.float().contiguous() for k, v in kept.items() if k.endswith(("weight", "bias"))}
        parts.pop("lm_head.weight" if model.config.tie_word_embeddings else "", None)
        save_file(parts, out)
        return [seconds, memory.peak()]
