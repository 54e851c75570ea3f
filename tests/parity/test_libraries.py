"""The record of parity with torchao, optimum-quanto and llm-compressor, which are too heavy for this environment.

It is of the versions that are pinned, says why where something differs, and is about the codes that labkit makes today.
`make parity-libraries` makes it anew.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from library_layers import digest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = json.loads((ROOT / "data" / "measurements" / "parity.json").read_text(encoding="utf-8"))
ROWS: list[dict[str, Any]] = RECORD["rows"]
COMPARED = [row for row in ROWS if row["verdict"] != "not compared"]


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def name_of(row: dict[str, Any]) -> str:
    return f"{row['library']} {row['method']} {row['spec']} {row['options'] or ''} {row['function']}"


def test_it_was_measured_at_the_pinned_versions() -> None:
    wanted = pins(HERE / "libraries.txt")
    assert {"torchao", "optimum-quanto", "llmcompressor", "torch"} == set(wanted)
    versions = RECORD["versions"]
    assert {name: versions[name].split("+")[0] for name in wanted} == wanted
    assert wanted["torch"] == pins(ROOT / "constraints.txt")["torch"], "libraries.txt has another torch"


def test_every_method_meets_every_library_that_has_it() -> None:
    assert {(method, library) for method, cells in RECORD["matrix"].items() for library in cells} == {
        *(("rtn", library) for library in ("torchao", "optimum-quanto", "llm-compressor")),
        *(("hqq", library) for library in ("torchao", "optimum-quanto")),
        *(("gptq", library) for library in ("torchao", "llm-compressor")),
        *(("awq_scale", library) for library in ("torchao", "llm-compressor")),
    }


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_is_not_exact_has_its_reason(row: dict[str, Any]) -> None:
    assert row["verdict"] in ("exact", "within tolerance", "differs", "not compared")
    if row["verdict"] == "exact":
        assert row["codes_differing"] == row["scales_differing"] == row["zeros_differing"] == 0
        assert row["codes"] > 0 and "why" not in row
    elif row["verdict"] == "not compared":
        assert row["why"] and row["library_says"]
    else:
        assert row["why"] and row["left"] == 0, "done in the library's way, nothing may differ any more"


@cache
def digest_now(method: str, spec: str, options: str) -> str:
    return digest(method, spec, json.loads(options))


@pytest.mark.parametrize("row", COMPARED, ids=name_of)
def test_it_was_measured_with_the_codes_of_today(row: dict[str, Any]) -> None:
    now = digest_now(row["method"], row["spec"], json.dumps(row["options"], sort_keys=True))
    assert now == row["sha256"], (
        "labkit's codes have changed: run `make parity-libraries` and read what is new"
    )
