from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import tokenizers
import torch

from labkit.models.config import ModelConfig
from labkit.models.llama import Llama
from labkit.models.tokenizer import Tokenizer
from labkit.serving.engine import Engine, EngineClosed, PromptTooLong
from labkit.serving.sampling import SamplingParams
from labkit.serving.stream import RequestFailed, StopFilter

VOCAB = 257  # every byte, and the token that ends a text
EOS = 256


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i: every character that is not ASCII is several tokens."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [
        b for b in range(256) if b in range(33, 127) or b in range(161, 173) or b in range(174, 256)
    ]
    by_byte = {b: chr(b) for b in printable}
    by_byte |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in by_byte)}
    assert set(by_byte.values()) == set(letters)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: b for b, letter in by_byte.items()}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_ids=[EOS], eos_token="<end>")


CONFIG = ModelConfig(
    "llama", VOCAB, hidden_size=48, intermediate_size=64, layers=2, heads=6, kv_heads=2, head_dim=8,
    max_positions=160, eos_ids=(EOS,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, large enough that what comes next depends on all that came before."""
    generator = torch.Generator().manual_seed(7)
    llama = Llama(CONFIG, byte_tokenizer(), "random")
    for name, tensor in llama.state_dict().items():
        random_values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.1 * random_values if "norm" in name else 0.3 * random_values)
    llama.lm_head.weight.data[EOS] = 0  # it never ends by itself
    return llama


class Scripted(Llama):
    """Says the same bytes whatever it is asked: after the prompt's first n tokens, ``script[n - 1:]``."""

    def __init__(self, script: bytes) -> None:
        super().__init__(CONFIG, byte_tokenizer(), "scripted")
        for tensor in self.state_dict().values():
            tensor.zero_()
        self.script = [*script, EOS]

    def begin(self, tokens, cache=None):
        self.positions = cache.positions
        return super().begin(tokens, cache)

    def end(self, x):
        logits = torch.zeros(*x.shape[:2], VOCAB)
        for row, position in enumerate(self.positions[:, -1].tolist()):
            logits[row, -1, self.script[min(position, len(self.script) - 1)]] = 9.0
        return logits


def next_ids(model: Llama, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from a whole pass without any cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            top = model(torch.tensor([ids]))[0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-4, (
                "a near-tie: choose another seed for the test's model"
            )
            ids.append(int(top.indices[0]))
    return ids[len(prompt) :]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3 + 5 * n % 31,), generator=generator).tolist() for n in range(count)]


def eventually(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def is_empty(engine: Engine) -> bool:
    return not (engine.running or engine.waiting or len(engine._cache) or engine._answers)


@contextmanager
def held(model: Llama, calls: int = 0, rows: int = 1) -> Iterator[tuple[threading.Event, threading.Event]]:
    """After ``calls`` passes over so many rows it waits in its last layer: (it has arrived, let it go on)."""
    arrived, go = threading.Event(), threading.Event()
    passes = 0

    def wait(_, args):
        nonlocal passes
        passes += args[0].shape[0] >= rows
        if passes > calls:
            arrived.set()
            assert go.wait(20)

    hook = model.blocks[-1].register_forward_pre_hook(wait)
    try:
        yield arrived, go
    finally:
        go.set()
        hook.remove()


# Which tokens


def test_greedy_is_what_whole_passes_without_a_cache_say(model: Llama):
    with Engine(model) as engine:
        for prompt in prompts(3):
            [completion] = engine.generate([prompt], SamplingParams(max_tokens=20))
            assert completion.token_ids == next_ids(model, prompt, 20)


def test_a_batch_of_different_lengths_gives_what_each_gives_alone(model: Llama):
    with Engine(model, max_batch=3) as engine:  # fewer places than requests: they leave and join
        lengths = [5, 21, 9, 2, 17, 30, 1]
        streams = [
            engine.submit(prompt, SamplingParams(max_tokens=n))
            for prompt, n in zip(prompts(7), lengths, strict=True)
        ]
        for stream, prompt, n in zip(streams, prompts(7), lengths, strict=True):
            completion = stream.result(60)
            assert completion.token_ids == next_ids(model, prompt, n)
            assert (completion.prompt_tokens, completion.completion_tokens) == (len(prompt), n)
            assert completion.finish_reason == "length"
        eventually(lambda: is_empty(engine))


def test_tiny_model_says_what_transformers_says():
    transformers = pytest.importorskip("transformers")
    from labkit.models import load

    tiny = load("tiny")
    c = tiny.config
    # Mistral without a window is Llama, and takes any number of heads.
    config = transformers.MistralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        max_position_embeddings=c.max_positions,
        sliding_window=None,
        tie_word_embeddings=c.tie_embeddings,
        eos_token_id=None,
    )
    peer = transformers.MistralForCausalLM(config).eval()
    peer.load_state_dict(tiny.state_dict())
    texts = ["Call me Ishmael.", "The whale", "It was a dark night, and the ship", "I"]
    ids = [tiny.tokenizer.encode(text) for text in texts]
    with Engine(tiny, max_batch=3) as engine:
        got = engine.generate(ids, SamplingParams(max_tokens=24, ignore_eos=True))
    for prompt, completion in zip(ids, got, strict=True):
        want = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert completion.token_ids == want[0, len(prompt) :].tolist()


def test_requests_join_a_batch_that_is_under_way(model: Llama):
    shapes: list[tuple[int, int]] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    try:
        with Engine(model) as engine, held(model, calls=2) as (arrived, go):
            first = engine.submit([1, 2, 3], SamplingParams(max_tokens=150))
            assert arrived.wait(20)
            second = engine.submit([4, 5, 6, 7, 8], SamplingParams(max_tokens=4))
            go.set()
            assert second.result(20).completion_tokens == 4
            first.cancel()
    finally:
        hook.remove()
    joined = shapes.index((1, 5))  # the second prompt is read,
    assert shapes[0] == (1, 3) and joined > 0
    assert shapes[joined + 1 : joined + 5] == [(1, 1), (2, 1), (2, 1), (2, 1)]  # and they go on together


# Randomness


def test_a_seed_decides_alone_whoever_else_is_in_the_batch(model: Llama):
    def params(seed: int | None) -> SamplingParams:
        return SamplingParams(max_tokens=25, temperature=1.0, top_p=0.95, seed=seed)

    with Engine(model, max_batch=4) as engine:
        alone = [engine.generate([[65, 66]], params(seed))[0].token_ids for seed in (1, 2)]
        others = [engine.submit(prompt, params(n)) for n, prompt in enumerate(prompts(3))]
        crowd = [engine.submit([65, 66], params(seed)) for seed in (2, 1, 2)]
        assert [stream.result(30).token_ids for stream in crowd] == [alone[1], alone[0], alone[1]]
        assert alone[0] != alone[1]
        del others
        unseeded = engine.generate([[65, 66]] * 2, params(None))
        assert unseeded[0].token_ids != unseeded[1].token_ids


# Text


TEXT = "naïve: ½ 🐙 漢字 é, end."


def test_a_stream_never_shows_half_a_character():
    script = TEXT.encode()
    with Engine(Scripted(script)) as engine:
        tokens = list(engine.submit([0]))
    assert [token.id for token in tokens] == [*script, EOS]
    assert "".join(token.text for token in tokens) == TEXT
    assert all("\ufffd" not in token.text for token in tokens)
    # A character comes with its last byte, not later.
    for count in range(len(script)):
        whole = script[: count + 1].decode(errors="ignore")
        assert "".join(token.text for token in tokens[: count + 1]) == whole


def test_a_text_cut_inside_a_character_says_so_at_its_end_only():
    with Engine(Scripted("a🐙".encode())) as engine:
        tokens = list(engine.submit([0], SamplingParams(max_tokens=3)))
    assert [token.text for token in tokens] == ["a", "", "\ufffd"]


def test_the_token_that_ends_a_text_is_counted_and_not_shown():
    with Engine(Scripted(b"ab")) as engine:
        [completion] = engine.generate([[0]], SamplingParams(max_tokens=9))
        assert (completion.text, completion.finish_reason, completion.completion_tokens) == (
            "ab",
            "stop",
            3,
        )
        [completion] = engine.generate([[0]], SamplingParams(max_tokens=9, ignore_eos=True))
        assert (completion.text, completion.finish_reason, completion.completion_tokens) == (
            "ab",
            "length",
            9,
        )


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("🐙",), "naïve: ½ ", 15),
        ((" 漢字 é",), "naïve: ½ 🐙", 25),
        (("e:", "ïve"), "na", 6),  # the earlier of two that overlap
        (("ve: ", "e:"), "naïv", 7),  # one that is complete, inside one that is not yet
        (("end.",), "naïve: ½ 🐙 漢字 é, ", 31),
        (("end.!", "nothing"), TEXT, 32),  # begins like a stop text and is none
        (("\ufffd",), TEXT, 32),
    ],
)
def test_stop_texts_across_tokens(stop: tuple[str, ...], text: str, tokens: int):
    with Engine(Scripted(TEXT.encode())) as engine:
        stream = list(engine.submit([0], SamplingParams(stop=stop, max_tokens=100)))
    shown = ""
    for token in stream:
        shown += token.text
        assert text.startswith(shown)  # nothing was shown that had to be taken back
    assert (shown, len(stream)) == (text, tokens)


