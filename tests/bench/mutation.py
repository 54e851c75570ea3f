"""How many small faults in labkit.quant turn a test red?

    python tests/bench/mutation.py --out data/measurements/mutation.json

Each mutant is one change to one file: another operator, a constant one larger, another axis, a comparison turned
round, a clamp or a rounding dropped, a condition negated. It is put into a copy of the project, and that copy's
tests/unit/quant run until the first that fails, those of the file's own name first. A quarter to half an hour; the
same seed draws the same mutants of the same sources. With --resume those in --out are not run again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit.files import whole_file
from labkit.models.ladder import measured_on

ROOT = Path(__file__).resolve().parents[2]
FILES = ("spec", "grid", "packing", "rtn", "formats", "gptq")
LIMIT_S = 300  # what a mutant makes run for ever counts as noticed
# The tests of a file first; then all others.
FIRST = {"grid": ("test_integers", "test_formats", "test_rtn")}

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
DROPPED = ("clamp", "round", "abs", "floor", "sign", "sqrt")
AXES = ("dim", "axis")


@dataclass(frozen=True)
class Mutant:
    """A change to one file: which, on which line, what it says before and after, and the whole text."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}: {self.before} -> {self.after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", action="append", help=f"default: {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    every = [m for name in args.file or FILES for m in mutants(name)]
    chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    known = json.loads(args.out.read_text())["mutants"] if args.resume and args.out.exists() else []
    rows = {row["mutant"]: row for row in known}
    with tempfile.TemporaryDirectory(prefix="labkit-mutants-") as folder:
        copy = Path(folder)
        for part in ("labkit", "tests", "data", "pyproject.toml"):
            place = ROOT / part
            shutil.copytree(place, copy / part) if place.is_dir() else shutil.copy(place, copy / part)
        # What a dropped call becomes, wherever it stands.
        (copy / "sitecustomize.py").write_text("import builtins\n\nbuiltins._same = lambda x: x\n")
        assert run(copy, "spec") is None, "the tests must pass before anything is changed"
        for number, mutant in enumerate(chosen, 1):
            if mutant.key not in rows:
                target = copy / "labkit" / "quant" / f"{mutant.file}.py"
                whole = target.read_text()
                target.write_text(mutant.text)
                began = time.monotonic()
                red = run(copy, mutant.file)
                target.write_text(whole)
                rows[mutant.key] = {"mutant": mutant.key, "kind": mutant.kind, "red": red}
                print(f"{number}/{len(chosen)} {time.monotonic() - began:4.0f} s  {mutant.key}  {red or 'SURVIVED'}",
                      flush=True)  # fmt: skip
            write(args.out, args, [rows[m.key] for m in chosen if m.key in rows], len(every))


def mutants(name: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    source = (ROOT / "labkit" / "quant" / f"{name}.py").read_text()
    count = sum(1 for _ in places(ast.parse(source)))
    for index in range(count):
        tree = ast.parse(source)
        node, kind, change = list(places(tree))[index]
        line, before = node.lineno, ast.unparse(node)  # type: ignore[attr-defined]
        change()
        yield Mutant(name, line, kind, before, ast.unparse(node), ast.unparse(tree))


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, object]]:
    """Each place that can be changed: the node to show, the kind of change, and a function that makes it."""
    skipped = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            skipped.update(ast.walk(node))
        if isinstance(node, ast.FunctionDef):
            for annotation in [
                node.returns,
                *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)),
            ]:
                skipped.update(ast.walk(annotation) if annotation else ())
            for call in node.decorator_list:
                skipped.update(ast.walk(call))
        if isinstance(node, ast.AnnAssign):
            skipped.update(ast.walk(node.annotation))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "TypeVar"):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node not in skipped:
            yield from _changes(node)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        to = OPERATORS[type(node.op)]
        yield node, "operator", lambda: setattr(node, "op", to())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, "sign", lambda: setattr(node, "op", ast.UAdd())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        to = COMPARISONS[type(node.ops[0])]
        yield node, "comparison", lambda: node.ops.__setitem__(0, to())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        test = node.test
        shown = ast.Expr(test)
        ast.copy_location(shown, test)

        def negate() -> None:
            node.test = ast.UnaryOp(ast.Not(), test)
            shown.value = node.test

        yield shown, "condition", negate
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = node.value
        to_value = (
            (not value)
            if isinstance(value, bool)
            else value + 1
            if isinstance(value, int)
            else value * 2 or 1.0
        )
        yield node, "constant", lambda: setattr(node, "value", to_value)
    if isinstance(node, ast.Call):
        for word in node.keywords:
            if word.arg in AXES and isinstance(word.value, ast.UnaryOp):
                yield node, "axis", lambda word=word: setattr(word, "value", ast.Constant(0))
        inside = (
            node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED else None
        )
        if inside is not None:
            kept = node.args[0] if ast.unparse(inside) == "torch" and node.args else inside

            def drop() -> None:
                node.func, node.args, node.keywords = ast.Name("_same", ast.Load()), [kept], []

            yield node, "dropped", drop


def run(copy: Path, name: str) -> str | None:
    """The first test of the copy that fails, or None."""
    folder = copy / "tests" / "unit" / "quant"
    first = [folder / f"{word}.py" for word in FIRST.get(name, (f"test_{name}",))]
    order = [str(p) for p in first if p.exists()]
    order += [str(p) for p in sorted(folder.glob("test_*.py")) if str(p) not in order]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--tb=no",
    ]
    command += order
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return "ran for ever"
    if done.returncode == 0:
        return None
    named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return named[0].partition(" - ")[0] if named else (done.stdout + done.stderr)[-200:]


def write(out: Path, args: argparse.Namespace, rows: list[dict[str, object]], of: int) -> None:
    red = sum(row["red"] is not None for row in rows)
    by_kind = Counter(str(row["kind"]) for row in rows)
    tree = {
        "what": "mutants of labkit.quant that turn a test of tests/unit/quant red",
        "command": f"python tests/bench/mutation.py --count {args.count} --seed {args.seed} --out {args.out.name}",
        **measured_on(),
        "possible": of,
        "tried": len(rows),
        "red": red,
        "share": red / max(len(rows), 1),
        "kinds": dict(sorted(by_kind.items())),
        "survived": [row["mutant"] for row in rows if row["red"] is None],
        "mutants": rows,
    }
    with whole_file(out) as part:
        part.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
