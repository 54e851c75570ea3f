"""What stands between HTTP and an engine: a job goes in, events come out. All of it is plain data, so
that the two may live in different processes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from labkit.serving.deployment import is_called
from labkit.serving.stream import Token

if TYPE_CHECKING:
    from labkit.serving.engine import Engine


MODEL_NOT_FOUND = "model_not_found"  # OpenAI's word


@dataclass(frozen=True)
class Job:
    """One request as an engine needs it.

    model       the name that was asked for
    prompt      a text, token ids, or the messages of a conversation (``role`` and ``content``)
    sampling    SamplingParams' fields, without max_tokens
    max_tokens  None = until the context is full
    """

    model: str
    prompt: str | list[int] | list[dict[str, str]]
    sampling: dict[str, Any]
    max_tokens: int | None


@dataclass(frozen=True)
class Refused:
    """The only event of a job that cannot be done as asked. ``code`` is OpenAI's word for why, where it
    has one.
    """

    message: str
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class Accepted:
    """The first event of a job that is being done, and the name of the model that does it."""

    model: str
    prompt_tokens: int


@dataclass(frozen=True)
class Finished:
    """The last event: ``stop`` or ``length``, and how many tokens were generated."""

    reason: str
    completion_tokens: int


Event = Refused | Accepted | Token | Finished


@dataclass(frozen=True)
class State:
    """What one replica is doing, and has done since it started.

    running, waiting    requests in its batch now, and those that wait for a place in it
    finished, cancelled requests that were answered to their end, and those whose client left before it
    """

    running: int
    waiting: int
    finished: int = 0
    cancelled: int = 0


class Unavailable(RuntimeError):
    """This model cannot answer now: its replica stopped, or its queue is full. The same request may
    succeed later.
    """


class Backend(Protocol):
    """A model as the API sees it. Leaving ``generate`` early, by ``aclose`` or cancellation, ends the
    job.
    """

    name: str
    created: int

    def generate(self, job: Job) -> AsyncGenerator[Event, None]: ...

    async def states(self) -> list[State]:
        """One for each living replica."""
        ...


class EngineBackend:
    """An engine in this process."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name, self.created = engine, name, int(time.time())
        self._stopped = False
        self._finished = self._cancelled = 0

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        from labkit.serving.engine import EngineClosed
        from labkit.serving.sampling import SamplingParams

        # While one checkpoint takes another's place, jobs for both arrive.
        if not is_called(self.name, job.model):
            yield Refused(
                f"The model {job.model!r} was replaced by {self.name!r}", MODEL_NOT_FOUND, "model"
            )
            return
        limit = self.engine.max_len
        try:
            ids = self._ids(job.prompt)
            room = limit - len(ids)
            if room < (job.max_tokens or 1):
                asked = "" if job.max_tokens is None else f" and {job.max_tokens} for the answer"
                yield Refused(
                    f"This model's maximum context length is {limit} tokens. The request needs "
                    f"{len(ids) + (job.max_tokens or 1)}: {len(ids)} in the prompt{asked}. "
                    "Shorten the prompt or ask for fewer tokens.",
                    code="context_length_exceeded",
                )
                return
            params = SamplingParams(max_tokens=job.max_tokens or room, **job.sampling)
            stream = self.engine.submit(ids, params)
        except EngineClosed as error:
            self._stopped = True
            raise Unavailable(str(error)) from error
        except ValueError as error:
            yield Refused(str(error))
            return
        finished = False
        try:
            yield Accepted(self.name, len(ids))
            async for token in stream:
                # The token that ends a text is not part of the answer; what it set free is.
                ends = token.id in self.engine.model.config.eos_ids
                yield replace(token, piece="", logprob=None, top_logprobs=None) if ends else token
            done = await stream.completed()
            if done.finish_reason == "cancelled":
                raise Unavailable(
                    "the engine was stopped before the answer was complete; send the request again"
                )
            finished = True
            yield Finished(done.finish_reason, done.completion_tokens)
        finally:  # however it is left, the engine's slot is free from its next step on
            stream.cancel()
            self._finished += finished
            self._cancelled += not finished

    def check(self) -> None:
        """Raises Unavailable once the engine has turned a job away because its thread has ended."""
        if self._stopped:
            raise Unavailable("the engine was stopped")

    async def states(self) -> list[State]:
        return [State(self.engine.running, self.engine.waiting, self._finished, self._cancelled)]

    def _ids(self, prompt: str | list[int] | list[dict[str, str]]) -> list[int]:
        tokenizer = self.engine.model.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return tokenizer.encode(tokenizer.chat(prompt))
        return list(prompt)  # type: ignore[arg-type]