def test_held_back_text_appears_when_the_tokens_run_out():
    with Engine(Scripted(TEXT.encode())) as engine:
        [completion] = engine.generate([[0]], SamplingParams(stop=("aïve!",), max_tokens=4))
    assert (completion.text, completion.finish_reason) == ("naï", "length")


@pytest.mark.parametrize("stop", [("ab",), ("aab", "b"), ("abab",), ("ba", "bb"), ("aaa", "ab")])
def test_stop_filter_equals_a_search_in_the_whole_text(stop: tuple[str, ...]):
    for n in range(2**7):
        text = "".join("ab"[n >> i & 1] for i in range(7))
        filter = StopFilter(stop)
        shown, stopped = "", False
        for letter in text:
            piece, stopped = filter.push(letter)
            shown += piece
            if stopped:
                break
        shown += filter.flush()
        ends = [i + len(s) for s in stop for i in range(7) if text.startswith(s, i)]
        if ends:  # the first that is complete ends it; of those, the one that begins first
            end = min(ends)
            assert stopped and shown == text[: end - max(len(s) for s in stop if text[:end].endswith(s))]
        else:
            assert not stopped and shown == text


def test_log_probabilities_belong_to_the_tokens(model: Llama):
    prompt = [72, 105, 33]
    with Engine(model) as engine:
        params = SamplingParams(max_tokens=6, temperature=1.3, seed=5, logprobs=3)
        [completion] = engine.generate([prompt], params)
        [plain] = engine.generate([prompt], SamplingParams(max_tokens=1))
        [none_beside] = engine.generate([prompt], SamplingParams(max_tokens=1, logprobs=0))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion.token_ids]))[0].double()
    for n, token in enumerate(completion.tokens):
        want = logits[len(prompt) - 1 + n].log_softmax(-1)
        assert token.logprob == pytest.approx(float(want[token.id]), abs=1e-4)
        assert [top.id for top in token.top_logprobs] == want.topk(3).indices.tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            want.topk(3).values.tolist(), abs=1e-4
        )
        assert token.top_logprobs[0].text == model.tokenizer.decode([token.top_logprobs[0].id])
        assert token.piece == model.tokenizer.decode([token.id])
    assert plain.tokens[0].logprob is None and plain.tokens[0].top_logprobs is None
    assert none_beside.tokens[0].top_logprobs == () and none_beside.tokens[0].logprob < 0


