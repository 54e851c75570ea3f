"""The forward pass of a Llama-family decoder: Llama, Qwen2, Qwen3 and Mistral, in plain PyTorch.

Module names are those of Hugging Face checkpoints: ``state_dict()`` and a file's tensors have the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import kernels
from labkit.models.config import ModelConfig
from labkit.models.kv import KVSpec
from labkit.models.tokenizer import Tokenizer
from labkit.quant import QuantizedTensor, QuantSpec

if TYPE_CHECKING:
    from labkit.models.quantize import Made


class Cache(Protocol):
    """What attention needs to know about the past. One object serves every layer of one forward pass.

    positions   (B, T) int64: where each of the pass's new tokens stands in its own sequence
    update      takes a layer's new keys and values, (B, kv_heads, T, head_dim), keys already rotated, and
                returns all keys and values that these tokens may look at, (B, kv_heads, S, head_dim), and
                a mask: bool, True = visible, broadcastable to (B, heads, T, S); None = all visible.
                ``visible`` makes it; a layer with a window (``config.windows[layer]``) needs its own.
    rounds      whether ``update`` itself rounds what it is given to what it keeps it in; else attention does before.
                To round twice would not do: a rounded number may have another scale.
    """

    rounds: bool

    @property
    def positions(self) -> Tensor: ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...


def visible(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Who sees whom: the past, oneself, and no further back than ``window`` positions (oneself included).

    queries (B, T) and keys (B, S) are positions; a negative key position is an empty slot that nobody sees.
    Returns bool (B, 1, T, S).
    """
    distance = queries[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, S)
    mask = (distance >= 0) & (keys >= 0)[:, None, None, :]
    return mask if window is None else mask & (distance < window)


class WholeText:
    """The cache of a pass that has no past: the tokens are whole texts from their first token on."""

    rounds = False

    def __init__(self, config: ModelConfig, tokens: Tensor) -> None:
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        masks = {w: visible(self.positions, self.positions, w) for w in set(config.windows)}
        self._masks = [masks[w] for w in config.windows]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return k, v, self._masks[layer]


class GrowingCache:
    """The simplest cache that is right: keys and values are appended, for texts of the same length.

    ``model(tokens, cache.expect(tokens))``, again and again. The serving engine has a faster one.
    """

    rounds = False

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.length = 0
        self.positions = torch.empty(1, 0, dtype=torch.int64)
        self._keys: list[Tensor | None] = [None] * config.layers
        self._values: list[Tensor | None] = [None] * config.layers

    def expect(self, tokens: Tensor) -> GrowingCache:
        """Make room for the tokens (B, T) of the next pass; returns itself."""
        self.positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[
            None
        ]
        self.length += tokens.shape[1]
        return self

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        old_k, old_v = self._keys[layer], self._values[layer]
        if old_k is not None and old_v is not None:
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)  # (B, kv_heads, S, head_dim)
        self._keys[layer], self._values[layer] = k, v
        window = self.config.windows[layer]
        if self.positions.shape[1] == 1 and window is None:
            return k, v, None
        return k, v, visible(self.positions, torch.arange(self.length, device=k.device)[None], window)


