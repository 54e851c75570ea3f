"""A step by our own kernel against the model's own pass: every part of a Llama, ragged batches, windows, hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from labkit import models
from labkit.models.config import ModelConfig
from labkit.models.kv import KVSpec
from labkit.models.llama import Llama
from labkit.models.rotate import Rotation
from labkit.quant import QuantSpec, encode, fit, quantile
from labkit.serving import Engine, SamplingParams
from labkit.serving.engine import STRETCH
from labkit.serving.kv_cache import Batch, KVCache, Store
from labkit.serving.step import Step

PLAIN = ModelConfig(
    "llama", vocab_size=97, hidden_size=48, intermediate_size=80, layers=3, heads=6, kv_heads=2, head_dim=10,
    max_positions=64, tie_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "plain": PLAIN,
    "every bias": replace(PLAIN, qkv_bias=True, o_bias=True, mlp_bias=True),
    "normed queries and keys": replace(PLAIN, qk_norm=True),
    "windows": replace(PLAIN, windows=(4, None, 1)),
    "as many KV heads as heads": replace(PLAIN, kv_heads=6),
    "an untied head": replace(PLAIN, tie_embeddings=False),
}
SPECS = [
    *(None, "int4 g16 asym", "int8 channel", "int8 g16 asym", "int3 g8 asym", "nf4 g16", "table3 g16"),
    "int4 g16 asym, rounded",
]


def random_llama(config: ModelConfig, spec: str | None = None) -> Llama:
    generator = torch.Generator().manual_seed(1)
    llama = Llama(config, name="random")
    for name, tensor in llama.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.1 * values if "norm" in name else 0.3 * values)
    for name, linear in llama.linears().items():
        if spec is not None and name != "lm_head":
            weight, grid = linear.weight.detach(), QuantSpec.parse(spec.removesuffix(", rounded"))
            table = grid.format.startswith("table")
            linear.weight = quantile(weight, grid) if table else encode(weight, grid, fit(weight, grid))
            linear.input = QuantSpec.parse("int8 g8 narrow scale=fp32") if "rounded" in spec else None
    return llama


def filled(llama: Llama, lengths: list[int]) -> KVCache:
    """A cache in which sequence i has read the first ``lengths[i]`` tokens of its own random text."""
    cache = KVCache(llama.config, max_batch=len(lengths) + 1, max_len=40, kv=llama.kv)
    for i, length in enumerate(lengths):
        cache.add(i)
        llama(texts(llama, len(lengths))[i : i + 1, :length], cache.batch([i], length))
    return cache


def stepped(step: Step, new: Tensor, batch: Batch) -> Tensor:
    """Logits (B, vocab) about what follows ``new`` (B, T); the likeliest ids are theirs."""
    found = step(new.tolist(), batch)
    logits = torch.stack([row for row, _ in found])
    assert [id for _, id in found] == [int(row.argmax()) if row.isfinite().all() else None for row in logits]
    return logits


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def contents(store: Store) -> Tensor:
    """The numbers that all pages of all layers stand for: (layers, 1, kv_heads, pages * PANEL, head_dim)."""
    layers, _, pages = store.codes.shape[:3]
    return torch.stack([store.read(layer, torch.arange(pages)[None], torch.float32) for layer in range(layers)])


def same_cache(ours: KVCache, theirs: KVCache, near: float) -> None:
    for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        torch.testing.assert_close(contents(mine), contents(other), rtol=near, atol=near)


def texts(llama: Llama, count: int) -> Tensor:
    return torch.randint(llama.config.vocab_size, (count, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("config", CONFIGS)
@torch.inference_mode()
def test_equals_the_models_own_pass(config: str, spec: str | None, threads: int) -> None:
    llama = random_llama(CONFIGS[config], spec)
    # Where numbers are rounded on the way, the last bit of one decides now and then about a whole step of it.
    near = 0.03 if "rounded" in str(spec) else 1e-4
    for lengths in ([1], [5, 5], [3, 17, 1, 9, 2, 30, 4, 8, 11]):
        ids, text = list(range(len(lengths))), texts(llama, len(lengths))
        plain, native = filled(llama, lengths), filled(llama, lengths)
        step = Step(llama, native)
        for more in range(3):
            new = torch.stack([text[i, length + more] for i, length in enumerate(lengths)])
            wanted = llama(new[:, None], plain.batch(ids, 1))[:, 0]
            found = stepped(step, new[:, None], native.batch(ids, 1))
            torch.testing.assert_close(found, wanted, rtol=near, atol=near * float(wanted.abs().max()))
        same_cache(native, plain, near)


WAYS = [  # of q, k and v, and of gate and up: spec, input, seed of act-order
    [("int4 g16 asym", "g8", 0), ("int4 g16 asym", None, 0), ("int4 g16 asym", "g16", 0)],
    [("int4 g16 asym", None, 1), ("int4 g16 asym", None, 2), ("int4 g16 asym", None, 0)],
    [("int4 g16", "g8", 0), ("int8 g16", "g8", 0), ("int8 g16 asym", "g8", 0)],
    [("int4 g16 asym", "g8", 0), ("int4 g8 asym", "g8", 0), ("int3 g16", "g8", 0)],
    [("int4 g16 asym", None, 0), ("int4 g8 asym", None, 0), ("int4 g16", None, 0)],
    [("nf4 g16", None, 0), (None, None, 0), ("int4 g16 asym", "g8", 1)],
]


@pytest.mark.parametrize("ways", WAYS)
@torch.inference_mode()
def test_neighbours_that_want_their_input_each_in_its_own_way(ways: list[tuple[str | None, str | None, int]]) -> None:
    llama = random_llama(PLAIN)
    for block in llama.blocks:
        attention, mlp = block.self_attn, block.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        for linear, (spec, input, seed) in zip(linears, [*ways, *ways[:2]], strict=True):
            if spec is None:
                continue
            weight, grid, columns = linear.weight.detach(), QuantSpec.parse(spec), torch.arange(linear.in_features)
            found = encode(weight, grid, fit(weight, grid))
            if seed:
                order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
                found = replace(found, g_idx=(columns.int() // 16)[order])
            linear.weight = found
            linear.input = QuantSpec.parse(f"int8 {input} narrow scale=fp32") if input else None
    plain, native = filled(llama, [9, 4]), filled(llama, [9, 4])
    for new in ([[7], [8]], [[3], [2]]):
        wanted = llama(torch.tensor(new), plain.batch([0, 1], 1))[:, 0]
        found = stepped(Step(llama, native), torch.tensor(new), native.batch([0, 1], 1))
        assert (found - wanted).norm() < (0.01 if any(input for _, input, _ in ways) else 1e-5) * wanted.norm()


@torch.inference_mode()
def test_scores_beyond_what_an_exponential_can_hold() -> None:
    llama = random_llama(PLAIN)
    for block in llama.blocks:
        block.self_attn.q_proj.weight *= 100
    plain, native = filled(llama, [9, 4]), filled(llama, [9, 4])
    new = torch.tensor([7, 8])
    wanted = llama(new[:, None], plain.batch([0, 1], 1))[:, 0]
    torch.testing.assert_close(
        stepped(Step(llama, native), new[:, None], native.batch([0, 1], 1)), wanted, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("heads", [(12, 1), (10, 2), (4, 4), (2, 2)])
@torch.inference_mode()
def test_as_many_queries_of_a_head_as_there_are(heads: tuple[int, int], threads: int) -> None:
    """Twelve queries that share a head of keys are three shares, five are two, and a stretch of a text has them too."""
    llama = random_llama(replace(PLAIN, heads=heads[0], kv_heads=heads[1], head_dim=16, windows=(None, 3, None)))
    plain, native = filled(llama, [2, 20, 31]), filled(llama, [2, 20, 31])
    for tokens in (1, 3):
        new = texts(llama, 3)[:, :tokens]
        wanted = llama(new, plain.batch([0, 1, 2], tokens))[:, -1]
        found = stepped(Step(llama, native), new, native.batch([0, 1, 2], tokens))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("threads", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("kv", [KVSpec(), KVSpec("int8 channel", "int4 g16 asym")], ids=str)
@torch.inference_mode()
def test_a_long_text_is_seen_in_pieces(kv: KVSpec, threads: int) -> None:
    """Three heads of keys are no multiple of most numbers of threads, which then share out the text itself."""
    shape = {"heads": 6, "kv_heads": 3, "head_dim": 32, "windows": (None, 150, 3), "max_positions": 1000}
    llama = random_llama(replace(PLAIN, **shape))
    llama.kv, near = kv, 1e-4 if kv == KVSpec() else 0.03
    cache = KVCache(llama.config, max_batch=1, max_len=900, kv=kv)
    step, text = Step(llama, cache), torch.randint(97, (1, 900), generator=torch.Generator().manual_seed(1))
    for length in (129, 300, 637):
        cache.add(0)
        stepped(step, text[:, : length - 1], cache.batch([0], length - 1))
        found = stepped(step, text[:, length - 1 : length], cache.batch([0], 1))
        wanted = llama(text[:, :length])[:, -1]
        assert (found - wanted).norm() < near * wanted.norm(), length
        cache.remove(0)


FORMATS = {  # and how near: where a number is rounded on the way, a last bit decides now and then about a step of it
    KVSpec("fp32", "fp16"): 1e-3,
    KVSpec("fp16", "fp16"): 1e-3,
    KVSpec("bf16", "bf16"): 1e-2,
    KVSpec("int8 channel", "int8 channel"): 1e-2,
    KVSpec("int8 g32 asym scale=fp32", "int4 g32"): 0.03,
    KVSpec("int4 g32 asym", "fp32"): 0.03,
    KVSpec("int6 g7 narrow scale=bf16", "int3 g16 asym"): 0.03,
}


@pytest.mark.parametrize("head_dim", [2, 10, 80])
@pytest.mark.parametrize("kv", FORMATS, ids=str)
@torch.inference_mode()
def test_keys_and_values_in_every_format(kv: KVSpec, head_dim: int) -> None:
    """Several texts, stretches of one, windows, pages used again: as the model's pass, with and without a cache."""
    llama = random_llama(replace(PLAIN, head_dim=head_dim, windows=(None, 5, None)))
    llama.kv, near = kv, FORMATS[kv]
    lengths, ids = [3, 17, 1, 30], [0, 1, 2, 3]
    text = texts(llama, 4)
    plain, native = filled(llama, lengths), filled(llama, lengths)
    step = Step(llama, native)

    def check(ids: list[int], tokens: int) -> None:
        new = torch.stack([text[i, plain.length(i) : plain.length(i) + tokens] for i in ids])
        wanted = llama(new, plain.batch(ids, tokens))[:, -1]
        found = stepped(step, new, native.batch(ids, tokens))
        whole = torch.cat([llama(text[i : i + 1, : plain.length(i)])[:, -1] for i in ids])
        for expected in (wanted, whole):
            assert (found - expected).norm() < near * expected.norm()

    check(ids, 1), check([3, 0], 1), check([1], 18), check([2, 0], 2)
    for cache in (plain, native):  # the next text gets pages that others have left, in another order
        cache.remove(3), cache.remove(1)
        cache.add(3)
    check([3], 33), check([2, 3, 0], 1)
    for ours, theirs in ((native.keys, plain.keys), (native.values, plain.values)):
        off = (contents(ours) - contents(theirs)).norm() / contents(theirs).norm()
        assert off < near, off


