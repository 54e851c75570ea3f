"""The way to a model in other processes, over a handle that is none: what is cancelled, and what a dead
replica looks like.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from labkit.serving.app import HandleBackend
from labkit.serving.backend import Accepted, EngineBackend, Finished, Job, Refused, Unavailable

JOB = Job("m", "a", {}, 1)


class Handle:
    """Serve's handle as far as it is used: options(...).remote(job) gives events that can be cancelled."""

    def __init__(self, *events: Any) -> None:
        self.events, self.cancelled = events, 0

    def options(self, *, method_name: str, stream: bool) -> Handle:
        assert (method_name, stream) == ("generate", True)
        return self

    def remote(self, job: Job) -> Handle:
        assert job is JOB
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self) -> Any:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event


async def read(handle: Handle, count: int | None = None) -> list[Any]:
    """The first ``count`` events, or all; whoever has read enough leaves."""
    events = HandleBackend(handle, "m").generate(JOB)  # type: ignore[arg-type]
    if count is None:
        return [event async for event in events]
    found = [await anext(events) for _ in range(count)]
    await events.aclose()
    return found


def test_an_answer_that_was_read_to_its_end_is_not_cancelled() -> None:
    handle = Handle(Accepted("m", 1), Finished("stop", 1))
    assert asyncio.run(read(handle)) == list(handle.events)
    assert handle.cancelled == 0


def test_a_client_that_leaves_cancels_the_replicas_work() -> None:
    handle = Handle(Accepted("m", 1), Finished("stop", 1))
    assert asyncio.run(read(handle, 1)) == [Accepted("m", 1)]
    assert handle.cancelled == 1


def test_a_dead_replica_is_unavailable_and_other_errors_stay_what_they_are() -> None:
    with pytest.raises(Unavailable, match="'m' cannot answer now"):
        asyncio.run(read(Handle(Accepted("m", 1), RayActorError())))
    broken = Handle(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(read(broken))
    assert broken.cancelled == 1


def test_a_replica_does_not_answer_for_the_checkpoint_that_it_replaced() -> None:
    async def first(asked: str) -> Any:
        return await anext(EngineBackend(object(), "lab@int4").generate(Job(asked, "a", {}, 1)))  # type: ignore[arg-type]

    refused = asyncio.run(first("lab@fp32"))
    assert isinstance(refused, Refused) and (refused.code, refused.param) == ("model_not_found", "model")
    for asked in ("lab", "lab@int4"):
        with pytest.raises(AttributeError):  # on to the engine, of which there is none here
            asyncio.run(first(asked))
