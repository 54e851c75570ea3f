"""Requests that never pause, sent from inside the cluster's network, and what became of each.

    with Load(node, url) as load: ...
    load.results                       # a list of Result, in order of their start

The clients run in a process of their own, in the network that the services have addresses in. Each sends its next
request when the last is answered, on a new connection, with no second try: what fails is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from node import Node

PATIENCE_S = 60.0
PAUSE_AFTER_FAILURE_S = 0.1  # as a client would, rather than thousands of refused connections in a second


@dataclass(frozen=True)
class Result:
    """start, seconds: wall clock. model: what the answer says it is. error: empty when it was answered."""

    start: float
    seconds: float
    model: str
    error: str

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Load:
    """Clients that ask for the alias ``lab`` until the block ends."""

    def __init__(self, node: Node, url: str, *, clients: int = 4, tokens: int = 2) -> None:
        self._command = node.in_network([sys.executable, __file__, url, str(clients), str(tokens)])
        self.results: list[Result] = []

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the clients finish what they have begun
        self._process.wait(PATIENCE_S * 2)
        self._reader.join(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.results.append(Result(**json.loads(line)))

    def answered(self, model: str | None = None) -> int:
        return sum(not result.error and model in (None, result.model) for result in list(self.results))

    def wait_for(self, count: int, model: str | None = None, timeout: float = 240) -> None:
        """Until so many more requests are answered, by that model where one is named."""
        deadline, goal = time.monotonic() + timeout, self.answered(model) + count
        while self.answered(model) < goal:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.answered(model)} of {goal} answers by {model}: {self.summary()}")
            time.sleep(0.2)

    def summary(self) -> dict[str, object]:
        """Requests, failures, and the longest time without an answer, in seconds."""
        results = sorted(self.results, key=lambda result: result.end)
        ends = [result.end for result in results if not result.error]
        gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
        failed = [result for result in results if result.error]
        return {
            "requests": len(results),
            "failed": len(failed),
            "longest_gap_s": round(max(gaps, default=0.0), 1),
            "errors": sorted({result.error for result in failed})[:5],
            "models": sorted({result.model for result in results if result.model}),
        }


async def main(url: str, clients: int, tokens: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)

    async def ask(number: int) -> None:
        body = {"model": "lab", "prompt": f"Call me {number}", "max_tokens": tokens}
        while not ended.is_set():
            start, model, error = time.time(), "", ""
            try:
                async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
                    answer = await client.post(f"{url}/v1/completions", json=body)
                if answer.status_code == 200:
                    model = answer.json()["model"]
                else:
                    error = f"{answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as failure:
                error = f"{type(failure).__name__}: {failure}"
            result = {"start": start, "seconds": time.time() - start, "model": model, "error": error}
            print(json.dumps(result), flush=True)
            if error:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    await asyncio.gather(*(ask(number) for number in range(clients)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
