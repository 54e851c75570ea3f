"""Text to token ids and back, and the chat template. The merging itself is done by the ``tokenizers`` package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers


class Tokenizer:
    """A ``tokenizer.json`` with the chat template and special tokens that stand in the files beside it.

    ``encode`` treats its text as a person's words: ``<|im_end|>`` written by a user is eight ordinary characters or
    so, never the token that ends a message. Only ``chat_ids`` makes such tokens, where the template put them, and
    ``encode(text, special=True)`` for a text that one has composed oneself.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        eos_ids: Sequence[int] = (),
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        self._backend = backend
        # The same rules without special tokens, for text from outside. Two objects, because a switch on one would
        # change what another thread is encoding.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self.chat_template = chat_template
        self.eos_ids = tuple(eos_ids)
        self.bos_token, self.eos_token = bos_token, eos_token

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """Read ``tokenizer.json`` and, where they are, ``tokenizer_config.json`` and ``chat_template.jinja``.

        eos_ids are the model's (``ModelConfig.eos_ids``); the tokenizer's own end token is added to them.
        Raises FileNotFoundError when there is no tokenizer.json, ValueError when it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; labkit reads the fast format only: save the tokenizer once with transformers' "
                "AutoTokenizer.save_pretrained and put its tokenizer.json there"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
        config: dict[str, Any] = {}
        if (extra := folder / "tokenizer_config.json").exists():
            config = json.loads(extra.read_text(encoding="utf-8"))
        template = config.get("chat_template")
        if isinstance(template, list):  # several templates by name, as some models have them
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if (extra := folder / "chat_template.jinja").exists():
            template = extra.read_text(encoding="utf-8")
        bos, eos = (_content(config.get(f"{kind}_token")) for kind in ("bos", "eos"))
        ids = list(eos_ids)
        if eos is not None and (own := backend.token_to_id(eos)) is not None and own not in ids:
            ids.append(own)
        return cls(backend, chat_template=template, eos_ids=ids, bos_token=bos, eos_token=eos)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers and vLLM read too."""
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included. The model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens by their text."""
        return {t.content: i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of the text. With ``special``, special tokens written in it become those tokens.

        Nothing is added in front or behind.
        """
        backend = self._backend if special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of the ids; bytes that are no whole character become U+FFFD. ``special=False`` leaves those out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def stream(self, *, special: bool = False) -> TokenStream:
        """A decoder for one text whose tokens come one by one."""
        return TokenStream(self, special)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it, to look at; ``chat_ids`` is what the model is fed.

        messages: dicts with ``role`` and ``content``. Raises ValueError when the model has no template, or when the
        template refuses the messages.
        """
        return self._render(messages, add_generation_prompt)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the conversation. Special tokens come from the template alone, never from a content."""
        safe: list[Mapping[str, Any]] = []
        swapped: dict[str, str] = {}
        for message in messages:
            content = message.get("content")
            safe.append({**message, "content": self._shield(content, swapped)} if isinstance(content, str) else message)
        text = self._render(safe, add_generation_prompt)
        if not swapped:
            return self.encode(text, special=True)
        return self._encode_shielded(text, swapped)

    def _shield(self, content: str, swapped: dict[str, str]) -> str:
        # A special token in a message is given a stand-in of private-use characters before the template sees it.
        raise NotImplementedError

    def _encode_shielded(self, text: str, swapped: dict[str, str]) -> list[int]:
        raise NotImplementedError

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        raise NotImplementedError


class TokenStream:
    pass


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
