"""``labkit serve`` with our own step, beside the same server where there is no compiler: what an HTTP client sees."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import TracebackType

import torch

import labkit
from labkit import models
from labkit.bench.measure import Contender, Row, Setting, Unit, invited
from labkit.bench.pipe import PeerFailed
from labkit.serving.step import Step

RECIPE = "w4a16-rtn-g64"  # torch has an operator for it, too
REQUESTS = (1, 8)
TOKENS = 64
PROMPT = "Call me Ishmael."
ROUNDS = 5
READY = 300.0  # seconds; a guard, not a measure
NO_COMPILER = "no-compiler-for-labkit"  # a command that there is not


def serve(setting: Setting, name: str | None = None, rounds: int = ROUNDS) -> Iterator[list[Row]]:
    """A row for each number of requests at once. ``name`` as ``models.load`` takes it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-bench-"))) / "served"
        made = models.quantize(models.load(name, seed=0), RECIPE)
        models.save(made, folder)
        step = "its own step" if Step.why_not(made) is None else "the model's pass"
        version = f"labkit {labkit.__version__}, torch {torch.__version__}"

        @cache
        def server(**environment: str) -> Server:
            return stack.enter_context(Server(folder, setting.threads, **environment))

        def contender(name: str, how: str, count: int, **environment: str) -> Contender:
            def make() -> Contender:
                return Contender(name, f"{version}, {how}", partial(server(**environment).turn, count))

            return invited(name, make)

        for count in REQUESTS:
            yield setting.rows(
                f"labkit serve, requests at once: {count}, tokens of each: {TOKENS}", Unit("tokens/s", rate=True),
                contender(RECIPE, step, count),
                [contender("the same without a compiler", "torch's int4 op", count, CXX=NO_COMPILER)],
                rounds=rounds,
            )  # fmt: skip


class Server:
    """One ``labkit serve`` of a checkpoint. Raises PeerFailed where it does not become ready."""

    def __init__(self, folder: Path, threads: int, **environment: str) -> None:
        command = [sys.executable, "-m", "labkit.cli", "serve", "--checkpoint", str(folder)]
        command += ["--threads", str(threads), "--max-batch", str(max(REQUESTS))]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._said, env={**os.environ, **environment}
        )
        out = self._process.stdout
        assert out is not None
        word, _, self._url = (
            out.readline().decode().strip().partition(" ") if select.select([out], [], [], READY)[0] else [""] * 3
        )
        if word != "ready":
            self.close()
            self._said.seek(0)
            raise PeerFailed(f"`{' '.join(command[2:])}` did not become ready: {self._said.read().decode()[-300:]}")

    def turn(self, count: int) -> float:
        """Seconds for each token of ``count`` requests at once, with their prompts and HTTP. Raises PeerFailed."""
        import httpx

        body = {"model": "served", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        with httpx.Client(base_url=self._url, timeout=READY) as client, ThreadPoolExecutor(count) as pool:
            start = time.perf_counter()
            try:
                answers = [
                    answer.raise_for_status().json()
                    for answer in pool.map(lambda _: client.post("/completions", json=body), range(count))
                ]
            except httpx.HTTPError as error:
                raise PeerFailed(f"the server did not answer: {error}") from error
            seconds = time.perf_counter() - start
        return seconds / sum(answer["usage"]["completion_tokens"] for answer in answers)

    def close(self) -> None:
        """End the server, and Ray with it."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
