"""What README.md and CONTRIBUTING.md tell people to type exists, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main

from labkit.bench.measure import Row
from labkit.bench.suite import markdown
from labkit.cli import app
from labkit.course.lessons import names

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
COMMAND = typer.main.get_command(app)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code(name: str) -> list[str]:
    """Everything that stands as code: between backquotes, and in indented blocks."""
    spans = re.findall(r"`([^`\n]+)`", text(name))
    blocks = [line.strip().split("  #")[0] for line in text(name).splitlines() if line.startswith("    ")]
    return spans + blocks


def make_targets() -> set[str]:
    database = subprocess.run(["make", "-pRrn", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    return set(re.findall(r"^([a-z][a-z-]*):", database, flags=re.MULTILINE))


@pytest.mark.needs("make")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = make_targets()
    commands = [shlex.split(line) for line in code(name) if re.match(r"make [a-z]", line)]
    assert commands
    for command in commands:
        words = [word for word in command[1:] if "=" not in word]
        assert set(words) <= targets, command
        variables = {word.split("=")[0] for word in command[1:] if "=" in word}
        assert variables <= {"ARGS", "PYTHON", "TORCH_BACKEND"}, command


@pytest.mark.parametrize("name", DOCUMENTS)
def test_labkit_commands_exist_with_those_options(name: str) -> None:
    lines = [line for line in code(name) if re.match(r"(\.venv/bin/)?labkit [a-z]", line)]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        command = COMMAND
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{line}: no command {words[0]!r}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        for option in (word for word in words if word.startswith("--")):
            assert option in known, f"{line}: no option {option}"


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text(name))
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []


def test_paths_of_the_map_exist() -> None:
    paths = [
        span
        for span in re.findall(r"`([^`\s]+)`", text("CONTRIBUTING.md"))
        if "/" in span and "{" not in span
    ]
    paths = [path for path in paths if not path.startswith(".venv/")]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_tier_and_every_part_of_the_package_is_on_the_map() -> None:
    spans = set(re.findall(r"`([^`]+)`", text("CONTRIBUTING.md")))
    parts = {f"labkit/{path.parent.name}/" for path in (ROOT / "labkit").glob("*/__init__.py")}
    tiers = {f"tests/{path.name}/" for path in (ROOT / "tests").iterdir() if list(path.glob("*.py"))}
    assert parts | tiers <= spans


def test_the_course_table_tells_what_is_there() -> None:
    """A notebook that exists is linked, one that does not is marked as planned, and none is left out."""
    rows = dict(re.findall(r"^\| (\d\d) \| (.+) \|$", text("README.md"), flags=re.MULTILINE))
    assert sorted(rows) == [f"{number:02}" for number in range(28)]
    there = {path.name[:2]: path for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    for number, row in rows.items():
        if number in there:
            assert f"(notebooks/{there[number].name})" in row and "planned" not in row, number
        else:
            assert row.endswith("(planned)"), number
    assert {name[1:3] for name in names()} <= set(there), "a lesson without its notebook"


def test_the_two_commands_stand_on_top() -> None:
    lines = [line.split("#")[0].strip() for line in text("README.md").splitlines()[:6]]
    assert [line for line in lines if line and not line.startswith("#")][:2] == ["make lab", "make test"]


def test_the_settings_are_the_ones_that_are_read() -> None:
    table = set(re.findall(r"^\| `(LABKIT_[A-Z_]+)` \|", text("README.md"), flags=re.MULTILINE))
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "labkit").rglob("*.py"))
    read = set(re.findall(r"\"(LABKIT_[A-Z_]+)\"", source))
    marks_a_process = {"LABKIT_RAY"}  # set by the lab itself, not by a person
    assert table == read - marks_a_process


def test_the_python_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABKIT_MODEL", "tiny")
    (example,) = re.findall(r"```python\n(.*?)```", text("README.md"), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "w4a16-gptq-g64" in capsys.readouterr().out


def test_the_table_of_speeds_is_that_of_the_measurements() -> None:
    rows = [Row(**row) for row in json.loads(text("data/measurements/bench.json"))]
    assert markdown(rows) in text("README.md")


def test_what_is_said_of_another_gpu_is_in_its_measurements() -> None:
    rows = [Row(**row) for row in json.loads(text("data/measurements/bench_h200.json"))]

    def spread(beginning: str) -> str:
        of = [r for r in rows if r.work.startswith(beginning) and r.peer_name == "torch bf16"]
        ratios = [r.ratio for r in of if r.ratio and (r.work.endswith(" int4 g64") or beginning == "attention")]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    said = " ".join(text("README.md").split())
    assert f"{spread('1 row ')} times as fast with 1 row and {spread('16 rows')} with 16" in said
    assert f"attention {spread('attention')}" in said


def test_the_table_of_a_gpu_is_that_of_the_measurements() -> None:
    rows = [Row(**row) for row in json.loads(text("data/measurements/bench_h100.json"))]
    goals = [row for row in rows if row.goal is not None and not row.work.endswith((" asym", "nf4 g64"))]
    assert markdown(goals + [row for row in rows if row.work.startswith("attention")]) in text("README.md")
