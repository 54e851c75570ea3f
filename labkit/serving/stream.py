"""What a caller holds while the engine works: tokens as they come, and the whole answer at the end."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


class RequestFailed(RuntimeError):
    """The engine could not finish this request; ``__cause__`` is what went wrong. Other requests go on."""


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a position: id, text on its own, log-probability in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """One generated token.

    id            in the vocabulary
    text          what became certain to be part of the answer: empty while a character is incomplete or
                  may be the beginning of a stop text; later tokens bring it then. The texts joined are
                  the answer
    piece         the token on its own; half a character shows as U+FFFD
    logprob       the model's log-probability for it in nats, None unless asked for
    top_logprobs  the likeliest tokens at this position, None unless asked for
    """

    id: int
    text: str
    piece: str
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A finished answer. ``tokens`` holds all that were generated, one that ended the text included.

    finish_reason   stop: the model ended its text, or a stop text appeared; length: max_tokens or the
                    context is used up; cancelled: the caller, or the engine's close(), ended it early
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)


class Bell:
    """Who waits for one thing to happen: threads, and coroutines of any event loop. The lock is its channel's.

    Every method but ``__init__`` is called while the lock is held.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._rung = threading.Condition(lock)
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def ring(self) -> None:
        """Wake all, but those whose event loop has been closed: nobody is there any more, and ``deserted`` says so."""
        self._rung.notify_all()
        futures, self._futures = self._futures, []
        for loop, future in futures:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:
                self._futures.append((loop, future))

    @property
    def deserted(self) -> bool:
        """Whether somebody's event loop was closed before the bell rang."""
        return any(loop.is_closed() for loop, _ in self._futures)

    def wait_for(self, happened: Callable[[], object], timeout: float | None) -> bool:
        """Sleep until ``happened()``, which is asked now and after each ring; False after ``timeout`` seconds."""
        return bool(self._rung.wait_for(happened, timeout))

    def future(self) -> asyncio.Future[None]:
        """What the running event loop can wait for: done at the next ring."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._futures = [(other, waiting) for other, waiting in self._futures if not waiting.done()]  # or given up
        self._futures.append((loop, future))
        return future


class Channel:
    """Where the engine's thread leaves tokens and one caller's thread or event loop picks them up.

    The engine holds the channel, never the Stream, so that an abandoned Stream can be noticed. Who waits for the whole
    answer is not woken by its tokens: on few cores that would take one from the step that makes the next.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cancelled = False
        self.completion: Completion | None = None
        self.error: BaseException | None = None
        self._tokens: list[Token] = []
        self._unread: deque[Token] = deque()
        self._lock = threading.RLock()
        self._arrived, self._ended = Bell(self._lock), Bell(self._lock)

    @property
    def finished(self) -> bool:
        return self.completion is not None or self.error is not None

    def put(self, token: Token) -> None:
        with self._lock:
            self._tokens.append(token)
            self._unread.append(token)
            self._ring(self._arrived)

    def finish(self, reason: FinishReason) -> None:
        with self._lock:
            if not self.finished:
                text = "".join(token.text for token in self._tokens)
                self.completion = Completion(text, tuple(self._tokens), reason, self.prompt_tokens)
                self._ring(self._arrived, self._ended)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.finished:
                self.error = error
                self._ring(self._arrived, self._ended)

    def _ring(self, *bells: Bell) -> None:
        for bell in bells:
            bell.ring()
        if self._arrived.deserted or self._ended.deserted:
            self.cancelled = True

    def read(self, timeout: float | None = None) -> Token | None:
        """The next token, waiting for it; None when there are no more. Raises the request's error."""
        with self._lock:
            if not self._arrived.wait_for(lambda: self._unread or self.finished, timeout):
                raise TimeoutError(f"no token within {timeout} s")
            return self._take()

    async def read_async(self) -> Token | None:
        while True:
            with self._lock:
                if self._unread or self.finished:
                    return self._take()
                future = self._arrived.future()
            await future

    def wait(self, timeout: float | None = None) -> Completion:
        with self._lock:
            if not self._ended.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"the request has not finished within {timeout} s")
            return self._completion()

    async def wait_async(self) -> Completion:
        while True:
            with self._lock:
                if self.finished:
                    return self._completion()
                future = self._ended.future()
            await future

    def _take(self) -> Token | None:
        if self._unread:
            return self._unread.popleft()
        if self.error is not None:
            raise self.error
        return None

    def _completion(self) -> Completion:
        if self.error is not None:
            raise self.error
        assert self.completion is not None
        return self.completion


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Stream:
    """One request's tokens, as they are generated. For one reader, in a thread or in an event loop::

        for token in stream: ...             async for token in stream: ...
        completion = stream.result()         completion = await stream.completed()

    ``result`` gives the whole answer, also after some tokens were read. Leaving a ``with`` block,
    ``cancel()`` and dropping the last reference all end the request and free what it holds. Reading,
    ``result`` and ``completed`` raise RequestFailed where the engine could not finish the request.
    """

    def __init__(self, channel: Channel, cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._cancel = weakref.finalize(self, cancel)
        self._cancel.atexit = False

    @property
    def prompt_tokens(self) -> int:
        return self._channel.prompt_tokens

    @property
    def finished(self) -> bool:
        """True once the engine is done with it, well or not."""
        return self._channel.finished

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs, and where it failed."""
        completion = self._channel.completion
        return None if completion is None else completion.finish_reason

    def cancel(self) -> None:
        """End the request at the engine's next step. From any thread, at any time, more than once."""
        self._cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole answer. TimeoutError after ``timeout`` seconds; the request goes on then."""
        return self._channel.wait(timeout)

    async def completed(self) -> Completion:
        """Wait for the whole answer in an event loop."""
        return await self._channel.wait_async()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        token = self._channel.read()
        if token is None:
            raise StopIteration
        return token

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Token:
        token = await self._channel.read_async()
        if token is None:
            raise StopAsyncIteration
        return token

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class StopFilter:
    """Passes text on and ends at the first stop text, also where one spans several pushes.

    What may be the beginning of a stop text is held back until the next push decides.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What is certain to be part of the answer, and whether a stop text has ended it."""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text ends here: what was held back is part of the answer after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
