"""Peers in processes of their own, so that each has the libraries it wants and its own threads."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

SPEAK = Path(__file__).parent / "peers" / "speak.py"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0  # seconds; a guard against a peer that never answers, not a measure
# Which environment of the checkout holds a peer, and what makes it; the others run in labkit's own.
ENVIRONMENTS = {
    "llama_cpp": (".venv-peers", "make peers"),
    "onnxruntime": (".venv-peers", "make peers"),
    "llm_compressor": (".venv-parity", "make parity-environment"),
    "vllm": (".venv-vllm", "make vllm-environment"),
}


class PeerMissing(RuntimeError):
    """The peer's environment is not there; the message says what makes it."""


class PeerFailed(RuntimeError):
    """The peer refused a request, died, fell silent, or answered what is no answer."""


def python_of(name: str) -> Path:
    """The interpreter that has the peer's libraries. Raises PeerMissing."""
    if name not in ENVIRONMENTS:
        if importlib.util.find_spec(name) is None:
            raise PeerMissing(f"{name} is not installed; run `make setup`")
        return Path(sys.executable)
    folder, command = ENVIRONMENTS[name]
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        raise PeerMissing(f"{name} is not here; run `{command}` in a checkout of the lab")
    return python


class Peer:
    """One process that answers requests; ``ask`` calls a method of its ``Peer`` and gives back what that returned.

    Its threads sleep between requests: OpenMP's and onnxruntime's turn in a loop for some milliseconds only, which the
    pause between two turns covers. Use it in a ``with`` block, or call ``close``.
    """

    def __init__(self, name: str, threads: int, command: Sequence[str | Path] | None = None) -> None:
        """Start it. ``command`` stands in for the peer's own, in tests. Raises PeerMissing."""
        self.name = name
        # Large pages for what they read, as ours has: glibc asks for them where it is told to.
        tuned = {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        environment = {**os.environ, **tuned}
        if name in ENVIRONMENTS:
            environment.pop("PYTHONPATH", None)  # of this environment, not of the peer's
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        self._process = subprocess.Popen(
            [str(part) for part in command or (python_of(name), SPEAK, name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment,
        )  # fmt: skip

    def ask(self, method: str, *arguments: Any, patience: float = PATIENCE) -> Any:
        """What the peer's ``method(*arguments)`` returns, JSON both ways. Raises PeerFailed, after which a peer that
        broke the protocol is gone."""
        request, process = [method, *arguments], self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):
            raise self._gone(method) from None
        if not select.select([process.stdout], [], [], patience)[0]:
            self.close()
            raise PeerFailed(f"{self.name} did not answer {method} within {patience:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise self._gone(method)
        try:
            answer = json.loads(line)
            error, value = answer.get("error"), answer.get("value")
        except (ValueError, AttributeError):
            self.close()
            found = line[:80].decode(errors="replace").rstrip()
            raise PeerFailed(
                f"{self.name} answered {method} with {found!r}, expected a JSON object"
            ) from None
        if error is not None:
            raise PeerFailed(f"{self.name} could not {method}: {error}")
        return value

    def seconds(self, method: str, *arguments: Any) -> float:
        """``ask`` for a time. Raises PeerFailed also where the answer is none."""
        value = self.ask(method, *arguments)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PeerFailed(f"{self.name} answered {method} with {value!r}, expected seconds above 0")
        return float(value)

    def close(self) -> None:
        """End the process; more than once does no harm."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with suppress(OSError):  # it is gone already, and something was left to write
                process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _gone(self, method: str) -> PeerFailed:
        self.close()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()][-1:] or ["nothing"]
        return PeerFailed(
            f"{self.name} ended with status {self._process.returncode} during {method}; its last words: {words[0]}"
        )


class Fresh:
    """A turn in a new process: ``method`` answers seconds and the process's peak of memory, which ``peaks`` keeps."""

    def __init__(self, name: str, threads: int, method: str, *arguments: Any) -> None:
        self._name, self._threads, self._request = name, threads, (method, *arguments)
        self.peaks: list[float] = []  # bytes, one a turn

    def __call__(self) -> float:
        with Peer(self._name, self._threads) as peer:
            answer = peer.ask(*self._request)
        if not (isinstance(answer, list) and [type(part) for part in answer] == [float, float]):
            raise PeerFailed(f"{self._name} answered {answer!r}, expected seconds and bytes")
        seconds, peak = answer
        self.peaks.append(peak)
        return seconds
