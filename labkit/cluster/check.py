"""Is a manifest what the cluster will take? Without a cluster, with line and path of each error.

    for verdict in check("cluster/base"):
        print(verdict)

Kubernetes' own kinds and KubeRay's are held against their schemas, KubeRay's also against the rules of its
operator, and the Serve configuration of a RayService against Ray's model, in which a misspelt key is an error.
The sources and versions stand in ``schemas/``. What only a cluster can know is left to it: whether a name is
taken, a secret exists, a quota allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from labkit.cluster import documents, kubernetes_rules, operator_rules, serve_config
from labkit.cluster.documents import Document, NotYaml, show
from labkit.cluster.structural import Violation, prepare, schema_of, violations

Source = str | Path | Mapping[str, Any]
State = Literal["valid", "invalid", "no schema"]
SERVE_CONFIG = ("spec", "serveConfigV2")


@dataclass(frozen=True)
class Problem:
    """One error. line counts from 1 and is None for data without a file; path is empty for the whole document."""

    line: int | None
    path: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one object. ``dataclasses.asdict`` makes JSON of it.

    "no schema" is not "valid": nobody has looked at the object.
    """

    file: str | None
    line: int | None
    path: str
    kind: str
    name: str
    state: State
    errors: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        """The state on one line, each error on one more: ``file:line: path: message``."""
        place = f"{self.file or 'manifest'}:{self.line}" if self.line else self.file or "manifest"
        lines = [f"{place}: {self.kind or 'unknown kind'} {self.name}: {self.state}"]
        for error in self.errors:
            place = f"{self.file or 'manifest'}:{error.line}" if error.line else self.file or "manifest"
            lines.append(f"  {place}: {error.path + ': ' if error.path else ''}{error.message}")
        return "\n".join(lines)


def check(sources: Source | Iterable[Source]) -> list[Verdict]:
    """A verdict on each object in files, folders (their *.yaml and *.yml, all levels) and manifests as dicts.

    Raises FileNotFoundError for a path that is not there, and UnicodeDecodeError for a file that is no text.
    """
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    verdicts: list[Verdict] = []
    for source in sources:
        if isinstance(source, Mapping):
            verdicts.append(judge(Document(dict(source))))
        else:
            for file in _files(Path(source)):
                verdicts += check_text(file.read_text(encoding="utf-8"), str(file))
    return verdicts


def check_text(text: str, file: str | None = None) -> list[Verdict]:
    """A verdict on each document of a YAML text; where it is no YAML, one that says so."""
    verdicts = []
    try:
        for document in documents.documents(text):
            verdicts.append(replace(judge(document), file=file))
    except NotYaml as error:
        wrong = Problem(error.line, "", f"is no YAML: {error}")
        verdicts.append(Verdict(file, error.line, "", "", "", "invalid", [wrong]))
    return verdicts


def judge(document: Document) -> Verdict:
    """The verdict on one document."""
    data = document.data
    kind, name = ("", "")
    if isinstance(data, dict):
        metadata = data.get("metadata")
        kind = str(data.get("kind") or "")
        name = str((metadata if isinstance(metadata, dict) else {}).get("name") or "")
    verdict = Verdict(None, document.line(()), "", kind, name, "valid")
    errors = [Problem(line, show(path), message) for path, line, message in document.faults]
    found = _violations(document)
    if found is None and not errors:
        return replace(verdict, state="no schema")
    errors += [Problem(line, path, message) for line, path, message in found or ()]
    errors.sort(key=lambda error: error.line or 0)
    return replace(verdict, state="invalid" if errors else "valid", errors=errors)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(
            file for file in path.rglob("*") if file.suffix in (".yaml", ".yml") and file.is_file()
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; expected a manifest or a folder of manifests")
    return [path]


def _violations(document: Document) -> list[tuple[int | None, str, str]] | None:
    """(line, path, message) of all that is wrong; None where there is no schema for the kind."""
    data = document.data
    wrong: list[Violation] = []
    if not isinstance(data, dict):
        wrong = [((), "expected a mapping with apiVersion, kind and metadata")]
    else:
        for key in ("apiVersion", "kind"):
            if not isinstance(data.get(key), str) or not data[key]:
                wrong.append(((key,), "expected a text; each object says its apiVersion and kind"))
    if wrong:
        return _placed(document, wrong)
    schema = schema_of(f"{data['apiVersion']}/{data['kind']}")
    if schema is None:
        return None
    prepared = prepare(schema, data)
    wrong = list(violations(schema, prepared)) + list(kubernetes_rules.metadata(prepared))
    if not wrong:  # the rules rely on the shape
        wrong += kubernetes_rules.violations(data["apiVersion"], data["kind"], prepared)
        if data["apiVersion"].startswith("ray.io/"):
            wrong += operator_rules.violations(data["kind"], prepared)
    placed = _placed(document, wrong)
    if data["apiVersion"].startswith("ray.io/") and data["kind"] == "RayService":
        placed += _serve_config(document, prepared)
    return placed


def _placed(document: Document, wrong: Iterable[Violation]) -> list[tuple[int | None, str, str]]:
    return [(document.line(path), show(path), message) for path, message in wrong]


def _serve_config(document: Document, prepared: dict[str, Any]) -> Iterator[tuple[int | None, str, str]]:
    """What is wrong inside the text of serveConfigV2, at its lines of the file."""
    spec = prepared.get("spec")
    text = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    if not isinstance(text, str):
        return
    block = document.blocks.get(
        SERVE_CONFIG
    )  # only in a `|` block do its lines stand in the file as they are
    outside = show(SERVE_CONFIG)

    def line(inside: int | None) -> int | None:
        return document.line(SERVE_CONFIG) if block is None or inside is None else block + inside - 1

    try:
        found = list(documents.documents(text))
    except NotYaml as error:
        yield line(error.line), outside, f"is no YAML: {error}"
        return
    if len(found) != 1:
        yield line(None), outside, f"expected one document with `applications`, found {len(found)}"
        return
    for path, at, message in found[0].faults:
        yield line(at), f"{outside}: {show(path)}", message
    for path, message in serve_config.violations(found[0].data):
        where = f"{outside}: {show(path)}" if path else outside
        yield line(found[0].line(path)), where, message
