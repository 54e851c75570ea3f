"""Text to token ids and back, and the chat template; the ``tokenizers`` package does the merging."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers


class ChatText(str):
    """A conversation as the template writes it, with its token ids, which ``encode`` gives back."""

    ids: list[int]


class Tokenizer:
    """A ``tokenizer.json`` with the chat template and special tokens that stand in the files beside it.

    ``encode`` treats its text as a person's words: ``<|im_end|>`` written by a user is ten ordinary
    characters, never the token that ends a message. Such tokens come from ``encode(chat(messages))``,
    where the template put them and nowhere else, and from ``encode(text, special=True)`` for a text that
    one has composed oneself.
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
        # The same rules without special tokens, for text from outside. Two objects, because a switch on
        # one would change what another thread is encoding.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        self.chat_template = chat_template
        self.eos_ids = tuple(eos_ids)
        self.bos_token, self.eos_token = bos_token, eos_token

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """Read ``tokenizer.json`` and, where there, ``tokenizer_config.json`` and ``chat_template.jinja``.

        eos_ids are the model's (``ModelConfig.eos_ids``); the tokenizer's own end token is added to them.
        Raises FileNotFoundError when there is no tokenizer.json, ValueError when it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; labkit reads the fast format only: save the tokenizer once with "
                "transformers' AutoTokenizer.save_pretrained and put its tokenizer.json there"
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

        What ``chat`` returned gets the ids that belong to it. Nothing is added in front or behind.
        """
        if isinstance(text, ChatText):
            return list(text.ids)
        backend = self._backend if special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of the ids; bytes that are no whole character become U+FFFD.

        ``special=False`` leaves special tokens out.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def stream(self, *, special: bool = False) -> TokenStream:
        """A decoder for one text whose tokens come one by one."""
        return TokenStream(self, special)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> ChatText:
        """The conversation as the model's template writes it; ``encode`` it to feed the model.

        messages: dicts with ``role`` and ``content``. Special tokens come from the template alone: those
        that someone wrote into a message are encoded as the characters they are. Raises ValueError when
        the model has no template, or when the template refuses the messages.
        """
        shielded, stand_ins = self._shield(messages)
        rendered = self._render(shielded, add_generation_prompt)
        text = ChatText(_replace(rendered, stand_ins))
        if text == rendered:
            text.ids = self.encode(rendered, special=True)
            return text
        text.ids = []
        for piece in self._special_pattern.split(rendered):
            if piece in self.special:
                text.ids.append(self.special[piece])
            elif piece:
                text.ids += self.encode(_replace(piece, stand_ins))
        return text

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _shield(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], dict[str, str]]:
        """The messages, special tokens replaced by private-use characters that occur nowhere in them."""
        if not self.special:
            return list(messages), {}
        taken = set(json.dumps(messages, ensure_ascii=False, default=str))
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
        stand_in = dict(zip(self.special, free, strict=False))

        def shield(value: Any) -> Any:
            if isinstance(value, str):
                return self._special_pattern.sub(lambda match: stand_in[match[0]], value)
            if isinstance(value, Mapping):
                return {key: shield(inner) for key, inner in value.items()}
            return [shield(inner) for inner in value] if isinstance(value, list | tuple) else value

        return [shield(message) for message in messages], {char: token for token, char in stand_in.items()}

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; give it plain text, or use an instruct model"
            )

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        # The settings and names that transformers gives chat templates, which are written against it.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template)

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
                tools=None,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


class TokenStream:
    """Text from tokens that come one by one, whole characters only.

    The pieces that ``push`` and ``finish`` return, joined, are what ``decode`` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[
            int
        ] = []  # the last token handed out, for its influence on the next, and those held back
        self._handed_out = 0  # how many of them

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        self._ids.append(int(token))
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._hand_out(text)

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""
        return self._hand_out(self._new_text())

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[: self._handed_out], special=self._special)
        return decode(self._ids, special=self._special)[len(before) :]

    def _hand_out(self, text: str) -> str:
        self._ids = self._ids[self._handed_out :] or self._ids
        self._handed_out = len(self._ids)
        return text


def _replace(text: str, stand_ins: Mapping[str, str]) -> str:
    for stand_in, token in stand_ins.items():
        text = text.replace(stand_in, token)
    return text


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