EXACT = [
    "fp16", "bf16", "int8 channel", "int8 g32 scale=fp32", "int8 g5 narrow scale=bf16", "int8 g32 asym",
    "int8 channel asym scale=fp32", "int4 g32", "int4 channel asym scale=bf16", "int4 g7 asym", "int4 g1 asym",
    "int5 g16", "int2 g3 narrow scale=fp32",
]  # fmt: skip


@pytest.mark.parametrize("text", EXACT)
@torch.inference_mode()
def test_a_token_is_rounded_to_the_very_codes_and_scales_of_quant(text: str) -> None:
    """Projections of zeros with a bias: at position 0, which turns nothing, keys and values are the very bias."""
    llama = random_llama(replace(PLAIN, qkv_bias=True, heads=8, kv_heads=8, head_dim=46, layers=6, windows=()))
    llama.kv = KVSpec(text, text)
    generator = torch.Generator().manual_seed(3)
    biases = []
    for i, block in enumerate(llama.blocks):
        for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
            x = torch.randn(8, 46, generator=generator) * 10.0 ** (3 - 2 * i)  # (heads, head_dim)
            x[0], x[1], x[2] = 0, 0.3, -0.7  # blocks of one number have rules of their own
            x[3], x[4, ::2] = x[3].abs(), 0
            x[5] = x[5].round(decimals=1)
            linear.weight, linear.bias = torch.zeros_like(linear.weight), nn.Parameter(x.flatten(), requires_grad=False)
            biases.append(x)
    cache = KVCache(llama.config, max_batch=1, max_len=16, kv=llama.kv)
    cache.add(0)
    stepped(Step(llama, cache), torch.tensor([[5]]), cache.batch([0], 1))
    for i, x in enumerate(biases):
        store = (cache.keys, cache.values)[i % 2]
        other = KVCache(llama.config, max_batch=1, max_len=16, kv=llama.kv).keys
        other.write(0, torch.tensor([[0]]), torch.tensor([[0]]), x[None, None])
        for ours, theirs in zip(store.parts, other.parts, strict=True):
            assert torch.equal(ours[i // 2, :, 0], theirs[0, :, 0]), (i, ours.dtype)
        torch.testing.assert_close(contents(store)[i // 2, 0, :, 0], llama.kv.round(x, x)[0], rtol=0, atol=0)


@torch.inference_mode()
def test_what_is_no_number_stays_with_its_request() -> None:
    """Not with another of the same step, and not with the next that gets its pages."""
    for kv in (KVSpec(), KVSpec("fp16", "bf16"), KVSpec("int8 channel", "int4 g16 asym")):
        llama = random_llama(replace(PLAIN, tie_embeddings=False))
        llama.kv = kv
        plain, native = filled(llama, [9, 4]), filled(llama, [9, 4])
        llama.model.embed_tokens.weight[11] = float("nan")
        step, new = Step(llama, native), torch.tensor([[11], [8]])
        found = stepped(step, new, native.batch([0, 1], 1))
        wanted = llama(new[1:], plain.batch([1], 1))[:, -1]
        assert found[0].isnan().all()
        assert (found[1] - wanted[0]).norm() < 0.03 * wanted.norm()
        native.remove(0)
        native.add(2)
        text = texts(llama, 1)[:, :3] % 11
        found = stepped(step, text, native.batch([2], 3))
        wanted = llama(text)[:, -1]
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("spec", [None, "int4 g16 asym"])
@pytest.mark.parametrize("config", ["plain", "windows", "normed queries and keys"])
@torch.inference_mode()
def test_stretches_of_a_text_equal_one_pass_over_it(config: str, spec: str | None) -> None:
    llama = random_llama(CONFIGS[config], spec)
    plain, native = filled(llama, [3, 5]), filled(llama, [3, 5])
    text = texts(llama, 1)
    wanted = llama(text[:, 5:38], plain.batch([1], 33))[:, -1]
    step = Step(llama, native)
    for start, end in ((5, 6), (6, 15), (15, 38)):
        found = stepped(step, text[:, start:end], native.batch([1], end - start))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    same_cache(native, plain, 1e-4)
    both = text[:, :4].view(2, 2)  # two tokens of each of two sequences
    wanted = llama(both, plain.batch([0, 1], 2))[:, -1]
    found = stepped(step, both, native.batch([0, 1], 2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_long_prompt_is_read_in_stretches_and_no_further_once_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.quantize(models.load("tiny"), "w4a16-rtn-g64")
    prompt = "It was the whale that we had seen before. " * 60
    params, tokens = SamplingParams(max_tokens=8, ignore_eos=True), len(tiny.tokenizer.encode(prompt))
    read: list[int] = []
    submitted, cancelled = threading.Event(), []
    whole = Step.__call__

    def watched(self: Step, tokens: list[list[int]], batch: Batch) -> list[tuple[Tensor, int | None]]:
        read.append(len(tokens[0]))
        submitted.wait(20)
        for stream in cancelled:
            stream.cancel()
        return whole(self, tokens, batch)

    monkeypatch.setattr(Step, "__call__", watched)
    with Engine(tiny) as engine, Engine(tiny, native=False) as plain:
        submitted.set()
        assert engine.generate([prompt], params)[0].text == plain.generate([prompt], params)[0].text
        assert tokens > 2 * STRETCH and max(read) == STRETCH and sum(read) == tokens + 7
        read.clear(), submitted.clear()
        cancelled.append(engine.submit(prompt, params))
        submitted.set()
        assert cancelled[0].result(20).finish_reason == "cancelled" and read == [STRETCH]


@torch.inference_mode()
def test_one_row_of_many_is_stepped_alone() -> None:
    llama = random_llama(PLAIN)
    plain, native = filled(llama, [4, 6, 5]), filled(llama, [4, 6, 5])
    new = torch.tensor([7])
    wanted = llama(new[:, None], plain.batch([1], 1))[:, 0]
    torch.testing.assert_close(
        stepped(Step(llama, native), new[:, None], native.batch([1], 1)), wanted, rtol=1e-4, atol=1e-3
    )
    same_cache(native, plain, 1e-4)


def same_text(llama: Llama, prompts: list[str], tokens: int) -> None:
    """With the step and without it."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with Engine(llama) as engine, Engine(llama, native=False) as plain:
        assert [c.text for c in engine.generate(prompts, params)] == [
            c.text for c in plain.generate(prompts, params)
        ]


def test_act_order_and_a_whole_recipe() -> None:
    tiny = models.quantize(models.load("tiny"), "w3a16-gptq-g64-actorder")
    assert Step.why_not(tiny) is None
    same_text(tiny, ["Call me", "The whale", "It was"], 24)


@pytest.mark.parametrize("spec", [None, "int4 g16 asym", "int4 g16 asym, rounded"])
@pytest.mark.parametrize("sizes", [(48, 80), (64, 256), (72, 176), (36, 42), (50, 1536)])  # two in blocks
@torch.inference_mode()
def test_online_transforms(sizes: tuple[int, int], spec: str | None) -> None:
    hidden, inner = sizes
    llama = random_llama(replace(PLAIN, hidden_size=hidden, intermediate_size=inner), spec)
    near, generator = 0.03 if "rounded" in str(spec) else 1e-4, torch.Generator().manual_seed(3)

    def signs(size: int) -> Tensor:
        return (torch.randint(2, (size,), generator=generator) * 2 - 1).to(torch.int8)

    llama.model.enter = Rotation(hidden, signs(hidden))
    llama.model.leave = Rotation(hidden, signs(hidden), inverse=True)
    llama.blocks[0].mlp.mix = Rotation(inner)
    llama.blocks[1].mlp.mix = Rotation(inner, signs(inner))
    llama.blocks[2].mlp.mix = Rotation(inner, signs(inner), inverse=True)
    for lengths, tokens in (([1], 1), ([9, 4, 1, 20, 3], 1), ([2, 7], 5)):
        ids, new = list(range(len(lengths))), texts(llama, len(lengths))[:, -tokens:]
        plain, native = filled(llama, lengths), filled(llama, lengths)
        wanted = llama(new, plain.batch(ids, tokens))[:, -1]
        found = stepped(Step(llama, native), new, native.batch(ids, tokens))
        torch.testing.assert_close(found, wanted, rtol=near, atol=near * float(wanted.abs().max()))


@pytest.mark.parametrize("input", [None, "int8 g32 narrow scale=fp32"])
def test_a_rotated_checkpoint_writes_the_same_text(input: str | None) -> None:
    tiny = models.quantize(models.load("tiny"), "w4a16-rotate-rtn-g64")
    for name, linear in tiny.linears().items():
        if name != "lm_head" and input is not None:
            linear.input = QuantSpec.parse(input)
    assert Step.why_not(tiny) is None
    same_text(tiny, ["Call me", "The whale", "It was the whale that we had seen before, and it was white."], 16)


def test_what_it_does_not_take_is_named() -> None:
    assert Step.why_not(random_llama(PLAIN)) is None
    with_mix = random_llama(PLAIN)
    with_mix.blocks[1].mlp.mix = nn.Tanh()
    assert Step.why_not(with_mix) == "of online transforms it knows Rotation, found Tanh"
    narrow = random_llama(PLAIN)
    narrow.kv = KVSpec("int4 g2", "int4 g2")
    assert Step.why_not(narrow) == "groups of values must be a multiple of 16, found 2"
    fp8 = random_llama(PLAIN, "fp8_e4m3 g16")
    assert str(Step.why_not(fp8)).startswith("model.layers.0.self_attn.q_proj: its fp8_e4m3")

    class Other(Llama):
        pass

    assert Step.why_not(Other(PLAIN)) == "Other may have a pass of its own"
    assert "float64" in str(Step.why_not(random_llama(PLAIN).double()))


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_the_likeliest_is_the_first_of_the_largest(threads: int) -> None:
    llama = random_llama(replace(PLAIN, vocab_size=3001, tie_embeddings=False))
    head = llama.lm_head.weight
    for equal in ((0, 3000), (3000,), (511, 512), (700, 1502, 2999), range(3001)):
        cache = filled(llama, [4])
        new = torch.tensor([[5]])
        best = head.data[int(llama(new, filled(llama, [4]).batch([0], 1))[0, -1].argmax())] * 2
        head.data[list(equal)] = best
        [(logits, likeliest)] = Step(llama, cache)([[5]], cache.batch([0], 1))
        assert likeliest == equal[0] == int(logits.argmax())
    for strange in (float("nan"), float("inf"), -float("inf")):
        for at in (0, 1500, 3000):
            bias = torch.zeros(3001)
            bias[at] = strange
            llama.lm_head.bias, cache = nn.Parameter(bias, requires_grad=False), filled(llama, [4])
            [(logits, likeliest)] = Step(llama, cache)([[5]], cache.batch([0], 1))
            assert likeliest is None and not logits[at].isfinite()


@torch.inference_mode()
def test_tokens_that_are_not_the_batches_are_refused() -> None:
    llama = random_llama(PLAIN)
    cache = filled(llama, [4, 4])
    step = Step(llama, cache)
    for new in ([[1]], [[1, 2], [3, 4]], [[1], [2, 3]]):
        with pytest.raises(ValueError, match="1 tokens for each of 2 texts"):
            step(new, cache.batch([0, 1], 1))
    with pytest.raises(ValueError, match="tokens for each"):
        step([[], []], cache.batch([0, 1], 0))
    for id in (-1, 97):
        with pytest.raises(IndexError, match=r"0\.\.96"):
            step([[1], [id]], cache.batch([0, 1], 1))
    with pytest.raises(ValueError, match="another"):
        step([[1], [2]], filled(llama, [4, 4]).batch([0, 1], 1))


def test_two_engines_at_once_do_not_disturb_each_other() -> None:
    tiny = models.quantize(models.load("tiny"), "w4a8-rtn-g32")
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, logprobs=2, ignore_eos=True)
    prompts = ["It was the whale", "Call me", "The sea"]
    with Engine(tiny) as one, Engine(tiny) as other:
        wanted = [one.generate([prompt], params)[0] for prompt in prompts]
        streams = [[engine.submit(prompt, params) for prompt in prompts] for engine in (one, other)]
        for engine in streams:
            for stream, alone in zip(engine, wanted, strict=True):
                assert stream.result(60).text == alone.text


def test_a_hook_is_called_as_ever() -> None:
    llama, seen = models.load("tiny"), []
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with Engine(llama) as engine:
        engine.generate(["Call me"], params)
        hook = llama.blocks[0].register_forward_hook(lambda *_: seen.append(None))
        engine.generate(["Call me"], params)
        hook.remove()
        assert len(seen) == 4  # the prompt and three steps
        engine.generate(["Call me"], params)
        assert len(seen) == 4
