"""The inference engine: requests from many threads in, tokens out, one thread that steps the model."""

from __future__ import annotations

import atexit
import itertools
import queue
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from labkit.models.llama import Llama
from labkit.serving.kv_cache import KVCache
from labkit.serving.sampling import SamplingParams, choose, log_probabilities
from labkit.serving.scheduler import Request, Scheduler
from labkit.serving.step import Step
from labkit.serving.stream import (
    Channel,
    Completion,
    FinishReason,
    RequestFailed,
    StopFilter,
    Stream,
    Token,
    TopLogprob,
)

STRETCH = 256  # tokens of a prompt that are read at once; after each a request may be cancelled
Next = tuple[Tensor, int | None]  # logits (vocab,) and which is the largest, where that is known
Rows = list[tuple["Answer", Next]]  # whose next token they decide


class PromptTooLong(ValueError):
    """The prompt leaves no room for a new token."""


class EngineClosed(RuntimeError):
    """The engine was closed; it takes no more requests."""


class Engine:
    """Serves one model to many callers with continuous batching.

    max_batch  requests that run at once; more wait in a queue
    max_len    tokens that prompt and answer may have together; the model's own limit where that is smaller
    native     take a step by our own kernel where it can (``Step.why_not``); False: by the model's own pass

    Every method may be called from any thread. Use it in a ``with`` block, or call ``close``::

        with Engine(model) as engine:
            [completion] = engine.generate(["Call me"], SamplingParams(max_tokens=8))
            for token in engine.submit("Call me"):
                print(token.text, end="")
    """

    def __init__(
        self, model: Llama, *, max_batch: int = 8, max_len: int = 2048, native: bool = True
    ) -> None:
        self.model = model
        self.max_batch, self.max_len = max_batch, min(max_len, model.config.max_positions)
        self._scheduler = Scheduler(max_batch)
        self._cache = KVCache(model.config, max_batch=max_batch, max_len=self.max_len, kv=model.kv)
        self._native = Step(model, self._cache) if native and Step.why_not(model) is None else None
        self._ids = itertools.count()
        # New requests, and None to wake the thread. A SimpleQueue may be written to from a finalizer.
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}  # by id: what the thread has received and not yet ended
        self._gate = threading.Lock()  # between submit and close
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="labkit-engine", daemon=True)
        self._thread.start()
        atexit.register(_close_at_exit, weakref.ref(self))

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Stream:
        """Queue a request, a text or token ids, and return at once.

        Raises PromptTooLong, ValueError for an empty prompt or an id outside the vocabulary, EngineClosed.
        """
        ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        self._check(ids)
        answer = Answer(Request(next(self._ids), ids), params or SamplingParams(), self.model, self.max_len)
        with self._gate:
            if self._closed:
                raise EngineClosed("this engine was closed; make a new one")
            self._inbox.put(answer)
        return Stream(answer.channel, _canceller(answer.channel, self._inbox))

    def generate(
        self, prompts: Iterable[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """The answers to all prompts, in the same order. Raises as ``submit`` and Stream do."""
        streams = [self.submit(prompt, params) for prompt in prompts]
        return [stream.result() for stream in streams]

    def close(self) -> None:
        """Cancel what is left and end the thread. Takes no longer than a layer of a prompt, or a token."""
        with self._gate:
            self._closed = True
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests in the batch now."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._scheduler.waiting) + self._inbox.qsize()

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise ValueError("the prompt is empty; expected at least one token")
        if len(ids) >= self.max_len:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens, expected fewer than {self.max_len}, which prompt and "
                "answer share; shorten it, or serve with a larger max_len where the model allows one"
            )
        vocab = self.model.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"prompt ids must lie in 0..{vocab - 1}, found {min(ids)}..{max(ids)}")

    # From here on everything runs in the engine's own thread.

    @torch.inference_mode()
    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._closed:
                self._receive()
                self._step()
        except BaseException as broken:
            error = broken
            raise
        finally:
            with self._gate:
                self._closed = True
            self._receive()
            for answer in list(self._answers.values()):
                self._end(answer, error or "cancelled")

    def _receive(self) -> None:
        """Take in what was submitted, waiting if there is nothing else to do; end what was cancelled."""
        wait = not self._answers and not self._closed
        while wait or not self._inbox.empty():  # nobody else takes from it
            answer, wait = self._inbox.get(), False
            if answer is not None:
                self._answers[answer.request.id] = answer
                self._scheduler.add(answer.request)
        for answer in list(self._answers.values()):
            if answer.channel.cancelled:
                self._end(answer, "cancelled")

    def _step(self) -> None:
        """One turn of continuous batching: new prompts are read, running answers grow by a token."""
        step = self._scheduler.next_step()
        for request in step.prefill:
            self._advance([request], self._prefill)
        if step.decode:
            self._advance(step.decode, self._decode)

    def _advance(self, requests: list[Request], compute: Callable[[list[Request]], Rows]) -> None:
        """Compute and take the next tokens. An error ends the requests that it concerns, and no others."""
        try:
            rows = compute(requests)
        except Exception as error:
            for request in requests:
                self._end(self._answers[request.id], error)
            return
        for answer, found in rows:
            try:
                reason: FinishReason | Exception | None = answer.take(*found)
            except Exception as error:
                reason = error
            if reason is not None:
                self._end(answer, reason)

    def _prefill(self, requests: list[Request]) -> Rows:
        """Read one prompt: the logits after its last token, the only ones that are needed."""
        [request] = requests
        answer = self._answers[request.id]
        self._cache.add(request.id)
        if self._native is not None and self._native.reads and not self._native.hooked:
            return self._read(answer, self._native)
        batch = self._cache.batch([request.id], len(request.prompt))
        x, rotary, cache = self.model.begin(torch.tensor([request.prompt]), batch)  # (1, T, hidden)
        for block in self.model.blocks:
            if self._closed or answer.channel.cancelled:
                return []  # the next turn ends it; a long prompt is not read to its end first
            x = block(x, rotary, cache)
        logits = self.model.end(x[:, -1:])  # (1, 1, vocab)
        return [(answer, (logits[0, 0], None))]

    def _read(self, answer: Answer, native: Step) -> Rows:
        """The same by steps of our own kernel, each of a stretch of the prompt."""
        request = answer.request
        for start in range(0, len(request.prompt), STRETCH):
            if self._closed or answer.channel.cancelled:
                return []
            stretch = request.prompt[start : start + STRETCH]
            [found] = native([stretch], self._cache.batch([request.id], len(stretch)))
        return [(answer, found)]

    def _decode(self, requests: list[Request]) -> Rows:
        """One more token for every running request."""
        batch = self._cache.batch([request.id for request in requests], 1)
        answers = [self._answers[id] for id in batch.ids]
        tokens = [[answer.last] for answer in answers]
        if self._native is not None and not self._native.hooked:
            found = self._native(tokens, batch)
        else:
            found = [(logits, None) for logits in self.model(torch.tensor(tokens), batch)[:, 0]]
        return list(zip(answers, found, strict=True))

    def _end(self, answer: Answer, why: FinishReason | BaseException) -> None:
        """Free all that a request holds and tell its caller."""
        id = answer.request.id
        del self._answers[id]
        self._scheduler.remove(answer.request)
        if id in self._cache:
            self._cache.remove(id)
        if isinstance(why, BaseException):
            failure = RequestFailed(f"request {id} failed in the engine: {type(why).__name__}: {why}")
            failure.__cause__ = why
            answer.channel.fail(failure)
        else:
            answer.channel.finish(why)


