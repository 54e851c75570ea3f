"""The keys and values of every running request, in pages, so that a step computes only what is new.

A page holds ``PANEL`` tokens of one request. Which pages a request has stands in its block table; they may lie
anywhere in the pool, so nothing is ever moved, and what a request leaves the next one takes (Kwon et al. 2023,
PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from labkit.models.config import ModelConfig
from labkit.models.kv import KVSpec, format_of
from labkit.models.llama import visible
from labkit.quant import Blocks, QuantizedTensor, QuantSpec, encode, fit, formats

PANEL = 16  # tokens of a page; our own kernel computes with all of them at once


def panels(length: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // PANEL)


class Store:
    """The keys, or the values, of all pages in one format: a dtype, or a grid whose codes are kept.

    codes   (layers, kv_heads, pages, rows, PANEL): row i has number i of the page's tokens. Codes are bytes, counted
            from the lowest; of up to 4 bits, row i has number 2i in its lower half and number 2i + 1 in its upper
    scale   (layers, kv_heads, pages, groups, PANEL), or None
    zero    the same of uint8, or None
    stride  0: a page lies in memory number by number. Else token by token, so many numbers from one to the next
    """

    def __init__(
        self, config: ModelConfig, pages: int, format: torch.dtype | QuantSpec, *, by_token: bool
    ) -> None:
        self.format, self.size = format, config.head_dim
        self.stride = panels(self.size) * PANEL if by_token else 0
        shape = config.layers, config.kv_heads, pages
        self.scale = self.zero = None
        dtype, shared = (format, 1) if isinstance(format, torch.dtype) else (torch.uint8, 1 if format.bits > 4 else 2)
        rows = self.size // shared  # a head has an even number, for its rotation
        if by_token:
            self.codes = _zeros((*shape, PANEL, self.stride // shared), dtype)[..., :rows].transpose(-1, -2)
        else:
            self.codes = _zeros((*shape, rows, PANEL), dtype)
        if isinstance(format, torch.dtype):
            return
        assert isinstance(format.scale, str)
        groups = Blocks((1, self.size), format.block).grid[1]
        self.scale = _zeros((*shape, groups, PANEL), formats.SCALE_DTYPES[format.scale])
        if format.zero != "none":
            self.zero = _zeros((*shape, groups, PANEL), torch.uint8)

    @property
    def parts(self) -> list[Tensor]:
        return [part for part in (self.codes, self.scale, self.zero) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def write(self, layer: int, pages: Tensor, lanes: Tensor, x: Tensor) -> None:
        """Keep x (B, T, kv_heads, head_dim) at these pages and places in them, both (B, T)."""
        for part, kept in zip(self.parts, self._kept(x), strict=True):
            part[layer][:, pages, :, lanes] = kept

    def read(self, layer: int, table: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, kv_heads, P * PANEL, head_dim): what the pages in ``table`` (B, P) hold."""
        # A page is copied as it lies, which is fast, and its tokens become rows afterwards.
        found = [part[layer][:, table] for part in self.parts]  # (kv_heads, B, P, rows, PANEL)
        rows = [part.permute(1, 0, 2, 4, 3).flatten(2, 3) for part in found]  # (B, kv_heads, P * PANEL, rows)
        if isinstance(self.format, torch.dtype):
            return rows[0].to(dtype)
        spec, (codes, *groups) = self.format, rows
        if spec.bits <= 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        if spec.zero == "none":
            codes = (codes.short() + spec.code_range[0]).char()
        scale, *zero = (part.flatten(0, 2) for part in groups)  # (B * kv_heads * P * PANEL, groups)
        return QuantizedTensor(codes, scale, spec, zero[0] if zero else None).dequantize(dtype)

    def clear(self, pages: list[int]) -> None:
        for part in self.parts:
            part[:, :, pages] = 0

    def _kept(self, x: Tensor) -> list[Tensor]:
        """The parts of x (..., head_dim): (..., rows), and (..., groups) of scales and zero points."""
        spec = self.format
        if isinstance(spec, torch.dtype):
            return [x.to(spec)]
        # What is no number stays with its token: others of the same step must not fail for it.
        whole = x.isfinite().all(dim=-1, keepdim=True)  # (..., 1)
        x = torch.where(whole, x, 0)
        found = encode(x, spec, fit(x, spec))
        codes = (found.codes.short() - spec.code_range[0]).byte()
        if spec.bits <= 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        assert isinstance(found.scale, Tensor)
        scale = found.scale.view(*x.shape[:-1], -1).masked_fill(~whole, torch.nan)
        return [codes, scale, *([] if found.zero is None else [found.zero.view(scale.shape)])]


