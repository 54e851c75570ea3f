from __future__ import annotations

import random
import subprocess
import sys

import pytest

from labkit.serving.scheduler import Request, Scheduler


def requests(*prompt_tokens: int) -> list[Request]:
    return [Request(id, [0] * tokens) for id, tokens in enumerate(prompt_tokens)]


def test_requests_join_while_others_run():
    scheduler = Scheduler(max_batch=4)
    first, second = requests(5, 5)
    scheduler.add(first)
    step = scheduler.next_step()
    assert (step.prefill, step.decode) == ([first], [])
    scheduler.add(second)
    step = scheduler.next_step()
    assert (step.prefill, step.decode) == ([second], [first])
    step = scheduler.next_step()
    assert (step.prefill, step.decode) == ([], [first, second])


def test_a_place_is_given_away_as_soon_as_it_is_free():
    scheduler = Scheduler(max_batch=2)
    a, b, c, d = requests(1, 1, 1, 1)
    for request in (a, b, c, d):
        scheduler.add(request)
    assert scheduler.next_step().prefill == [a, b]
    assert scheduler.next_step().prefill == []
    scheduler.remove(a)
    step = scheduler.next_step()
    assert (step.prefill, step.decode) == ([c], [b])
    assert list(scheduler.waiting) == [d]


def test_prompts_of_one_step_stay_within_the_budget():
    scheduler = Scheduler(max_batch=8, prefill_tokens=100)
    a, b, c = requests(60, 40, 1)
    for request in (a, b, c):
        scheduler.add(request)
    assert scheduler.next_step().prefill == [a, b]
    assert scheduler.next_step().prefill == [c]


def test_a_prompt_longer_than_the_budget_goes_alone():
    scheduler = Scheduler(max_batch=8, prefill_tokens=100)
    a, b, c = requests(1, 500, 1)
    for request in (a, b, c):
        scheduler.add(request)
    assert scheduler.next_step().prefill == [a]
    assert scheduler.next_step().prefill == [b]
    assert scheduler.next_step().prefill == [c]


def test_removing_a_waiting_request_and_one_that_is_unknown():
    scheduler = Scheduler(max_batch=1)
    a, b, c = requests(1, 1, 1)
    for request in (a, b):
        scheduler.add(request)
    scheduler.next_step()
    scheduler.remove(b)
    scheduler.remove(c)
    scheduler.remove(a)
    assert not scheduler.running and not scheduler.waiting
    step = scheduler.next_step()
    assert not step.prefill and not step.decode


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_served_once_in_order_and_for_as_long_as_it_wants(seed: int):
    """A random load against what continuous batching promises, counted from outside."""
    rng = random.Random(seed)
    max_batch, budget = rng.randint(1, 5), rng.randint(1, 60)
    scheduler = Scheduler(max_batch, prefill_tokens=budget)
    todo = requests(*(rng.randint(1, 80) for _ in range(40)))
    wanted = {request.id: rng.randint(1, 9) for request in todo}
    got = dict.fromkeys(wanted, 0)
    started: list[int] = []
    arrivals = iter(todo)
    for _ in range(2000):
        for _ in range(rng.randint(0, 2)):
            if (request := next(arrivals, None)) is not None:
                scheduler.add(request)
        room, queued = max_batch - len(scheduler.running), len(scheduler.waiting)
        step = scheduler.next_step()
        assert len(step.prefill) + len(step.decode) <= max_batch
        if room and queued:
            assert step.prefill  # nobody waits beside a free place
        assert len(step.prefill) <= 1 or sum(len(r.prompt) for r in step.prefill) <= budget
        assert {r.id for r in step.decode} == {i for i in started if got[i] < wanted[i]}
        started += [request.id for request in step.prefill]
        for request in [*step.prefill, *step.decode]:
            got[request.id] += 1
            if got[request.id] == wanted[request.id]:
                scheduler.remove(request)
        if got == wanted:
            break
    assert started == sorted(wanted)
    assert got == wanted


def test_max_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Scheduler(0)


def test_it_is_plain_python():
    code = "import sys, labkit.serving.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