class Answer:
    """A request's way from logits to text: its randomness, its half characters, its stop texts."""

    def __init__(self, request: Request, params: SamplingParams, model: Llama, max_len: int) -> None:
        self.request, self.params = request, params
        self.channel = Channel(len(request.prompt))
        self.last = -1
        self._tokenizer = model.tokenizer
        self._eos_ids = () if params.ignore_eos else model.tokenizer.eos_ids
        self._left = min(params.max_tokens, max_len - len(request.prompt))
        self._draw = random.Random(params.seed)
        self._text = self._tokenizer.stream()
        self._stop = StopFilter(params.stop)

    def take(self, logits: Tensor, likeliest: int | None) -> FinishReason | None:
        """Choose the next token from logits (vocab,) and hand it on; why it was the last, or None."""
        self.last = choose(logits, self.params, self._draw, likeliest)
        self._left -= 1
        ended = self.last in self._eos_ids
        text, stopped = self._stop.push("" if ended else self._text.push(self.last))
        if not stopped and (ended or self._left == 0):
            rest, stopped = self._stop.push(self._text.finish())
            text += rest if stopped else rest + self._stop.flush()
        self.channel.put(self._token(text, logits))
        if ended or stopped:
            return "stop"
        return "length" if self._left == 0 else None

    def _token(self, text: str, logits: Tensor) -> Token:
        piece = self._tokenizer.decode([self.last])
        if self.params.logprobs is None:
            return Token(self.last, text, piece)
        logprob, likeliest = log_probabilities(logits, self.last, self.params.logprobs)
        top = tuple(TopLogprob(id, self._tokenizer.decode([id]), value) for id, value in likeliest)
        return Token(self.last, text, piece, logprob, top)


def _canceller(channel: Channel, inbox: queue.SimpleQueue[Answer | None]) -> Callable[[], None]:
    # Refers to the channel, not to the Stream: it runs when the Stream is dropped.
    def cancel() -> None:
        channel.cancelled = True
        inbox.put(None)

    return cancel


def _close_at_exit(engine: weakref.ref[Engine]) -> None:
    # A thread that is inside torch while the interpreter is taken down crashes the process.
    if (living := engine()) is not None:
        living.close()
