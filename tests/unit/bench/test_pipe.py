"""The pipe to a peer: a peer that answers, and every way in which one does not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit.bench import pipe
from labkit.bench.pipe import SPEAK, Fresh, Peer, PeerFailed, PeerMissing, python_of

FAKE = """
import os

class Peer:
    def add(self, a, b):
        print("libraries print what they like")
        return a + b

    def refuse(self):
        raise RuntimeError("llama_decode returned 1")

    def die(self):
        print("out of memory")
        os._exit(7)

    def threads(self):
        return os.environ["OMP_NUM_THREADS"]
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A peer behind the real far side of the pipe."""
    (tmp_path / "with_fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Peer("fake", 3, [sys.executable, SPEAK, "fake"]) as peer:
        yield peer


@pytest.fixture
def says(tmp_path: Path) -> Iterator[Callable[[str], Peer]]:
    """A peer that answers its first request with a line of one's choice, and then ends."""
    made: list[Peer] = []

    def start(line: str) -> Peer:
        made.append(Peer("fake", 1, [sys.executable, "-c", f"input(); print({line!r})"]))
        return made[-1]

    yield start
    for peer in made:
        peer.close()


def test_it_answers_again_and_again(fake: Peer) -> None:
    assert [fake.ask("add", 1, 2), fake.ask("add", [1], [2])] == [3, [1, 2]]
    assert fake.seconds("add", 0.25, 0.25) == 0.5
    assert fake.ask("threads") == "3"


def test_a_refusal_is_an_error_and_the_peer_lives_on(fake: Peer) -> None:
    with pytest.raises(PeerFailed, match="fake could not refuse: RuntimeError: llama_decode returned 1"):
        fake.ask("refuse")
    with pytest.raises(PeerFailed, match="fake could not multiply: AttributeError"):
        fake.ask("multiply")
    assert fake.ask("add", 1, 1) == 2


def test_a_peer_that_dies_says_its_status_and_last_words(fake: Peer) -> None:
    with pytest.raises(
        PeerFailed, match="fake ended with status 7 during die; its last words: out of memory"
    ):
        fake.ask("die")
    with pytest.raises(PeerFailed, match="ended with status 7 during add"):
        fake.ask("add", 1, 2)


def test_a_peer_that_does_not_start_says_why() -> None:
    failure = pytest.raises(PeerFailed, match=r"status 1 during add; .*No module named 'with_nobody'")
    with Peer("fake", 1, [sys.executable, SPEAK, "nobody"]) as peer, failure:
        peer.ask("add", 1, 2)


@pytest.mark.parametrize("line", ["rubbish", "[1, 2]", "0.5", '{"value": '])
def test_rubbish_is_named(says: Callable[[str], Peer], line: str) -> None:
    with pytest.raises(PeerFailed) as failure:
        says(line).ask("decode")
    assert repr(line.rstrip()) in str(failure.value)
    assert "expected a JSON object" in str(failure.value)


@pytest.mark.parametrize("value", ["null", "0", "-1.5", "true", '"fast"', "NaN", "Infinity", "[1.0]"])
def test_only_a_time_is_a_time(says: Callable[[str], Peer], value: str) -> None:
    with pytest.raises(PeerFailed, match="expected seconds above 0"):
        says(f'{{"value": {value}}}').seconds("decode")


def test_a_silent_peer_is_given_up() -> None:
    failure = pytest.raises(PeerFailed, match="fake did not answer decode within 0 s")
    with Peer("fake", 1, [sys.executable, "-c", "input(); input()"]) as peer, failure:
        peer.ask("decode", patience=0.1)


def test_an_environment_that_is_not_there_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "ROOT", tmp_path)
    with pytest.raises(PeerMissing, match="llama_cpp is not here; run `make peers`"):
        Peer("llama_cpp", 1)
    with pytest.raises(PeerMissing, match="run `make parity-environment`"):
        Peer("llm_compressor", 1)
    with pytest.raises(PeerMissing, match="nobody_has_this is not installed; run `make setup`"):
        Peer("nobody_has_this", 1)
    assert python_of("labkit") == Path(sys.executable)


@pytest.mark.parametrize(("answer", "peaks"), [("[1.5, 2e6]", [2e6]), ("[1.5]", []), ("3.0", [])])
def test_a_fresh_process_answers_seconds_and_its_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, peaks: list[float]
) -> None:
    (tmp_path / "with_fake.py").write_text(f"class Peer:\n    def first(self):\n        return {answer}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pipe, "python_of", lambda name: Path(sys.executable))
    turn = Fresh("fake", 1, "first")
    if peaks:
        assert turn() == 1.5
    else:
        with pytest.raises(PeerFailed, match="expected seconds and bytes"):
            turn()
    assert turn.peaks == peaks
