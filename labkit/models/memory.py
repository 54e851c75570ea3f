"""How many bytes a model needs, from its shapes alone: weights, scales, KV cache. And how many are free."""

from __future__ import annotations

import re
from pathlib import Path

from labkit.models.config import ModelConfig


def _llama(
    layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        tie_embeddings=tied,
    )


# Shapes of well-known models, from the config.json that each is published with.
KNOWN = {
    "SmolLM2 135M": _llama(30, 576, 1536, 9, 3, 49152, True),
    "SmolLM2 360M": _llama(32, 960, 2560, 15, 5, 49152, True),
    "Llama 3.2 1B": _llama(16, 2048, 8192, 32, 8, 128256, True),
    "Llama 3.2 3B": _llama(28, 3072, 8192, 24, 8, 128256, True),
    "Llama 3.1 8B": _llama(32, 4096, 14336, 32, 8, 128256, False),
    "Llama 3.1 70B": _llama(80, 8192, 28672, 64, 8, 128256, False),
    "Llama 3.1 405B": _llama(126, 16384, 53248, 128, 8, 128256, False),
}


def parameters(config: ModelConfig) -> int:
    """How many numbers the model has. A tied head is counted once; biases and q/k norms where the model has them."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = hidden * (2 * q + 2 * kv) + 3 * hidden * mlp + 2 * hidden
    layer += (q + 2 * kv) * config.qkv_bias + hidden * config.o_bias
    layer += (2 * mlp + hidden) * config.mlp_bias + 2 * config.head_dim * config.qk_norm
    tables = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return config.layers * layer + tables + hidden


def weight_bytes(count: int, bits: float, group: int | None = None, scale_bits: int = 16) -> float:
    """Bytes of ``count`` weights at ``bits`` each, with a scale of ``scale_bits`` for every ``group`` of them."""
    return count * (bits + (scale_bits / group if group else 0.0)) / 8


def kv_bytes(config: ModelConfig, tokens: int, bits: float = 16) -> float:
    """Bytes of the keys and values of ``tokens`` tokens, over all layers; a sliding window is not counted off."""
    return 2 * config.layers * config.kv_heads * config.head_dim * tokens * bits / 8


def pass_bytes(config: ModelConfig, tokens: int, logits: int) -> int:
    """Bytes that a pass of ``tokens`` tokens keeps for its way back, in float32.

    In each decoder layer four vectors of the hidden size, four of the MLP's and five as wide as the queries;
    the logits ``logits`` times. Attention's probabilities are not kept: PyTorch's fused attention makes them
    anew.
    """
    q = config.heads * config.head_dim
    layer = 4 * config.hidden_size + 4 * config.intermediate_size + 5 * q
    return 4 * tokens * (config.layers * layer + logits * config.vocab_size)


def available(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes this process can still take: what the machine has free, or what its cgroup leaves, if less.

    None where neither is known (no Linux). What files occupy counts as free: it is given up when asked for.
    """
    limits = []
    if found := re.search(r"MemAvailable:\s+(\d+) kB", _read(meminfo)):
        limits.append(1024 * int(found[1]))
    limit, used = (_read(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        files = re.search(r"^file (\d+)", _read(cgroup / "memory.stat"), flags=re.MULTILINE)
        limits.append(int(limit) - int(used) + (int(files[1]) if files else 0))
    return max(0, min(limits)) if limits else None


def require(needed: int, what: str) -> None:
    """Raises MemoryError, before any work, where ``what`` needs more bytes than are free."""
    free = available()
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; close other programs, take "
            f"shorter windows or fewer layers, or a smaller model"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
