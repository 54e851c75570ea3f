from __future__ import annotations

import random

import pytest
import torch

from labkit.models.config import ModelConfig
from labkit.models.kv import KVSpec
from labkit.models.memory import kv_bytes
from labkit.serving.kv_cache import PANEL, KVCache, panels

WINDOWS = (None, 5)
FORMATS = [
    KVSpec(),
    KVSpec("fp16", "bf16"),
    KVSpec("int8 channel", "fp16"),
    KVSpec("int8 g4 asym scale=fp32", "int4 channel"),
    KVSpec("int4 g4 asym", "int3 g5 narrow scale=bf16"),
]


def config(layers: int = 2, windows: tuple[int | None, ...] = WINDOWS, **other: int) -> ModelConfig:
    shape = {
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
    }
    return ModelConfig("mistral", layers=layers, windows=windows, **{**shape, **other})


class Referee:
    """What each request wrote, in plain lists; attention over it written out as its formula."""

    def __init__(self, cache: KVCache, kv: KVSpec = KVSpec()) -> None:  # noqa: B008
        self.cache, self.kv = cache, kv
        self.keys: dict[int, list[list[torch.Tensor]]] = {}
        self.values: dict[int, list[list[torch.Tensor]]] = {}

    def add(self, id: int) -> None:
        self.cache.add(id)
        self.keys[id], self.values[id] = [[], []], [[], []]

    def remove(self, id: int) -> None:
        self.cache.remove(id)
        del self.keys[id], self.values[id]

    def step(self, ids: list[int], tokens: int) -> None:
        """Append random keys and values, attend with random queries, and compare with the formula."""
        batch = self.cache.batch(ids, tokens)
        assert batch.ids == ids
        c = self.cache.config
        before = {id: len(self.keys[id][0]) for id in ids}
        expected = [[before[id] + t for t in range(tokens)] for id in batch.ids]
        assert batch.positions.tolist() == expected
        for layer, window in enumerate(WINDOWS):
            k, v = torch.randn(2, len(ids), c.kv_heads, tokens, c.head_dim)
            q = torch.randn(len(ids), c.kv_heads, tokens, c.head_dim)
            for row, id in enumerate(batch.ids):
                for t in range(tokens):  # by itself: a token's scales are its own
                    kept_k, kept_v = self.kv.round(k[row, :, t], v[row, :, t])  # (kv_heads, head_dim)
                    self.keys[id][layer].append(kept_k), self.values[id][layer].append(kept_v)
            keys, values, mask = batch.update(layer, k, v)
            got = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            for row, id in enumerate(batch.ids):
                for t in range(tokens):
                    last = before[id] + t
                    first = 0 if window is None else max(0, last - window + 1)
                    seen_k = torch.stack(self.keys[id][layer][first : last + 1])  # (S, kv_heads, head_dim)
                    seen_v = torch.stack(self.values[id][layer][first : last + 1])
                    scores = torch.einsum("hd,shd->hs", q[row, :, t], seen_k) / c.head_dim**0.5
                    want = torch.einsum("hs,shd->hd", scores.softmax(-1), seen_v)
                    torch.testing.assert_close(got[row, :, t], want, atol=1e-5, rtol=1e-5)


def test_requests_of_different_lengths_see_their_own_past_and_nothing_else():
    torch.manual_seed(0)
    referee = Referee(KVCache(config(), max_batch=3, max_len=20))
    for id, tokens in [(7, 9), (3, 1), (5, 4)]:
        referee.add(id)
        referee.step([id], tokens)
    for _ in range(6):
        referee.step([3, 5, 7], 1)
    assert [referee.cache.length(id) for id in (7, 3, 5)] == [15, 7, 10]
    assert referee.cache.tokens == 32


