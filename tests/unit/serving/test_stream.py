"""Who waits on a channel is woken for what it waits for, and for nothing else."""

from __future__ import annotations

import asyncio
import threading

import pytest

from labkit.serving.stream import Channel, RequestFailed, Token

TOKENS = [Token(i, f"{i} ", f"{i} ") for i in range(50)]


class Counting(Channel):
    """Counts how often the thread or loop that waits looks whether it is over."""

    looked = 0

    @property
    def finished(self) -> bool:
        self.looked += threading.current_thread() is self.waiter
        return self.completion is not None or self.error is not None

    waiter: threading.Thread | None = None


def waited(channel: Counting, wait: object) -> list[object]:
    """What ``wait`` gave, called in a thread of its own while tokens come and the answer ends."""
    found: list[object] = []
    started = threading.Event()

    def run() -> None:
        channel.waiter = threading.current_thread()
        started.set()
        found.append(wait())  # type: ignore[operator]

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20)
    while not channel.looked:  # it waits from then on
        threading.Event().wait(0.001)
    for token in TOKENS:
        channel.put(token)
        threading.Event().wait(0.001)
    channel.finish("length")
    thread.join(20)
    assert not thread.is_alive()
    return found


def test_a_thread_that_waits_for_the_end_sleeps_through_the_tokens():
    channel = Counting(1)
    [completion] = waited(channel, channel.wait)
    assert completion.tokens == tuple(TOKENS)
    assert channel.looked <= 3


def test_so_does_a_coroutine():
    channel = Counting(1)
    [completion] = waited(channel, lambda: asyncio.run(asyncio.wait_for(channel.wait_async(), 20)))
    assert completion.tokens == tuple(TOKENS)
    assert channel.looked <= 3


def test_a_reader_and_one_who_waits_for_the_end_get_what_each_waits_for():
    channel, read, ended = Channel(1), [], []
    readers = [
        threading.Thread(target=lambda: read.extend(iter(lambda: channel.read(20), None))),
        threading.Thread(target=lambda: ended.append(channel.wait(20))),
    ]
    for reader in readers:
        reader.start()
    for token in TOKENS:
        channel.put(token)
    channel.finish("stop")
    for reader in readers:
        reader.join(20)
    assert read == TOKENS and ended[0].finish_reason == "stop"


def test_so_does_one_of_somebody_who_waited_for_the_end():
    channel = Channel(1)
    gone = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        gone.run_until_complete(asyncio.wait_for(channel.wait_async(), 0.01))
    channel.put(TOKENS[0])
    assert not channel.cancelled  # its loop may ask again
    gone.close()
    channel.put(TOKENS[1])
    assert channel.cancelled


def test_whoever_asks_again_and_again_leaves_nothing_behind():
    channel = Channel(1)

    async def ask() -> None:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(channel.wait_async(), 0.001)

    asyncio.run(ask())
    assert len(channel._ended._futures) <= 1


def test_a_failure_reaches_both():
    channel = Channel(1)
    channel.fail(RequestFailed("broken"))
    for wait in (channel.read, channel.wait):
        with pytest.raises(RequestFailed, match="broken"):
            wait(20)


def test_a_closed_event_loop_cancels_and_the_others_are_still_woken():
    channel = Channel(1)
    gone = asyncio.new_event_loop()

    async def leave() -> None:
        channel._arrived.future()

    gone.run_until_complete(leave())
    gone.close()

    async def read() -> Token | None:
        waiting = asyncio.create_task(channel.read_async())
        await asyncio.sleep(0)
        channel.put(TOKENS[0])
        return await asyncio.wait_for(waiting, 20)

    assert asyncio.run(read()) == TOKENS[0]
    assert channel.cancelled
