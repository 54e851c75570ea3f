"""Which text is measured, which calibrates, and the frozen file that pins the first down to its token ids.

The book is cut by chapters: the first 60 % calibrate, the last 20 % are evaluated, and the 20 % between
keep them apart. Evaluation windows depend on the tokenizer alone, never on a seed. For SmolLM2's tokenizer
they are frozen in ``data/protocol/smollm2.json``; for any other they are drawn by the same rule, and have a
hash of their own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.files import data_path, whole_file
from labkit.models.texts import Chapter, chapters
from labkit.models.tokenizer import Tokenizer

CALIBRATION = 0.6  # of the chapters, from the start
EVALUATION = 0.2  # of the chapters, to the end
WINDOWS, TOKENS = 32, 256
LESSON = 8
FROZEN = "protocol/smollm2.json"
_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """How a model is measured.

    windows    the token ids, as many tuples as there are windows, all of one length
    text       sha256 of the text they are taken from
    tokenizer  fingerprint of the tokenizer that made the ids
    positions  which positions of a window are scored, from the first up to but not including the second:
               position t gives the distribution of token t + 1, which perplexity looks up
    dtype      the arithmetic of the model and of the logits
    kl         the divergence and its unit
    """

    windows: tuple[tuple[int, ...], ...]
    text: str
    tokenizer: str
    positions: tuple[int, int]
    dtype: str = "float32"
    kl: str = "KL(reference || quantized) over the full vocabulary, nats per token"
    version: int = _VERSION

    @property
    def hash(self) -> str:
        """Twelve hex digits that change with what is measured and how; every report carries them."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def tokens(self) -> Tensor:
        """The windows as int64 (windows, tokens)."""
        return torch.tensor(self.windows, dtype=torch.int64)

    def lesson(self) -> Protocol:
        """Every fourth window, eight in all, for live cells: the same rules, another hash."""
        return replace(self, windows=self.windows[:: len(self.windows) // LESSON][:LESSON])

    def save(self, path: Path) -> None:
        """Write the protocol, a window a line."""
        fields = {key: value for key, value in asdict(self).items() if key != "windows"}
        rows = ",\n".join(json.dumps(window, separators=(",", ":")) for window in self.windows)
        head = json.dumps({"hash": self.hash, **fields}, indent=1, ensure_ascii=False).removesuffix("\n}")
        with whole_file(path) as part:
            part.write_text(f'{head},\n "windows": [\n{rows}\n]}}\n', encoding="utf-8")

    @classmethod
    def from_file(cls, path: Path) -> Protocol:
        """Read a protocol. Raises ValueError when the file is not one, or was changed after its hash."""
        try:
            tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            said = tree.pop("hash")
            windows = tuple(tuple(window) for window in tree.pop("windows"))
            protocol = cls(windows=windows, positions=tuple(tree.pop("positions")), **tree)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no evaluation protocol of labkit ({error}); restore it with git"
            ) from error
        if protocol.hash != said:
            raise ValueError(
                f"{path} says hash {said}, its content has {protocol.hash}; restore it with git"
            )
        return protocol


def calibration_chapters() -> list[Chapter]:
    """The first 60 % of the chapters."""
    book = chapters()
    return book[: int(len(book) * CALIBRATION)]


def evaluation_chapters() -> list[Chapter]:
    """The last 20 % of the chapters."""
    book = chapters()
    return book[len(book) - int(len(book) * EVALUATION) :]


def calibration_windows(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> Tensor:
    """``count`` windows of ``tokens`` tokens, int64 (count, tokens), drawn by seed; none overlap.

    Raises ValueError when the text does not hold so many.
    """
    stream = _calibration_stream(tokenizer)
    whole = stream[: len(stream) // tokens * tokens].view(-1, tokens)  # (available, tokens)
    if count > len(whole):
        raise ValueError(
            f"asked for {count} calibration windows of {tokens} tokens; the text holds {len(whole)}"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole[order[:count]].clone()


def training_windows(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> Tensor:
    """``count`` windows of ``tokens`` tokens, int64 (count, tokens), from anywhere in the calibration text.

    Each starts where the seed says, so any number of them can be drawn; they overlap. Raises ValueError
    when the text is shorter than a window.
    """
    stream = _calibration_stream(tokenizer)
    if tokens > len(stream):
        raise ValueError(f"asked for windows of {tokens} tokens; the calibration text has {len(stream)}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - tokens + 1, (count, 1), generator=generator)
    return stream[starts + torch.arange(tokens)]


def build(tokenizer: Tokenizer, windows: int = WINDOWS, tokens: int = TOKENS) -> Protocol:
    """The protocol's rule applied to a tokenizer: windows spread evenly over the evaluation chapters.

    Raises ValueError when the text does not hold so many.
    """
    text, stream = _text(evaluation_chapters()), evaluation_stream(tokenizer)
    available = len(stream) // tokens
    if windows > available:
        raise ValueError(f"asked for {windows} windows of {tokens} tokens; the text holds {available}")
    starts = [i * available // windows * tokens for i in range(windows)]
    return Protocol(
        windows=tuple(tuple(stream[start : start + tokens].tolist()) for start in starts),
        text=hashlib.sha256(text.encode()).hexdigest(),
        tokenizer=fingerprint(tokenizer),
        # The last position predicts a token outside the window.
        positions=(0, tokens - 1),
    )


def evaluation_stream(tokenizer: Tokenizer) -> Tensor:
    """The evaluation chapters as one run of token ids, int64 (tokens,)."""
    return _encode(tokenizer, _text(evaluation_chapters()))


def protocol_for(tokenizer: Tokenizer, which: str = "full") -> Protocol:
    """The protocol for a tokenizer: the frozen one where it is SmolLM2's, else built by the same rule.

    which: "full" (32 windows of 256 tokens) or "lesson" (8 of them). Raises ValueError for another word.
    """
    if which not in ("full", "lesson"):
        raise ValueError(f"protocol must be 'full' or 'lesson', found {which!r}")
    frozen = _frozen()
    full = frozen if frozen.tokenizer == fingerprint(tokenizer) else build(tokenizer)
    return full if which == "full" else full.lesson()


def fingerprint(tokenizer: Tokenizer) -> str:
    """What a tokenizer makes of the book's first chapter, as sixteen hex digits."""
    ids = tokenizer.encode(chapters()[0].text)
    return hashlib.sha256(json.dumps([tokenizer.vocab_size, ids]).encode()).hexdigest()[:16]


def _text(part: list[Chapter]) -> str:
    return "\n\n".join(chapter.text for chapter in part)


def _encode(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text), dtype=torch.int64)


@lru_cache(maxsize=1)  # seconds of work, asked for again by every recipe
def _calibration_stream(tokenizer: Tokenizer) -> Tensor:
    return _encode(tokenizer, _text(calibration_chapters()))


@lru_cache(maxsize=1)
def _frozen() -> Protocol:
    return Protocol.from_file(data_path(FROZEN))