@pytest.mark.parametrize("kv", FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_joining_growing_and_leaving_in_any_order(seed: int, kv: KVSpec):
    """A pool of 8 pages for 4 requests of up to 3: what is left over is taken again, and too little changes nothing."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    cache = KVCache(config(head_dim=10), max_batch=4, max_len=40, kv=kv, pages=8)
    referee, lengths = Referee(cache, kv), dict[int, int]()
    seen, most, refused, id = set[int](), 0, 0, 0
    for _ in range(60):
        if lengths and rng.random() < 0.25:
            gone = rng.choice(list(lengths))
            referee.remove(gone)
            del lengths[gone]
        if len(lengths) < 4 and rng.random() < 0.5:
            referee.add(id)
            lengths[id], id = 0, id + 1
        tokens = rng.choice([1, 1, 2, 15, 16, 17])
        able = [i for i, length in lengths.items() if length + tokens <= 40]
        if not able:
            continue
        some = rng.sample(able, rng.randint(1, len(able)))
        after = {i: length + tokens * (i in some) for i, length in lengths.items()}
        if sum(map(panels, after.values())) > 8:
            with pytest.raises(RuntimeError, match="more pages needed"):
                cache.batch(some, tokens)
            refused += 1
        else:
            referee.step(some, tokens)
            lengths = after
        assert {i: cache.length(i) for i in lengths} == lengths and cache.tokens == sum(lengths.values())
        held = [cache.batch([i], 0).pages[0][: panels(length)] for i, length in lengths.items() if length]
        pages = [page for table in held for page in table]
        assert len(pages) == len(set(pages)), "two requests share a page"
        seen, most = seen | set(pages), max(most, len(pages))
    assert refused and most == 8 and len(seen) == 8


def test_what_is_freed_is_taken_before_what_was_never_written():
    cache = KVCache(config(), max_batch=4, max_len=64)
    tables = []
    for id in range(9):
        cache.add(id)
        tables += cache.batch([id], 40).pages[0]
        if id % 2:
            cache.remove(id), cache.remove(id - 1)
    assert set(tables) == set(range(6))


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_it_says_how_many_bytes_a_position_takes(kv: KVSpec):
    for head_dim in (6, 10, 64):
        small = config(head_dim=head_dim)
        cache = KVCache(small, max_batch=3, max_len=20, kv=kv)
        assert cache.position_bytes == kv_bytes(small, 1, kv.bits(head_dim))
        assert cache.pages == 6 and cache.position_bytes * 6 * PANEL == cache.keys.nbytes + cache.values.nbytes
    wide = config(1, (None,), head_dim=64)
    sizes = {"fp32": 1024, "bf16": 512, "int8 channel": 264, "int4 g32": 144, "int4 g32 asym": 152}
    for name, expected in sizes.items():
        assert KVCache(wide, max_batch=1, max_len=16, kv=KVSpec(name, name)).position_bytes == expected


def test_in_fp16_what_fits_comes_back_as_it_was():
    torch.manual_seed(0)
    halves, floats = (
        KVCache(config(), max_batch=3, max_len=20, kv=kv) for kv in (KVSpec("fp16", "fp16"), KVSpec())
    )
    assert 2 * halves.keys.nbytes == floats.keys.nbytes and 2 * halves.values.nbytes == floats.values.nbytes
    for id in (0, 1):
        halves.add(id), floats.add(id)
    for ids, tokens in (([0], 4), ([1], 7), ([0, 1], 1), ([1], 3), ([0, 1], 2)):
        k, v = torch.randn(2, len(ids), 2, tokens, 6).half().float()
        found, wanted = (cache.batch(ids, tokens).update(0, k, v) for cache in (halves, floats))
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)


def test_rows_of_equal_length_need_no_mask():
    cache = KVCache(config(windows=(None, None)), max_batch=2, max_len=8)
    for id in (0, 1):
        cache.add(id)
    for tokens in (3, 1):
        batch = cache.batch([0, 1], tokens)
        k = torch.randn(2, 2, tokens, 6)
        keys, values, mask = batch.update(1, k, k)
    assert mask is None
    assert keys.shape == values.shape == (2, 2, 4, 6) and torch.equal(keys, values)


def test_what_is_no_number_stays_with_its_request_as_codes_too():
    kv = KVSpec("int8 channel", "int4 channel asym")
    cache = KVCache(config(windows=(None, None)), max_batch=2, max_len=8, kv=kv)
    for id in (0, 1):
        cache.add(id)
    x = torch.randn(2, 2, 3, 6)
    x[0, 1, 2, 4] = float("inf")
    for found, near in zip(cache.batch([0, 1], 3).update(1, x, x), (0.02, 0.3), strict=False):
        assert found[0, 1, 2].isnan().all() and found[0].isfinite().sum() == 2 * 3 * 6 - 6
        torch.testing.assert_close(found[1], x[1], rtol=0, atol=near)


def test_a_request_that_wrote_nan_leaves_nothing_behind():
    cache = KVCache(config(windows=(None, None)), max_batch=3, max_len=8)
    for id, tokens in [(0, 2), (1, 7), (2, 6)]:
        cache.add(id)
        batch = cache.batch([id], tokens)
        for layer in (0, 1):
            bad = torch.full((1, 2, tokens, 6), 1.0 if id == 0 else float("nan"))
            batch.update(layer, bad, bad)
    [mine] = cache.batch([0], 0).pages[0]
    cache.remove(1)
    cache.remove(2)
    for store in (cache.keys, cache.values):
        others = [page for page in range(cache.pages) if page != mine]
        assert store.codes[:, :, others].count_nonzero() == 0 and store.codes[:, :, mine].count_nonzero() > 0
    cache.add(3)
    cache.batch([3], 5).update(0, torch.ones(1, 2, 5, 6), torch.ones(1, 2, 5, 6))
    keys, values, mask = cache.batch([0, 3], 1).update(0, torch.ones(2, 2, 1, 6), torch.ones(2, 2, 1, 6))
    y = torch.nn.functional.scaled_dot_product_attention(
        torch.ones(2, 2, 1, 6), keys, values, attn_mask=mask
    )
    torch.testing.assert_close(y, torch.ones_like(y))


def test_memory_is_taken_as_it_is_used():
    """755 MB of room for SmolLM2; the system says how much of it is really there."""
    resident = _resident_bytes()
    wide = config(30, (None,) * 30, hidden_size=576, heads=9, kv_heads=3, head_dim=64)
    cache = KVCache(wide, max_batch=8, max_len=2048)
    assert cache.keys.nbytes + cache.values.nbytes == 30 * 8 * 3 * 2048 * 64 * 4 * 2
    assert _resident_bytes() - resident < 50e6


def _resident_bytes() -> int:
    resource = pytest.importorskip("resource")
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        pytest.skip("only Linux tells")


def test_errors_say_what_is_wrong():
    cache = KVCache(config(), max_batch=3, max_len=4)
    for id in range(3):
        cache.add(id)
    with pytest.raises(RuntimeError, match="all 3 places are taken"):
        cache.add(3)
    with pytest.raises(ValueError, match="request 1 is in the cache already"):
        cache.add(1)
    with pytest.raises(ValueError, match=r"one row of a batch, found \[0, 2, 0\]"):
        cache.batch([0, 2, 0], 1)
    cache.batch([1], 3)
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens do not fit into 4"):
        cache.batch([0, 1], 2)
    assert cache.length(1) == 3 and 1 in cache and 3 not in cache
    small = KVCache(config(), max_batch=2, max_len=32, pages=2)
    for id in range(2):
        small.add(id)
        small.batch([id], 16)
    with pytest.raises(RuntimeError, match="1 more pages needed, 0 of 2 free"):
        small.batch([0], 1)
    small.remove(1)
    assert small.batch([0], 1).positions.tolist() == [[16]]