class Linear(nn.Module):
    """``x @ weight.T + bias``; x (..., in); weight (out, in) is a Tensor or a QuantizedTensor.

    Assign ``linear.weight`` to change from one to the other. Weights do not ask for gradients until
    ``requires_grad_()`` is called. Where ``linear.input`` is a grid, x is rounded to it first, in each call anew.
    """

    weight: Tensor | QuantizedTensor
    bias: Tensor | None
    input: QuantSpec | None

    def __init__(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._prepared: kernels.Prepared | None = None
        self.weight, self.input = weight, None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            # A parameter's name cannot be given to anything else before it is free.
            self._parameters.pop("weight", None)
            self.__dict__.pop("weight", None)
            self._prepared = None
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
        if name == "input":
            self._prepared = None
        super().__setattr__(name, value)

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return kernels.dense(kernels.rounded(x, self.input), self.weight, self.bias)
        return self.prepared(x, self.bias)

    @property
    def prepared(self) -> kernels.Prepared:
        """The quantized weight as a kernel wants it, made when first asked for."""
        if self._prepared is None:
            assert isinstance(self.weight, QuantizedTensor), "plain weights are multiplied as they are"
            self._prepared = kernels.prepare(self.weight, input=self.input)
        return self._prepared

    def extra_repr(self) -> str:
        kind = "" if isinstance(self.weight, Tensor) else f", {self.weight.spec}"
        kind += "" if self.input is None else f", input {self.input}"
        return f"{self.in_features} -> {self.out_features}{kind}"


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (channel i, channel i + head_dim / 2) by its angle. x (B, heads, T, head_dim)."""
    cos, sin = rotary  # (B, 1, T, head_dim) each; the first half of sin is negated
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a KV head (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.kv = layer, config.head_dim, KVSpec()
        self.q_proj = _linear(config.hidden_size, config.heads * config.head_dim, config.qkv_bias)
        self.k_proj = _linear(config.hidden_size, config.kv_heads * config.head_dim, config.qkv_bias)
        self.v_proj = _linear(config.hidden_size, config.kv_heads * config.head_dim, config.qkv_bias)
        self.o_proj = _linear(config.heads * config.head_dim, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        split = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)  # (B, kv_heads, T, head_dim)
        v = self.v_proj(x).view(split).transpose(1, 2)  # (B, kv_heads, T, head_dim)
        k = rotate(k, rotary)
        if not cache.rounds:
            k, v = self.kv.round(k, v)
        k, v, mask = cache.update(self.layer, k, v)  # (B, kv_heads, S, head_dim)
        y = F.scaled_dot_product_attention(rotate(q, rotary), k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, hidden)


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.mix: nn.Module = nn.Identity()  # an online transform of down's input, where ``rotate`` put one

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.mix(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normed copy of the residual stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)  # (B, T, hidden)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and last norm: what a checkpoint calls ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        empty = torch.empty(
            config.vocab_size, config.hidden_size
        )  # given, so that nothing draws random numbers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.embed_tokens.requires_grad_(False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Online transforms of the residual stream: after the embedding, and before the last norm.
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()


class Llama(nn.Module):
    """A decoder with its config, tokenizer and name. ``labkit.models.load`` makes one.

    The pass, for those who need it a layer at a time (calibration does)::

        x, rotary, cache = model.begin(tokens)
        for block in model.blocks:
            x = block(x, rotary, cache)
        logits = model.end(x)
    """

    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None, name: str = "") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.seed: int | None = None  # of the factors that ``off_grid`` folded in; None where it was not
        self.made: Made | None = None  # how ``quantize`` made it; None for a model as it was loaded
        self._tokenizer = tokenizer
        self.model = Body(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inverse_frequencies", config.inverse_frequencies(), persistent=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError where the model came without one."""
        if self._tokenizer is None:
            raise ValueError(
                f"model {self.name!r} came without a tokenizer.json; put one beside its config.json"
            )
        return self._tokenizer

    @property
    def kv(self) -> KVSpec:
        """What keys and values are kept in. Assign it for all layers."""
        return self._attentions[0].kv

    @kv.setter
    def kv(self, kv: KVSpec) -> None:
        for attention in self._attentions:
            attention.kv = kv

    @property
    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def linears(self) -> dict[str, Linear]:
        """Every linear layer by its Hugging Face name, layer after layer, ``lm_head`` last."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, vocab) float32 for tokens (B, T) int64: [b, t] is about the token that follows t.

        Without a cache the tokens are whole texts; with one they continue what the cache holds.
        """
        x, rotary, cache = self.begin(tokens, cache)
        for block in self.blocks:
            x = block(x, rotary, cache)
        return self.end(x)

    def begin(
        self, tokens: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Cache]:
        """The residual stream (B, T, hidden) before the first layer, and what each layer needs beside it."""
        cache = WholeText(self.config, tokens) if cache is None else cache
        angles = cache.positions[:, None, :, None] * self.inverse_frequencies  # (B, 1, T, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        rotary = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (B, 1, T, head_dim)
        return self.model.enter(self.model.embed_tokens(tokens)), rotary, cache

    def end(self, x: Tensor) -> Tensor:
        """Logits (B, T, vocab) float32 from the residual stream (B, T, hidden) after the last layer."""
        return self.lm_head(self.final(x)).float()

    def final(self, x: Tensor) -> Tensor:
        """What the head reads, (B, T, hidden), from the residual stream (B, T, hidden) after the last layer."""
        return self.model.norm(self.model.leave(x))


def _linear(inputs: int, outputs: int, bias: bool) -> Linear:
    return Linear(torch.empty(outputs, inputs), torch.empty(outputs) if bias else None)