# Limits


def test_a_token_that_ends_a_text_is_not_shown_though_it_has_a_text():
    plain = Scripted(b"ab.cd")
    plain.tokenizer.eos_ids = (ord("."),)
    with Engine(plain) as engine:
        [completion] = engine.generate([[0]], SamplingParams(max_tokens=9))
    assert (completion.text, completion.finish_reason, completion.completion_tokens) == ("ab", "stop", 3)


def test_what_cannot_be_served_is_refused_at_once(model: Llama):
    with Engine(model, max_len=32) as engine:
        with pytest.raises(PromptTooLong, match="has 32 tokens, expected fewer than 32"):
            engine.submit([1] * 32)
        with pytest.raises(ValueError, match="empty"):
            engine.submit("")
        with pytest.raises(ValueError, match=r"must lie in 0\.\.256, found 5\.\.257"):
            engine.submit([5, 257])
        with pytest.raises(ValueError, match="found -1"):
            engine.submit([-1])
        assert is_empty(engine)


def test_the_context_ends_an_answer(model: Llama):
    with Engine(model, max_len=32, max_batch=2) as engine:
        [one, last] = engine.generate([[1] * 20, [1] * 31], SamplingParams(max_tokens=100))
    assert (one.completion_tokens, one.finish_reason) == (12, "length")
    assert (last.completion_tokens, last.finish_reason) == (1, "length")
    assert one.token_ids == next_ids(model, [1] * 20, 12)


