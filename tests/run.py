"""Run the tiers one after another, print each one's time, and close with what was skipped and why.

    python tests/run.py [TIER ...] [PYTEST ARGUMENTS]

without a tier runs them all; `make test` and `make test-unit` call it.

Tiers without Ray run two files at a time. Whatever starts Ray runs alone, in a network namespace that has
only the loopback interface, so that it neither finds nor disturbs another Ray.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIERS = ("unit", "parity", "notebooks", "serving", "browser", "cluster", "bench")
LONG = "long"
CELL_TIMEOUT = 600  # seconds; a guard only: a busy machine makes 20 seconds two hundred
TEST_TIMEOUT = 900
TWO_BY_TWO = ("-n", "2", "--dist", "loadfile")  # any other distribution scatters one notebook's cells


@dataclass(frozen=True)
class Phase:
    """One pytest process: what it runs, whether it runs alone in a network of its own, and what is made
    before where everything must run.
    """

    name: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()
    alone: bool = False
    before: tuple[tuple[str, ...], ...] = ()


@dataclass
class Outcome:
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.seconds += other.seconds


def main(arguments: list[str]) -> int:
    known = (*TIERS, LONG)
    tiers = [word for word in arguments if word in known]
    pytest_arguments = [word for word in arguments if word not in known]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="labkit-tests-") as scratch:
        for tier in tiers or TIERS:
            outcomes[tier] = Outcome()
            for phase in phases(tier):
                outcomes[tier].add(run(phase, pytest_arguments, Path(scratch)))
    return report(outcomes)


def phases(tier: str) -> list[Phase]:
    """The pytest processes of a tier, in order; none where it has no tests yet."""
    if tier == "notebooks":
        return notebook_phases()
    if not list((HERE / tier).rglob("test_*.py")):
        return []
    folder = f"tests/{tier}"
    if tier in ("unit", "parity"):
        return [Phase(tier, (folder,), TWO_BY_TWO)]
    if tier == "bench":
        return [Phase(tier, (folder,), ("-s",), alone=True)]
    if tier == "cluster":
        node = (sys.executable, "cluster/node", "build")
        image = (sys.executable, "cluster/images/build.py")
        return [Phase(tier, (folder,), before=(node, image))]
    return [Phase(tier, (folder,), alone=True)]


def notebook_phases() -> list[Phase]:
    found = []
    if list((HERE / "notebooks").rglob("test_*.py")):
        found.append(Phase("notebooks: exercises", ("tests/notebooks",), TWO_BY_TWO))
    nbval = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", str(CELL_TIMEOUT))
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    quiet = tuple(str(path.relative_to(ROOT)) for path in notebooks if not starts_ray(path))
    if quiet:
        found.append(Phase("notebooks: nbval", quiet, (*nbval, *TWO_BY_TWO)))
    for path in notebooks:
        if starts_ray(path):
            name = f"notebooks: nbval {path.stem}"
            found.append(Phase(name, (str(path.relative_to(ROOT)),), nbval, alone=True))
    return found


def starts_ray(notebook: Path) -> bool:
    cells = nbformat.read(notebook, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return any(sign in code for sign in ("labkit.cluster", "import ray", "from ray", "labkit serve"))


def run(phase: Phase, arguments: list[str], scratch: Path) -> Outcome:
    print(f"\n===== {phase.name} =====", flush=True)
    results = scratch / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", f"--timeout={TEST_TIMEOUT}"]
    command += [*phase.options, *phase.paths, *arguments]
    isolated = private_network() if phase.alone else []
    began = time.monotonic()
    for preparation in phase.before if os.environ.get("LABKIT_TEST_ALL") == "1" else ():
        subprocess.run(preparation, cwd=ROOT)  # where it fails, the tests that need it say so
    status = subprocess.run([*isolated, *command], cwd=ROOT, env=environment(phase, scratch)).returncode
    outcome = read(results, status)
    outcome.seconds = time.monotonic() - began
    if phase.alone and not isolated:
        outcome.skipped["no network of its own for Ray: run as root, after `make system-packages`"] += 1
        outcome.failed += os.environ.get("LABKIT_TEST_ALL") == "1"
    print(
        f"----- {phase.name}: {outcome.passed} passed, {outcome.failed} failed, "
        f"{outcome.skipped.total()} skipped in {outcome.seconds:.0f} s",
        flush=True,
    )
    return outcome


def private_network() -> list[str]:
    """The command prefix for a network with loopback only; empty where the machine allows none."""
    rights = "-n" if os.geteuid() == 0 else "-rn"
    prefix = ["unshare", rights, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


def environment(phase: Phase, scratch: Path) -> dict[str, str]:
    """No progress bars, no settings of the person who runs it, one thread for each of two processes."""
    own = {"LABKIT_PROGRESS": "0", "LABKIT_WORK": str(scratch / "work"), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        own[name] = str(scratch / name.lower())
    merged = {**os.environ, **own}
    # Not what the stored values were made with.
    for name in ("LABKIT_MODEL", "LABKIT_SHARED_CACHE", "LABKIT_RECORD", "RAY_ADDRESS"):
        merged.pop(name, None)
    if "--nbval" in phase.options:
        merged["LABKIT_LIVE"] = "0"  # tests/cluster runs the same notebooks live
    # Threads that wait for the others of their operation sleep instead of turning in a loop: where other processes
    # want the cores too, an operation on two threads took less than half as long.
    merged.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if TWO_BY_TWO[0] in phase.options:
        merged.setdefault("OMP_NUM_THREADS", "1")
    return merged


def read(results: Path, status: int) -> Outcome:
    """Count a JUnit file; a process that died without one, or failed without saying so, is one failure."""
    outcome = Outcome()
    if status == 5:  # nothing collected, or everything deselected by the arguments
        return outcome
    if results.exists():
        for case in ElementTree.parse(results).iter("testcase"):
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                outcome.failed += 1
            elif skip is not None:
                outcome.skipped[skip.get("message", "no reason given")] += 1
            else:
                outcome.passed += 1
    if status != 0 and outcome.failed == 0:
        outcome.failed = 1
    return outcome


def report(outcomes: dict[str, Outcome]) -> int:
    total = Outcome()
    print("\n===== all tiers =====")
    for tier, outcome in outcomes.items():
        nothing = "" if outcome.seconds else "   (no tests yet)"
        print(
            f"{tier:10} {outcome.seconds:6.0f} s  {outcome.passed} passed, {outcome.failed} failed, "
            f"{outcome.skipped.total()} skipped{nothing}"
        )
        total.add(outcome)
    for reason, count in sorted(total.skipped.items()):
        print(f"skipped {count} x {reason}")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped.total()} skipped", flush=True)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
