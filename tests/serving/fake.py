"""A backend without a model, for tests of the HTTP layer alone: it "generates" the words of a fixed
sentence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from labkit.serving.backend import MODEL_NOT_FOUND, Accepted, Event, Finished, Job, Refused, State
from labkit.serving.deployment import is_called
from labkit.serving.stream import Token, TopLogprob

WORDS = ["Call", " me", " Ish", "mael", ".", " Some", " years", " ago"]
CONTEXT = 32


class FakeBackend:
    """One token a word; the prompt has as many tokens as words, and the context 32."""

    created = 1_700_000_000

    def __init__(
        self, name: str = "fake", fail_after: int | None = None, behind: str | None = None
    ) -> None:
        """behind: the name of the model that really answers, where it is another by now."""
        self.name, self.behind = name, behind or name
        self.jobs: list[Job] = []
        self.open = 0  # jobs that were begun and not yet left
        self.fail_after = fail_after

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        self.jobs.append(job)
        if not is_called(self.behind, job.model):
            yield Refused("replaced", code=MODEL_NOT_FOUND, param="model")
            return
        if isinstance(job.prompt, str):
            size = len(job.prompt.split())
        else:
            size = sum(len(p["content"].split()) if isinstance(p, dict) else 1 for p in job.prompt)
        if size + (job.max_tokens or 1) > CONTEXT:
            yield Refused(f"at most {CONTEXT} tokens", code="context_length_exceeded")
            return
        self.open += 1
        try:
            yield Accepted(self.behind, size)
            count = min(job.max_tokens or CONTEXT, len(WORDS))
            for index, word in enumerate(WORDS[:count]):
                if index == self.fail_after:
                    raise ZeroDivisionError("secret detail")
                await asyncio.sleep(0)
                if job.sampling["logprobs"] is None:
                    yield Token(index, word, word)
                else:
                    top = tuple(TopLogprob(k, f"w{k}", -0.5 - k) for k in range(job.sampling["logprobs"]))
                    yield Token(index, word, word, -0.25 * index, top)
            yield Finished("length" if count < len(WORDS) else "stop", count)
        finally:
            self.open -= 1

    async def states(self) -> list[State]:
        return [State(self.open, 0)]
