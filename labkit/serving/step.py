"""New tokens of the running sequences, by one call that leaves Python once: ``native/step.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from labkit.kernels import best, build
from labkit.kernels.native_cpu import NativeCpu, settle
from labkit.models.kv import format_of
from labkit.models.llama import MLP, Block, Linear, Llama, RMSNorm
from labkit.models.rotate import Rotation
from labkit.quant import Blocks, QuantizedTensor, QuantSpec, hadamard, hadamard_block
from labkit.serving.kv_cache import PANEL, Batch, KVCache, Store

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_FORMATS = [torch.float32, torch.float16, torch.bfloat16]  # of native/pages.h; then bytes and half bytes


class _Turn(ctypes.Structure):
    _fields_ = [
        *((name, _LONG) for name in ("base", "power")),
        *((name, _POINTER) for name in ("matrix", "before", "after")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, build.Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("window", _LONG),
        ("mix", _Turn),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _LONG) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("eps", ctypes.c_float),
        *((name, _POINTER) for name in ("inverse_frequencies", "embedding", "norm", "layer")),
        ("head", build.Weight),
        *((name, _Turn) for name in ("enter", "leave")),
    ]


class _Kept(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("codes", "scale", "zero")),
        *((name, _LONG) for name in ("pages", "width", "stride")),
        *((name, ctypes.c_int32) for name in ("format", "scale_format", "lowest", "highest")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", _Kept),
        ("values", _Kept),
    ]


class Step:
    """A model and its cache, ready for steps. The same numbers as the model's own pass but for float32 rounding.

    Takes float32 weights, and quantized ones that ``kernels.prepare`` gives to our own kernel; of online transforms
    those of ``rotate``. The weights of ``model`` must stay as they are.

    reads  whether it is the faster way for many tokens of one text, too
    """

    @staticmethod
    def why_not(model: Llama) -> str | None:
        """What keeps this model from being stepped so, or None where nothing does."""
        if type(model) is not Llama:
            return f"{type(model).__name__} may have a pass of its own"
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                reason = _why_not(module)
                if reason is not None:
                    return f"{name}: {reason}"
        online = [
            model.model.enter,
            model.model.leave,
            *(m.mix for m in model.modules() if isinstance(m, MLP)),
        ]
        for module in online:
            if type(module) not in (nn.Identity, Rotation):
                return f"of online transforms it knows Rotation, found {type(module).__name__}"
        values, size = format_of(model.kv.value), model.config.head_dim
        width = Blocks((1, size), values.block).size[1] if isinstance(values, QuantSpec) else size
        if width % PANEL and width < size:
            return f"groups of values must be a multiple of {PANEL}, found {width}"
        if model.model.embed_tokens.weight.dtype != torch.float32:
            return f"it knows float32, found an embedding of {model.model.embed_tokens.weight.dtype}"
        return build.why_not()

    def __init__(self, model: Llama, cache: KVCache) -> None:
        config = model.config
        self._library = build.library()
        embedding = model.model.embed_tokens.weight
        self._known = len(embedding)
        self._hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._unhooked = self._asked = -1
        self._kept: list[object] = [model, cache]  # whose memory the structures below point into
        settle([linear.prepared for linear in model.linears().values() if not isinstance(linear.weight, Tensor)])
        layers = (_Layer * config.layers)(*(self._layer(model, i) for i in range(config.layers)))
        self._kept.append(layers)
        self._model = _Model(
            config.layers, config.hidden_size, config.heads, config.kv_heads, config.head_dim, config.intermediate_size,
            config.norm_eps, self._address(model.inverse_frequencies), self._address(embedding),
            self._address(model.model.norm.weight), ctypes.addressof(layers), self._weight(model.lm_head),
            self._turn(model.model.enter, config.hidden_size), self._turn(model.model.leave, config.hidden_size),
        )  # fmt: skip
        self._of, self._cache = cache, _Cache(_kept(cache.keys), _kept(cache.values))
        # Of float32 weights torch's own product is faster where rows are many.
        blocks = [module for module in model.blocks.modules() if isinstance(module, Linear)]
        self.reads = all(isinstance(linear.weight, QuantizedTensor) for linear in blocks)
        # Made once. Between two steps caches are full of weights, and whatever Python does takes several times as long.
        logits = torch.empty(cache.max_batch, model.lm_head.out_features)
        self._logits, self._at = list(logits), logits.data_ptr()
        self._likeliest = (_LONG * cache.max_batch)()

    def __call__(self, tokens: Sequence[Sequence[int]], batch: Batch) -> list[tuple[Tensor, int | None]]:
        """What follows the new tokens of each of the batch's requests, as many for each as the batch has room for.

        Logits (vocab,) float32, which the next call writes over, and the likeliest id: None where not all are finite.
        For one thread at a time. Raises ValueError for another cache's batch and for tokens that are not the batch's,
        IndexError for an id that the embedding has not.
        """
        rows = [id for new in tokens for id in new]
        if batch.cache is not self._of:
            raise ValueError("expected a batch of the cache that this step was made for, found one of another")
        if not rows or any(len(new) != batch.tokens for new in tokens) or len(tokens) != len(batch.ids):
            raise ValueError(f"expected {batch.tokens} tokens for each of {len(batch.ids)} texts, found {tokens}")
        if not 0 <= min(rows) <= max(rows) < self._known:
            raise IndexError(f"ids must lie in 0..{self._known - 1}, found {min(rows)}..{max(rows)}")
        count, pages = len(tokens), [page for pages in batch.pages for page in pages]
        self._library.labkit_step(
            ctypes.byref(self._model), ctypes.byref(self._cache), (ctypes.c_int32 * len(pages))(*pages),
            len(pages) // count, (_LONG * count)(*batch.starts), (_LONG * len(rows))(*rows), len(rows), count,
            self._at, self._likeliest, torch.get_num_threads(),
        )  # fmt: skip
        return [
            (logits, None if likeliest < 0 else likeliest)
            for logits, likeliest in zip(self._logits, self._likeliest[:count], strict=False)
        ]

    @property
    def hooked(self) -> bool:
        """Whether a hook waits on one of the model's modules. A step passes them by; the model's own pass calls it."""
        # Each hook that is registered anywhere takes the next number: hundreds of modules need not be asked each time.
        # They are asked twice for each number, since a hook gets its number just before it is there.
        made = RemovableHandle.next_id
        if made == self._unhooked:
            return False
        found = any(self._hooks)
        self._unhooked = made if not found and made == self._asked else -1
        self._asked = made
        return found

    def _layer(self, model: Llama, index: int) -> _Layer:
        block = model.blocks[index]
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        norms = [block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm]
        linears = [
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        ]  # fmt: skip
        return _Layer(
            *(self._address(norm.weight) if isinstance(norm, RMSNorm) else None for norm in norms),
            *(self._weight(linear) for linear in linears),
            model.config.windows[index] or 0,
            self._turn(mlp.mix, model.config.intermediate_size),
        )

    def _turn(self, module: nn.Module, size: int) -> _Turn:
        if not isinstance(module, Rotation):
            return _Turn()
        block = base = hadamard_block(size)
        while base % 2 == 0 and hadamard_block(base // 2) == base // 2:  # the rest is Sylvester's
            base //= 2
        matrix = hadamard(base) * block**-0.5
        signs = None if module.signs is None else self._address(module.signs)
        before, after = (None, signs) if module.inverse else (signs, None)
        return _Turn(base, block // base, self._address(matrix.T if module.inverse else matrix), before, after)

    def _address(self, tensor: Tensor) -> int:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _weight(self, linear: Linear) -> build.Weight:
        bias = None if linear.bias is None else self._address(linear.bias)
        if isinstance(linear.weight, Tensor):
            shape = (*linear.weight.shape, linear.in_features, linear.in_features, 0)
            return build.Weight(32, 0, 0, self._address(linear.weight), None, None, None, bias, None, *shape)
        assert isinstance(linear.prepared, NativeCpu)
        self._kept.append(linear.prepared)
        found = linear.prepared.native()
        found.bias = bias
        return found


def _kept(store: Store) -> _Kept:
    codes, pages, spec = store.codes.data_ptr(), store.codes.shape[2], store.format
    if isinstance(spec, torch.dtype):
        return _Kept(codes, None, None, pages, store.size, store.stride, _FORMATS.index(spec))
    assert store.scale is not None
    zero = None if store.zero is None else store.zero.data_ptr()
    width = Blocks((1, store.size), spec.block).size[1]
    format = len(_FORMATS) + (spec.bits <= 4)
    scale = _FORMATS.index(store.scale.dtype)
    return _Kept(codes, store.scale.data_ptr(), zero, pages, width, store.stride, format, scale, *spec.code_range)


def _why_not(linear: Linear) -> str | None:
    weight = linear.weight
    if isinstance(weight, Tensor):
        if linear.input is not None:
            return f"it rounds the input of quantized weights only, found {linear.input}"
        return None if weight.dtype == torch.float32 else f"it knows float32, found {weight.dtype}"
    taken = best(weight, linear.input)
    return None if taken == NativeCpu.backend else f"its {weight.spec} weight is multiplied by {taken}"
