"""The keys and values of every running request, so that a step computes only what is new.

One row per request, each of ``max_len`` positions. Rows 0 to n - 1 are in use: when a request leaves, the
last row moves into the hole, so that a step over all requests reads one block of memory and copies
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from labkit.models.config import ModelConfig
from labkit.models.kv import KVSpec
from labkit.models.llama import visible

PANEL = 16  # keys that lie beside each other, number by number: our own kernel multiplies all by a query at once


def panels(length: int) -> int:
    """How many hold so many positions."""
    return -(-length // PANEL)


class KVCache:
    """Keys and values of up to ``max_batch`` requests of up to ``max_len`` tokens each.

    A request is known by its id: ``add`` gives it a row, ``batch`` makes what the model is called with to
    append tokens, ``remove`` frees the row. Memory is taken when a position is first written, not before.

    kv      what they are kept in; it should be the model's own, whose pass rounds them to it
    keys    (layers, max_batch, kv_heads, panels, head_dim, PANEL): position p is keys[..., p // PANEL, :, p % PANEL]
    values  (layers, max_batch, kv_heads, max_len, head_dim)
    """

    def __init__(self, config: ModelConfig, *, max_batch: int, max_len: int, kv: KVSpec | None = None) -> None:
        self.config, self.max_batch, self.max_len = config, max_batch, max_len
        key, value = (kv or KVSpec()).dtypes
        rows = config.layers, max_batch, config.kv_heads
        self.keys = _zeros((*rows, panels(max_len), config.head_dim, PANEL), key)
        self.values = _zeros((*rows, max_len, config.head_dim), value)
        self._ids: list[int] = []  # by row
        self._lengths: list[int] = []  # by row: positions that are taken

    def __len__(self) -> int:
        """How many requests have a row."""
        return len(self._ids)

    def __contains__(self, id: int) -> bool:
        return id in self._ids

    @property
    def tokens(self) -> int:
        """How many positions are taken, over all requests."""
        return sum(self._lengths)

    def length(self, id: int) -> int:
        """How many tokens of this request are in the cache."""
        return self._lengths[self._ids.index(id)]

    def add(self, id: int) -> None:
        """Give a request an empty row. Raises RuntimeError when none is free."""
        if len(self._ids) == self.max_batch:
            raise RuntimeError(f"all {self.max_batch} rows are taken; remove a request first")
        self._ids.append(id)
        self._lengths.append(0)

    def remove(self, id: int) -> None:
        """Free a request's row; the last row takes its place. Nothing of the request stays in memory."""
        row, last = self._ids.index(id), len(self._ids) - 1
        length, kept = self._lengths[row], self._lengths[last]
        for store, used, moved in ((self.keys, panels(length), panels(kept)), (self.values, length, kept)):
            if row != last:
                store[:, row, :, :moved] = store[:, last, :, :moved]
            # Zeros, because a masked position still takes part in the sum as 0 * value, and 0 * NaN is NaN.
            store[:, row, :, moved if row != last else 0 : used] = 0
            store[:, last, :, :moved] = 0
        self._ids[row], self._lengths[row] = self._ids[last], kept
        self._ids.pop()
        self._lengths.pop()

    def batch(self, ids: Sequence[int], tokens: int) -> Batch:
        """Append ``tokens`` positions to each of these requests: what the model is called with next.

        The requests must stand in neighbouring rows (all there are, or one alone, always do); the batch
        has them in the order of its ``ids``. Raises ValueError otherwise, and where max_len would be
        exceeded.
        """
        rows = sorted(self._ids.index(id) for id in ids)
        first, stop = rows[0], rows[-1] + 1
        if rows != list(range(first, stop)):
            raise ValueError(f"requests of one batch must stand in neighbouring rows, found {rows}")
        starts = self._lengths[first:stop]
        if max(starts) + tokens > self.max_len:
            raise ValueError(f"{max(starts)} + {tokens} tokens do not fit into {self.max_len} positions")
        self._lengths[first:stop] = [start + tokens for start in starts]
        return Batch(self, first, self._ids[first:stop], starts, tokens)


class Batch:
    """One forward pass over some requests; the ``Cache`` that the model asks for.

    ids        the requests, in the order of the pass's rows
    slots      (B,) int64: the cache's row of each
    positions  (B, T) int64, of the new tokens
    """

    def __init__(self, cache: KVCache, first: int, ids: list[int], starts: list[int], tokens: int) -> None:
        self.ids = ids
        self.positions = torch.tensor(starts)[:, None] + torch.arange(tokens)  # (B, T)
        self.slots = torch.arange(first, first + len(ids))  # (B,)
        self._cache, self._seen = cache, max(starts) + tokens
        self._level = len(set(starts)) == 1  # all rows at the same place

    # What follows is for ``update``: a step of our own kernel needs none of it.

    @cached_property
    def _rows(self) -> slice:
        return slice(int(self.slots[0]), int(self.slots[-1]) + 1)

    @cached_property
    def _masks(self) -> list[Tensor | None]:
        windows = self._cache.config.windows
        masks = {window: self._mask(window, self._seen) for window in set(windows)}
        return [masks[window] for window in windows]

    def _mask(self, window: int | None, seen: int) -> Tensor | None:
        """bool (B, 1, T, S). A row sees its own past; what lies behind it belongs to nobody."""
        whole = self._level and self.positions.shape[1] == 1
        if whole and (window is None or seen <= window):
            return None
        return visible(self.positions, torch.arange(seen)[None], window)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a layer's new keys and values (B, kv_heads, T, head_dim) and give all so far, T become S."""
        keys = self._cache.keys[layer, self._rows, :, : panels(self._seen)]  # (B, kv_heads, panels, head_dim, PANEL)
        values = self._cache.values[layer, self._rows, :, : self._seen]  # (B, kv_heads, S, head_dim)
        rows, at = torch.arange(len(self.ids))[:, None], self.positions  # (B, 1), (B, T)
        keys[rows, :, at // PANEL, :, at % PANEL] = k.transpose(1, 2).to(keys.dtype)  # (B, T, kv_heads, head_dim)
        values[rows, :, at] = v.transpose(1, 2).to(values.dtype)
        whole = keys.transpose(-1, -2).flatten(2, 3)[:, :, : self._seen]  # (B, kv_heads, S, head_dim)
        return whole.to(k.dtype), values.to(v.dtype), self._masks[layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy's zeros are pages that the system hands out when they are first written; torch writes them all.
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
