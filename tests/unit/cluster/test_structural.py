"""Structural schemas, word by word: what Kubernetes' documentation says of each, on schemas of one field."""

from __future__ import annotations

from typing import Any

import pytest

from labkit.cluster.structural import prepare, violations

ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "port": {"type": "integer"}}}
EMBEDDED = {"type": "object", "x-kubernetes-embedded-resource": True}


def keyed(*keys: str) -> dict[str, Any]:
    """A list of ITEMs in which no two are equal in ``keys``."""
    return {
        "type": "array",
        "items": ITEM,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": list(keys),
    }


TEXTS = {"type": "array", "items": {"type": "string"}}


def wrong(schema: dict[str, Any], value: Any) -> list[tuple[str | int, ...]]:
    return [path for path, _ in violations(schema, prepare(schema, value))]


def of(field: dict[str, Any], **words: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": field}, **words}


CASES: list[tuple[dict[str, Any], Any, list[tuple[str | int, ...]]]] = [
    (of({"type": "string"}), {"b": 1}, [("b",)]),
    (of({"type": "string"}, **{"x-kubernetes-preserve-unknown-fields": True}), {"b": 1}, []),
    (of({"type": "string"}, **{"x-kubernetes-preserve-unknown-fields": True}), {"a": 1, "b": 1}, [("a",)]),
    (of({"type": "string"}, required=["a"]), {"a": None}, [("a",)]),  # pruned, then missing
    (of({"type": "string", "nullable": True}, required=["a"]), {"a": None}, []),
    (of({"type": "string", "default": "x"}, required=["a"]), {"a": None}, []),
    (of({"type": "object", "properties": {"b": {"default": 1}}, "required": ["b"]}), {"a": {}}, []),
    (of({"x-kubernetes-int-or-string": True}), {"a": 1}, []),
    (of({"x-kubernetes-int-or-string": True}), {"a": "1"}, []),
    (of({"x-kubernetes-int-or-string": True}), {"a": 1.5}, [("a",)]),
    (of({"x-kubernetes-int-or-string": True}), {"a": True}, [("a",)]),
    (of(EMBEDDED), {"a": {"kind": "Pod", "metadata": {"name": "x"}}}, []),
    (of(EMBEDDED), {"a": {"metadata": {"nam": "x"}}}, [("a", "metadata", "nam")]),
    (of(EMBEDDED), {"a": {"spec": 1}}, [("a", "spec")]),
    (of(keyed("name")),
     {"a": [{"name": "x", "port": 1}, {"name": "x", "port": 2}, {"name": "y"}]}, [("a", 1)]),
    (of(keyed("name", "port")),
     {"a": [{"name": "x", "port": 1}, {"name": "x", "port": 2}]}, []),
    (of({**TEXTS, "x-kubernetes-list-type": "set"}), {"a": ["x", "y", "x"]}, [("a", 2)]),
    (of(TEXTS), {"a": ["x", "x"]}, []),
    (of(TEXTS), {"a": ["x", None]}, [("a", 1)]),
    (of({"type": "integer", "format": "int32"}), {"a": 2**31 - 1}, []),
    (of({"type": "integer", "format": "int32"}), {"a": 2**31}, [("a",)]),
    (of({"type": "integer", "format": "int32"}), {"a": -(2**31)}, []),
    (of({"type": "integer", "minimum": 1, "maximum": 3}), {"a": 0}, [("a",)]),
    (of({"type": "integer", "minimum": 1, "maximum": 3}), {"a": 3}, []),
    (of({"type": "integer", "minimum": 1, "maximum": 3}), {"a": 4}, [("a",)]),
    (of({"type": "number", "exclusiveMinimum": 0}), {"a": 0}, [("a",)]),
    (of({"type": "string", "minLength": 1, "maxLength": 2}), {"a": ""}, [("a",)]),
    (of({"type": "string", "minLength": 1, "maxLength": 2}), {"a": "ab"}, []),
    (of({"type": "string", "minLength": 1, "maxLength": 2}), {"a": "abc"}, [("a",)]),
    (of({"type": "string", "pattern": "b"}), {"a": "abc"}, []),  # not anchored
    (of({"type": "string", "enum": ["x"]}), {"a": "y"}, [("a",)]),
    (of({"format": "quantity"}), {"a": "1.5Gi"}, []),
    (of({"format": "quantity"}), {"a": 0.5}, []),
    (of({"format": "quantity"}), {"a": "1 Gi"}, [("a",)]),
    (of({"format": "quantity"}), {"a": True}, [("a",)]),
    (of({"type": "string", "format": "date-time"}), {"a": "2026-01-31T12:00:00Z"}, []),
    (of({"type": "string", "format": "date-time"}), {"a": "2026-02-31T12:00:00Z"}, [("a",)]),
    (of({"type": "string", "format": "date-time"}), {"a": "2026-01-31"}, [("a",)]),
    (of({"type": "string", "format": "byte"}), {"a": "c2VjcmV0"}, []),
    (of({"type": "string", "format": "byte"}), {"a": "secret!"}, [("a",)]),
    (of({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}), {"a": None}, []),
    (of({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}), {"a": 0}, [("a",)]),
    (of({"type": "object", "additionalProperties": {"type": "string"}}), {"a": {"x": "y", "z": 1}}, [("a", "z")]),
    (of({"type": "integer"}, **{"x-kubernetes-validations": [{"rule": "self.a > 1"}]}), {"a": 1}, [()]),
    (of({"type": "integer"}, **{"x-kubernetes-validations": [{"rule": "self.a > 1"}]}), {"a": 2}, []),
    (of({"type": "integer"}, **{"x-kubernetes-validations": [{"rule": "self == oldSelf"}]}), {"a": 1}, []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value", "expected"), CASES)
def test_each_word_of_a_schema(
    schema: dict[str, Any], value: Any, expected: list[tuple[str | int, ...]]
) -> None:
    assert wrong(schema, value) == expected


def test_what_is_judged_is_left_as_it_was() -> None:
    value = {"a": None}
    assert prepare(of({"type": "string", "default": "x"}), value) == {"a": "x"}
    assert value == {"a": None}