def test_the_models_own_limit_holds(model: Llama):
    with Engine(model, max_len=10_000) as engine:
        assert engine.max_len == CONFIG.max_positions


# Leaving early


def cancel(stream) -> None:
    stream.cancel()


def leave_the_block(stream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("leave", [cancel, leave_the_block])
@pytest.mark.parametrize("running", [True, False])
def test_a_cancelled_request_frees_everything_and_disturbs_nobody(model: Llama, leave, running: bool):
    places = 2 if running else 1
    with Engine(model, max_batch=places) as engine, held(model, calls=3, rows=places) as (arrived, go):
        other = engine.submit([1, 2], SamplingParams(max_tokens=100))
        stream = engine.submit([3, 4], SamplingParams(max_tokens=150))
        assert arrived.wait(20)
        leave(stream)
        leave(stream)
        go.set()
        completion = stream.result(20)
        assert completion.finish_reason == stream.finish_reason == "cancelled"
        assert completion.completion_tokens == (5 if running else 0)
        assert len(list(stream)) == completion.completion_tokens
        assert other.result(20).token_ids == next_ids(model, [1, 2], 100)
        eventually(lambda: is_empty(engine))
        assert engine.generate([[3, 4]], SamplingParams(max_tokens=5))[0].token_ids == next_ids(
            model, [3, 4], 5
        )


def test_an_abandoned_stream_is_cancelled(model: Llama):
    passes: list[None] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(None))
    with Engine(model, max_batch=1) as engine, held(model, calls=5) as (_, go):
        for _token in engine.submit([1, 2], SamplingParams(max_tokens=150)):
            break
        gc.collect()
        go.set()
        eventually(lambda: is_empty(engine))
    hook.remove()
    assert len(passes) < 10  # and not 150


def test_cancelling_what_is_finished_changes_nothing(model: Llama):
    with Engine(model) as engine:
        stream = engine.submit([1], SamplingParams(max_tokens=2))
        completion = stream.result(20)
        stream.cancel()
        assert engine.generate([[1]], SamplingParams(max_tokens=2))[0] == completion
        assert stream.finish_reason == "length"


def test_a_long_prompt_is_not_read_to_its_end_once_cancelled(model: Llama):
    with Engine(model) as engine, held(model) as (arrived, go):
        layers: list[int] = []
        hooks = [
            b.register_forward_hook(lambda *_, n=n: layers.append(n)) for n, b in enumerate(model.blocks)
        ]
        first_layer = model.blocks[0].register_forward_pre_hook(lambda *_: stream.cancel())
        stream = engine.submit([1] * 100)
        go.set()
        assert stream.result(20).finish_reason == "cancelled"
        assert layers == [0] and not arrived.is_set()
        for hook in [*hooks, first_layer]:
            hook.remove()
        eventually(lambda: is_empty(engine))


# Errors


@contextmanager
def failing(model: Llama, when) -> Iterator[None]:
    def hook(_, args):
        if when(args[0]):
            raise MemoryError("no room for this")

    handle = model.blocks[1].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_an_error_in_a_prompt_fails_that_request_alone(model: Llama):
    want = {n: next_ids(model, [n] * n, 8) for n in (5, 9)}
    with Engine(model) as engine, failing(model, lambda x: x.shape[1] == 7):
        streams = [engine.submit([n] * n, SamplingParams(max_tokens=8)) for n in (5, 7, 9)]
        with pytest.raises(RequestFailed, match="no room for this") as caught:
            streams[1].result(20)
        assert isinstance(caught.value.__cause__, MemoryError)
        with pytest.raises(RequestFailed):
            next(streams[1])
        for stream, n in ((streams[0], 5), (streams[2], 9)):
            assert stream.result(20).token_ids == want[n]
        eventually(lambda: is_empty(engine))


def test_an_error_in_a_step_fails_its_requests_and_not_the_engine(model: Llama):
    with Engine(model, max_batch=2) as engine:
        with failing(model, lambda x: x.shape[:2] == (2, 1)), held(model) as (_, go):
            streams = [engine.submit([n], SamplingParams(max_tokens=150)) for n in (1, 2)]
            go.set()
            for stream in streams:
                with pytest.raises(RequestFailed):
                    stream.result(20)
                assert stream.finished and stream.finish_reason is None
        eventually(lambda: is_empty(engine))
        assert engine.generate([[1]], SamplingParams(max_tokens=8))[0].token_ids == next_ids(model, [1], 8)


