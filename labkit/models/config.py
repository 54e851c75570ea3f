"""The numbers that say which Llama-family model it is; a Hugging Face ``config.json`` read and written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and options of one model.

    vocab_size, hidden_size, intermediate_size   the widths of embedding, residual stream and MLP
    layers, heads, kv_heads, head_dim            ``heads / kv_heads`` query heads share one KV head
    norm_eps                                     RMSNorm's epsilon
    rope_theta, rope_scaling                     rotary embedding: base, and Llama 3's stretching or None
    tie_embeddings                               the head is the embedding matrix
    qkv_bias, o_bias, mlp_bias                   which linears carry a bias
    qk_norm                                      RMSNorm over each query and key head (Qwen3)
    windows                                      per layer: positions a token sees, with its own, or None
    max_positions                                the context the model was trained for
    eos_ids                                      tokens that end a text
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"unsupported architecture {self.architecture!r}; labkit runs {', '.join(ARCHITECTURES)}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, found {self.head_dim}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        if len(self.windows) != self.layers:
            raise ValueError(
                f"expected {self.layers} attention windows, one a layer, found {len(self.windows)}"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read what transformers writes, of version 4 (``rope_scaling``) or 5 (``rope_parameters``).

        Raises ValueError for an architecture, an activation or a rotary embedding that labkit does not
        run, and for a missing key.
        """
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"{where}: unsupported model_type {kind!r}; labkit runs {', '.join(ARCHITECTURES)}"
            )
        if config.get("quantization_config"):
            raise ValueError(
                f"{where}: the checkpoint is already quantized "
                f"({config['quantization_config'].get('quant_method')}); load the unquantized original"
            )
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"{where}: unsupported activation {act!r}; labkit runs silu")
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        if missing := [key for key in needed if key not in config]:
            raise ValueError(
                f"{where}: {', '.join(missing)} missing; is this a whole Hugging Face config.json?"
            )
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        bias = bool(config.get("attention_bias", False)) and kind in ("llama", "qwen3")
        eos = config.get("eos_token_id")
        theta, scaling = _rope(config, where)
        return cls(
            architecture=kind,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            layers=layers,
            heads=heads,
            # Absent keys mean what the transformers class of that architecture takes as its default.
            kv_heads=config.get("num_key_value_heads") or {"mistral": 8}.get(kind, heads),
            head_dim=config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // heads),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
            qk_norm=kind == "qwen3",
            windows=_windows(config, kind, layers),
            max_positions=config.get("max_position_embeddings", 2048),
            bos_id=config.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read a ``config.json``. Raises ValueError as ``from_hf`` does, and where it is not JSON."""
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); the download is broken: fetch it again"
            ) from error
        return cls.from_hf(config, str(path))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers, vLLM and llama.cpp's converter read."""
        hf: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling and dict(self.rope_scaling),
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "torch_dtype": "float32",
        }
        window = next((w for w in self.windows if w is not None), None)
        if self.architecture == "mistral":
            hf["sliding_window"] = window
        elif self.architecture in ("qwen2", "qwen3") and window is not None:
            hf |= {
                "use_sliding_window": True,
                "sliding_window": window,
                "layer_types": [
                    "full_attention" if w is None else "sliding_attention" for w in self.windows
                ],
            }
        return hf

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians per position for each pair of channels, (head_dim / 2,) float32.

        Su et al. 2021 (RoPE); the ``llama3`` stretching is that of the Llama 3.1 reference code: long
        waves are slowed by ``factor``, short ones kept, those between blended.
        """
        exponent = torch.arange(0, self.head_dim, 2, device="cpu").float() / self.head_dim
        frequencies = 1.0 / self.rope_theta**exponent
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling["rope_type"] == "linear":
            return frequencies / scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / scaling["factor"])


def _rope(config: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"{where}: unsupported rotary embedding {kind!r}; labkit runs {', '.join(ROPE_KINDS)}"
        )
    if (part := scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"{where}: unsupported partial_rotary_factor {part}; labkit rotates whole heads")
    return float(theta), None if kind == "default" else scaling


def _windows(config: dict[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if (
        kind == "llama"
        or window is None
        or (kind != "mistral" and not config.get("use_sliding_window", False))
    ):
        return (None,) * layers
    if types := config.get("layer_types"):
        return tuple(window if t == "sliding_attention" else None for t in types)
    first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(layers))
