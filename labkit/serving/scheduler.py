"""Which requests the next step works on.

Continuous batching (Orca, Yu et al. 2022): requests join and leave between any two steps. Plain Python,
no tensors: what is computed is the engine's business.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """What the scheduler needs to know of a request: its number and how many tokens its prompt has."""

    id: int
    prompt: list[int]


@dataclass(frozen=True)
class Step:
    """One step's work: whole prompts to read, and requests that each get one more token."""

    prefill: list[Request] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)


class Scheduler:
    """First come, first served, with at most ``max_batch`` requests running.

    A step decodes every running request, and takes in waiting ones while there is room and their prompts
    together stay within ``prefill_tokens``: running requests wait for no more than that. A longer prompt
    goes alone.
    """

    def __init__(self, max_batch: int, prefill_tokens: int = 512) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, found {max_batch}")
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def next_step(self) -> Step:
        """Decide the next step. Requests whose prompts it reads are running from now on."""
        decode = list(self.running)
        prefill: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) < self.max_batch:
            tokens += len(self.waiting[0].prompt)
            if prefill and tokens > self.prefill_tokens:
                break
            request = self.waiting.popleft()
            prefill.append(request)
            self.running.append(request)
        return Step(prefill, decode)

    def remove(self, request: Request) -> None:
        """Forget a request, waiting or running: it is finished, failed or cancelled."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