def test_logits_that_are_nan_fail_one_request_of_a_batch():
    class Poisoned(Scripted):
        def end(self, x):
            logits = super().end(x)
            logits[self.positions[:, -1] == 12] = float("nan")
            return logits

    with Engine(Poisoned(b"x" * 40)) as engine:
        streams = [engine.submit([0] * n, SamplingParams(max_tokens=5)) for n in (2, 10, 20)]
        with pytest.raises(RequestFailed, match="largest logit is nan"):
            streams[1].result(20)
        assert [streams[n].result(20).text for n in (0, 2)] == ["xxxxx", "xxxxx"]
        eventually(lambda: is_empty(engine))


# The end


def test_close_cancels_what_is_left_and_ends_the_thread(model: Llama):
    with held(model, calls=4) as (arrived, go):
        engine = Engine(model, max_batch=2)
        streams = [engine.submit([n], SamplingParams(max_tokens=150)) for n in range(5)]
        assert arrived.wait(20)
        closing = threading.Thread(target=engine.close)
        closing.start()
        eventually(lambda: engine._closed)
        with pytest.raises(EngineClosed):
            engine.submit([1])
        go.set()
        closing.join(20)
    assert not closing.is_alive() and not engine._thread.is_alive()
    assert [stream.result(0).finish_reason for stream in streams] == ["cancelled"] * 5
    assert is_empty(engine)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_everybody(model: Llama):
    engine = Engine(model, max_batch=1)
    broken = ZeroDivisionError("a fault of the engine's own")

    def breaks():
        raise broken

    with held(model, calls=3) as (arrived, go):
        streams = [engine.submit([n], SamplingParams(max_tokens=150)) for n in range(3)]
        assert arrived.wait(20)
        engine._scheduler.next_step = breaks
        go.set()
        for stream in streams:
            with pytest.raises(RequestFailed) as caught:
                stream.result(20)
            assert caught.value.__cause__ is broken
    with pytest.raises(EngineClosed):
        engine.submit([1])
    engine.close()


# Threads and event loops


def test_submitting_from_many_threads(model: Llama):
    def ask(n: int) -> bool:
        prompt = [n, 2 * n, 3]
        stream = engine.submit(prompt, SamplingParams(max_tokens=6))
        tokens = [token.id for token in stream]
        return tokens == stream.result().token_ids == want[n]

    want = {n: next_ids(model, [n, 2 * n, 3], 6) for n in range(40)}
    with Engine(model, max_batch=4) as engine, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(40), timeout=60))
        eventually(lambda: is_empty(engine))


def test_reading_in_an_event_loop(model: Llama):
    async def read(prompt: list[int]) -> list[int]:
        stream = engine.submit(prompt, SamplingParams(max_tokens=8))
        ids = [token.id async for token in stream]
        assert (await stream.completed()).token_ids == ids
        return ids

    async def main() -> None:
        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticks = 0
        ticking = asyncio.create_task(tick())
        got = await asyncio.gather(*(read(prompt) for prompt in prompts(5)))
        ticking.cancel()
        assert got == [next_ids(model, prompt, 8) for prompt in prompts(5)]
        assert ticks > 20  # the loop was free meanwhile

    with Engine(model, max_batch=3) as engine:
        asyncio.run(asyncio.wait_for(main(), 60))


def test_an_event_loop_that_leaves_cancels(model: Llama):
    async def main() -> None:
        async def read() -> None:
            async with engine.submit([1], SamplingParams(max_tokens=150)) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(read())
        assert await asyncio.to_thread(arrived.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def fails() -> None:
        stream = engine.submit([3] * 7)
        with pytest.raises(RequestFailed):
            await stream.completed()
        with pytest.raises(RequestFailed):
            await anext(stream)

    with Engine(model) as engine:
        with held(model, calls=5) as (arrived, _):
            asyncio.run(asyncio.wait_for(main(), 60))
        eventually(lambda: is_empty(engine))
        with failing(model, lambda x: x.shape[1] == 7):
            asyncio.run(asyncio.wait_for(fails(), 60))


def test_waiting_has_a_limit(model: Llama):
    with Engine(model) as engine, held(model) as (_, go):
        stream = engine.submit([1], SamplingParams(max_tokens=2))
        with pytest.raises(TimeoutError):
            stream.result(0.01)
        go.set()
        assert stream.result(20).completion_tokens == 2
