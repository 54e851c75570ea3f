"""Is a value what its schema says, as Kubernetes' API server judges it?

The order is the server's: nulls that are not allowed go, defaults are filled in, and only then types, ranges,
formats, equal keys in lists and CEL rules are looked at. A field that the schema does not name is an error, as
it is under ``fieldValidation=Strict``. Ray Serve's schema, made from pydantic, uses the same words.
"""

from __future__ import annotations

import base64
import binascii
import copy
import difflib
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

from labkit.cluster.documents import Path

Schema = Mapping[str, Any]
Violation = tuple[Path, str]  # where, and what is wrong

METADATA = {"$ref": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
EMBEDDED = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": METADATA}
QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_INTEGERS = {"int32": 31, "int64": 63}
_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


@cache
def load(name: str) -> dict[str, Any]:
    """One of the files in ``schemas/``, by its name: ``kubernetes``, ``kuberay`` or ``serve``."""
    file = resources.files("labkit.cluster") / "schemas" / f"{name}.json.gz"
    content: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return content


def schema_of(kind: str) -> Schema | None:
    """The schema of ``group/version/Kind`` (``v1/Pod`` for the group without a name); None where there is none."""
    for name in ("kuberay", "kubernetes"):
        if kind in load(name)["kinds"]:
            schema: Schema = load(name)["kinds"][kind]
            return schema
    return None


def prepare(schema: Schema, value: Any) -> Any:
    """A copy of ``value`` as the server sees it: without the nulls of fields that may not be null, with the
    schema's defaults."""
    schema = _resolved(schema)
    if isinstance(value, list):
        return [prepare(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    others = schema.get("additionalProperties")
    found = {}
    for key, item in value.items():
        inner = _resolved(fields.get(key) or (others if isinstance(others, dict) else {}))
        known = key in fields or isinstance(others, dict)
        if item is None and known and not inner.get("nullable") and not _takes_null(inner):
            continue
        found[key] = prepare(inner, item)
    for key, inner in fields.items():
        if key not in found and "default" in inner:
            found[key] = prepare(inner, copy.deepcopy(inner["default"]))
    return found


def violations(schema: Schema, value: Any, path: Path = ()) -> Iterator[Violation]:
    """What is wrong with ``value``, which ``prepare`` has seen; nothing when it is as the schema says."""
    schema = _resolved(schema)
    if value is None and (schema.get("nullable") or _takes_null(schema)):
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield path, f"expected a whole number or a text, found {_shown(value)}"
            return
    elif "anyOf" in schema:
        yield from _any_of(schema["anyOf"], value, path)
        return
    elif "type" in schema and not _is(value, schema["type"]):
        yield path, f"expected {_WORDS[schema['type']]}, found {_shown(value)}"
        return
    yield from _scalar(schema, value, path)
    if isinstance(value, dict):
        yield from _object(schema, value, path)
    elif isinstance(value, list):
        yield from _list(schema, value, path)
    yield from _rules(schema, value, path)


def _resolved(schema: Schema) -> Schema:
    while "$ref" in schema:
        name = schema["$ref"]
        file = "kubernetes" if "." in name else "serve"
        schema = load(file)["definitions"][name]
    return schema


def _takes_null(schema: Schema) -> bool:
    """Whether null is a value here: where anything goes, or by Ray's ``anyOf: [..., null]``."""
    options = schema.get("anyOf", ())
    return not schema or {"type": "null"} in options


def _any_of(options: list[Schema], value: Any, path: Path) -> Iterator[Violation]:
    """Nothing if one of the options fits; else the complaints of the one whose type fits."""
    fitting = []
    for option in map(_resolved, options):
        complaints = list(violations(option, value, path))
        if not complaints:
            return
        if "type" in option and _is(value, option["type"]):
            fitting = complaints
    if fitting:
        yield from fitting
        return
    names = [_expected(option) for option in map(_resolved, options)]
    yield path, f"expected {' or '.join(names)}, found {_shown(value)}"


def _expected(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(repr(item) for item in schema["enum"])
    return _WORDS[schema["type"]]


def _object(schema: Schema, value: dict[str, Any], path: Path) -> Iterator[Violation]:
    fields = schema.get("properties", {})
    others = schema.get("additionalProperties")
    open_ = others is True or schema.get("x-kubernetes-preserve-unknown-fields") or not schema.get("type")
    if schema.get("x-kubernetes-embedded-resource"):
        fields = {**EMBEDDED, **fields}
    for key in schema.get("required", ()):
        if key not in value:
            yield (*path, key), "is missing, and is required here"
    for key, item in value.items():
        if key in fields:
            yield from violations(fields[key], item, (*path, key))
        elif isinstance(others, dict):
            yield from violations(others, item, (*path, key))
        elif not open_:
            yield (*path, key), unknown(key, fields)


def unknown(key: str, known: Mapping[str, Any]) -> str:
    """The message for a key that is not among ``known``, with the nearest one that is."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        name for name in known if name.lower() == key.lower()
    ]
    return f"unknown field {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _list(schema: Schema, value: list[Any], path: Path) -> Iterator[Violation]:
    for i, item in enumerate(value):
        yield from violations(schema.get("items", {}), item, (*path, i))
    if len(value) < schema.get("minItems", 0):
        yield path, f"expected at least {schema['minItems']} items, found {len(value)}"
    if len(value) > schema.get("maxItems", len(value)):
        yield path, f"expected at most {schema['maxItems']} items, found {len(value)}"
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("map", "set"):
        return
    keys = schema.get("x-kubernetes-list-map-keys", ())
    seen: dict[str, int] = {}
    for i, item in enumerate(value):
        if kind == "map" and not isinstance(item, dict):
            continue  # has been complained of as no mapping
        own = {key: item[key] for key in keys if key in item} if kind == "map" else item
        first = seen.setdefault(json.dumps(own, sort_keys=True), i)
        if first != i:
            said = ", ".join(f"{k}: {v}" for k, v in own.items()) if isinstance(own, dict) else repr(own)
            yield (
                (*path, i),
                f"{said or 'an item without a key'} stands in this list already, as item {first}",
            )


def _scalar(schema: Schema, value: Any, path: Path) -> Iterator[Violation]:
    if "enum" in schema and value not in schema["enum"]:
        listed = ", ".join(repr(item) for item in schema["enum"])
        yield path, f"expected one of {listed}; found {_shown(value)}"
    form = schema.get("format")
    if form == "quantity":
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            yield path, f"expected a quantity such as 500m or 2Gi, found {_shown(value)}"
        elif isinstance(value, str) and not QUANTITY.fullmatch(value):
            yield path, f"expected a quantity such as 500m or 2Gi, found {value!r}"
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        bits = _INTEGERS.get(form or "", 0)
        if bits and not -(2**bits) <= value < 2**bits:
            yield path, f"expected a number of {bits + 1} bits, found {value}"
        if value < schema.get("minimum", value):
            yield path, f"expected at least {schema['minimum']}, found {value}"
        if value > schema.get("maximum", value):
            yield path, f"expected at most {schema['maximum']}, found {value}"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield path, f"expected more than {schema['exclusiveMinimum']}, found {value}"
    if isinstance(value, str):
        yield from _text(schema, value, path)


def _text(schema: Schema, value: str, path: Path) -> Iterator[Violation]:
    if len(value) < schema.get("minLength", 0):
        yield path, f"expected at least {schema['minLength']} characters, found {len(value)}"
    if len(value) > schema.get("maxLength", len(value)):
        yield path, f"expected at most {schema['maxLength']} characters, found {len(value)}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        pattern = schema["pattern"]
        form = "a quantity such as 500m or 2Gi" if "[KMGTPE]i" in pattern else f"a text like {pattern}"
        yield path, f"expected {schema.get('x-expected', form)}, found {value!r}"
    if schema.get("format") == "date-time" and not _is_time(value):
        yield path, f"expected a time such as 2026-01-31T12:00:00Z, found {value!r}"
    if schema.get("format") == "byte":
        try:
            base64.b64decode(re.sub(r"[\r\n]", "", value), validate=True)
        except binascii.Error as error:
            yield path, f"expected base64, found {value[:20]!r} ({error}); plain text goes into stringData"


def _is_time(value: str) -> bool:
    if not _RFC3339.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        return False
    return True


def _rules(schema: Schema, value: Any, path: Path) -> Iterator[Violation]:
    """CEL rules. One about ``oldSelf`` compares with what the cluster has, so it is left to the cluster."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).execute({"self": value}):
            yield path, rule.get("message") or f"breaks the rule {rule['rule']}"


@cache
def _program(rule: str) -> Any:
    import cel

    return cel.compile(rule)


def _is(value: Any, type_: str) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    match type_:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        case "number":
            return isinstance(value, int | float)
        case _:
            return type_ == "null" and value is None


def _shown(value: Any) -> str:
    """A value in words, short enough for one line."""
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return f"{_WORDS['object' if isinstance(value, dict) else 'array']} of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return json.dumps(value)
