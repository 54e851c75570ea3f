"""YAML as Kubernetes reads it, with the line of everything in it.

Kubernetes' reader (Go's YAML 2) takes ``y``, ``n``, ``on`` and ``off`` for booleans, ``017`` and ``0o17`` for
fifteen, ``1e3`` for a number, and ``1:30`` and dates for text; PyYAML's own rules differ in each of these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_INT = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """One document of a YAML file.

    data    plain data: dict, list, str, int, float, bool, None
    lines   the line, counted from 1, of each path
    blocks  for each text in a ``|`` block: the line where the text itself begins
    faults  (path, line, message) of what is YAML but no manifest, such as a key that stands twice
    """

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    blocks: dict[Path, int] = field(default_factory=dict)
    faults: list[tuple[Path, int, str]] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of ``path``, or of the nearest thing around it; None for data that came from no file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


class NotYaml(ValueError):
    """Text that is no YAML. ``line`` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def documents(text: str) -> Iterator[Document]:
    """The documents of a YAML text, in order, without the empty ones.

    Raises NotYaml, with the line, for text that cannot be read.
    """
    try:
        for root in yaml.compose_all(text, Loader=_LOADER):
            reader = _Reader()
            data = reader.read(root, ())
            if data is not None:
                yield Document(data, reader.lines, reader.blocks, reader.faults)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotYaml(mark.line + 1 if mark else 1, error.problem or str(error)) from None
    except yaml.reader.ReaderError as error:  # a character that YAML forbids
        raise NotYaml(text.count("\n", 0, error.position) + 1, error.reason) from None


def show(path: Path) -> str:
    """A path as people write it: ``spec.containers[0].image``; a key with a dot in it stands in brackets."""
    text = ""
    for step in path:
        plain = isinstance(step, str) and re.fullmatch(r"[\w-]+", step)
        text += f".{step}" if plain else f"[{step}]"
    return text.removeprefix(".")


class _Reader:
    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.blocks: dict[Path, int] = {}
        self.faults: list[tuple[Path, int, str]] = []
        self._open: set[int] = set()  # ids of the nodes being read, so that an alias to itself is seen

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            self._fault(node, path, "an alias that contains itself")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = self._key(key_node, path)
            if key in found:
                first = self.lines[(*path, key)]
                self._fault(key_node, (*path, key), f"key {key!r} stands twice, first on line {first}")
                continue
            self.lines.setdefault((*path, key), key_node.start_mark.line + 1)
            found[key] = self.read(value_node, (*path, key))
        for base in merged:  # `<<: *anchor`; what stands here itself goes before
            if not isinstance(base, yaml.MappingNode):
                self._fault(base, path, "`<<` expects a mapping")
                continue
            for key, value in self._mapping(base, path).items():
                found.setdefault(key, value)
        return found

    def _key(self, node: yaml.Node, path: Path) -> str:
        key = self._scalar(node, path) if isinstance(node, yaml.ScalarNode) else None
        if key is None:
            self._fault(node, path, "expected a text as key")
            return node.value if isinstance(node, yaml.ScalarNode) else "?"
        return str(key).lower() if isinstance(key, bool) else str(key)

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        if node.style == "|":
            self.blocks[path] = node.start_mark.line + 2
        if node.style or self._is_text_by_tag(node):
            return node.value
        value = resolve(node.value)
        if isinstance(value, float) and not math.isfinite(value):
            self._fault(node, path, f"JSON has no {node.value}")
            return None
        return value

    def _is_text_by_tag(self, node: yaml.ScalarNode) -> bool:
        """``!!str 5``: the tag that stands there, not the one that PyYAML would have given."""
        implied = _RESOLVER.resolve(yaml.ScalarNode, node.value, (True, False))
        return bool(node.tag == f"{_TAG}str" != implied)

    def _fault(self, node: yaml.Node, path: Path, message: str) -> None:
        self.faults.append((path, node.start_mark.line + 1, message))


def resolve(text: str) -> Any:
    """What Kubernetes makes of a plain scalar: None, a boolean, a number or a text."""
    if text in _WORDS:
        return _WORDS[text]
    digits = text.replace("_", "")
    if text[:1] not in "+-.0123456789" or not text:
        return text
    if match := _INT.fullmatch(digits):
        sign, base16, base2, base8, base10 = match.groups()
        number = int(
            base16 or base2 or base8 or base10, 16 if base16 else 2 if base2 else 8 if base8 else 10
        )
        number = -number if sign == "-" else number
        if -(2**63) <= number < 2**64:
            return number
    if _FLOAT.fullmatch(digits):
        real = float(digits)
        return int(real) if real.is_integer() and abs(real) < 1e21 else real  # as JSON writes it
    return text
