"""Token ids beside transformers', and beside byte-pair encoding worked out anew from the merge list."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import pytest
import regex

from labkit.models import Tokenizer, chapters, fetch, load

transformers = pytest.importorskip("transformers")

AWKWARD = [
    "",
    " ",
    "  leading and trailing  ",
    "tabs\tand\n\n\nnewlines\r\n and    runs of   spaces",
    "it's we'll I'D they've 'tis",
    "0 7 42 1984 3.14159 1,000,000 ½ ² ٣ 一二三",
    "naïve façade — “quoted” … ﬁne e\u0301",
    "鯨は海の中で眠る。고래 кит حوت",
    "🐳👩‍👩‍👧🏳️‍🌈 \u200b\u00a0\ufeff",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # noqa\n\n\tif x != y: pass",
    "\x00\x01\x7f \ufffd \U0010ffff",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "<|im_end|><|im_end|>  <|im_end|>",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_folder(fetch.fetch())


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(fetch.fetch())


def texts() -> list[str]:
    draw = random.Random(0)
    noise = [
        "".join(
            chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x20, 0x2FFF)])) for _ in range(60)
        )
        for _ in range(50)
    ]
    return AWKWARD + noise + [chapters()[i].text for i in (0, 39, 134)]


def test_ids_equal_transformers(ours: Tokenizer, theirs) -> None:
    for text in texts():
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False) == text


def test_ids_equal_the_merge_list_applied_by_hand(ours: Tokenizer) -> None:
    """GPT-2's byte-pair encoding from its definition; the patterns are llama.cpp's "smollm"."""
    import json

    model = json.loads((fetch.fetch() / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # written as they are
    odd = [byte for byte in range(256) if byte not in plain]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(odd)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    @cache
    def merge(word: str) -> tuple[int, ...]:
        parts = [letter[byte] for byte in word.encode()]
        while pairs := [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return tuple(model["vocab"][part] for part in parts)

    def by_hand(text: str) -> list[int]:
        pieces = [
            piece for piece in regex.split(r"(\p{N})", text) if piece
        ]  # every digit alone, first of all
        return [i for piece in pieces for word in words.findall(piece) for i in merge(word)]

    for text in texts():
        assert ours.encode(text) == by_hand(text)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "tiny"])
def test_chat_equals_transformers(name: str) -> None:
    from labkit.files import data_path

    folder = data_path("models/tiny") if name == "tiny" else fetch.fetch()
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    talk = [
        {"role": "user", "content": "What is a whale?"},
        {"role": "assistant", "content": "A fish.\n"},
        {"role": "user", "content": "Really? 100 %?"},
    ]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk], talk[:1]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat(messages, add_generation_prompt=prompt) == text
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(ours.chat(messages, add_generation_prompt=prompt)) == expected


def test_the_loaded_model_ends_where_its_tokenizer_does() -> None:
    model = load(seed=None)
    assert model.tokenizer.eos_ids == (model.tokenizer.special["<|im_end|>"],)