class KVCache:
    """Keys and values of up to ``max_batch`` requests of up to ``max_len`` tokens each.

    A request is known by its id: ``add`` lets it in, ``batch`` gives it the pages it needs and makes what the model is
    called with to append tokens, ``remove`` frees them. Memory is taken when a page is first written, not before.

    kv     what they are kept in: the model's own
    pages  of the pool, which all requests share; as many as they can need together, unless it is said
    """

    def __init__(
        self, config: ModelConfig, *, max_batch: int, max_len: int, kv: KVSpec | None = None, pages: int | None = None
    ) -> None:
        self.config, self.max_batch, self.max_len = config, max_batch, max_len
        self.pages, kv = max_batch * panels(max_len) if pages is None else pages, kv or KVSpec()
        self.keys = Store(config, self.pages, format_of(kv.key), by_token=False)
        self.values = Store(config, self.pages, format_of(kv.value), by_token=True)
        self._free = list(reversed(range(self.pages)))  # the last is taken next: what was freed, before what is new
        self._tables: dict[int, list[int]] = {}  # by request: its pages in order
        self._lengths: dict[int, int] = {}  # by request: positions that are taken

    def __len__(self) -> int:
        """How many requests are in the cache."""
        return len(self._tables)

    def __contains__(self, id: int) -> bool:
        return id in self._tables

    @property
    def tokens(self) -> int:
        """How many positions are taken, over all requests."""
        return sum(self._lengths.values())

    @property
    def position_bytes(self) -> float:
        """Bytes of one position: its keys and values in all layers, with their scales and zero points."""
        return (self.keys.nbytes + self.values.nbytes) / (self.pages * PANEL)

    def length(self, id: int) -> int:
        """How many tokens of this request are in the cache."""
        return self._lengths[id]

    def add(self, id: int) -> None:
        """Let a request in, without tokens. Raises RuntimeError for one too many, ValueError for one that is in."""
        if id in self._tables:
            raise ValueError(f"request {id} is in the cache already")
        if len(self._tables) == self.max_batch:
            raise RuntimeError(f"all {self.max_batch} places are taken; remove a request first")
        self._tables[id], self._lengths[id] = [], 0

    def remove(self, id: int) -> None:
        """Free a request's pages. Nothing of the request stays in memory."""
        pages = self._tables.pop(id)
        del self._lengths[id]
        # Zeros, because a masked position still takes part in the sum as 0 * value, and 0 * NaN is NaN.
        for store in (self.keys, self.values):
            store.clear(pages)
        self._free += reversed(pages)

    def batch(self, ids: Sequence[int], tokens: int) -> Batch:
        """Append ``tokens`` positions to each of these requests: what the model is called with next.

        The batch has them in the order of ``ids``. Raises ValueError where one is named twice or ``max_len`` would be
        exceeded, RuntimeError where too few pages are free; the cache is then as it was.
        """
        starts = [self._lengths[id] for id in ids]
        if len(set(ids)) != len(ids):
            raise ValueError(f"a request has one row of a batch, found {list(ids)}")
        if max(starts) + tokens > self.max_len:
            raise ValueError(f"{max(starts)} + {tokens} tokens do not fit into {self.max_len} positions")
        wanted = [panels(start + tokens) - len(self._tables[id]) for id, start in zip(ids, starts, strict=True)]
        if (needed := sum(wanted)) > (free := len(self._free)):
            raise RuntimeError(f"{needed} more pages needed, {free} of {self.pages} free; remove a request first")
        for id, start, count in zip(ids, starts, wanted, strict=True):
            self._tables[id] += (self._free.pop() for _ in range(count))
            self._lengths[id] = start + tokens
        return Batch(self, list(ids), [self._tables[id] for id in ids], starts, tokens)


class Batch:
    """One forward pass over some requests; the ``Cache`` that the model asks for.

    cache   whose batch it is
    ids     the requests, in the order of the pass's rows
    starts  how many tokens each of them has already
    tokens  how many each of them gets
    pages   B lists of P: the pages of each, in order; what one has fewer is filled up with its first
    """

    rounds = True

    def __init__(self, cache: KVCache, ids: list[int], tables: list[list[int]], starts: list[int], tokens: int) -> None:
        self.ids, self.starts, self.tokens = ids, starts, tokens
        self.cache, self._seen = cache, max(starts) + tokens
        width = panels(self._seen)
        self.pages = [pages + pages[:1] * (width - len(pages)) for pages in tables]

    # What follows is for the model's own pass: a step of our own kernel needs no tensors.

    @cached_property
    def positions(self) -> Tensor:
        """(B, T) int64, of the new tokens."""
        return torch.tensor([range(start, start + self.tokens) for start in self.starts], dtype=torch.int64)

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.pages)  # (B, P)

    @cached_property
    def _written(self) -> Tensor:
        return self._table.gather(1, self.positions // PANEL)  # (B, T)

    @cached_property
    def _masks(self) -> list[Tensor | None]:
        windows = self.cache.config.windows
        masks = {window: self._mask(window, self._seen) for window in set(windows)}
        return [masks[window] for window in windows]

    def _mask(self, window: int | None, seen: int) -> Tensor | None:
        """bool (B, 1, T, S). A row sees its own past; what lies behind it belongs to nobody."""
        whole = len(set(self.starts)) == 1 and self.tokens == 1  # all rows at the same place
        if whole and (window is None or seen <= window):
            return None
        return visible(self.positions, torch.arange(seen)[None], window)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a layer's new keys and values (B, kv_heads, T, head_dim) and give all so far, T become S."""
        whole = []
        for store, new in ((self.cache.keys, k), (self.cache.values, v)):
            store.write(layer, self._written, self.positions % PANEL, new.transpose(1, 2))
            whole.append(store.read(layer, self._table, new.dtype)[:, :, : self._seen])  # (B, kv_heads, S, head_dim)
        return whole[0], whole[1], self._masks[layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy's zeros are pages that the system hands out when they are first written; torch writes them all.
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
