"""What every tier shares: parts of the machine that some tests need, and quiet surroundings.

    @pytest.mark.needs("chromium")

marks a test that is skipped, with a remedy, where that part is missing, and failed under LABKIT_TEST_ALL=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import pytest
from hypothesis import settings as hypothesis_settings

# How long an example takes says more about the machine than about the code.
hypothesis_settings.register_profile("lab", deadline=None)
hypothesis_settings.load_profile("lab")

PACKAGES = "run `make system-packages`"


def _command(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _private_network() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    command = ["unshare", *(["-n"] if os.geteuid() == 0 else ["-rn"]), "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _bundled_model() -> bool:
    from labkit.models import fetch

    return fetch.find() is not None


def _test_node() -> bool:
    from labkit.settings import settings

    return os.geteuid() == 0 and (settings().node / "share" / "complete").exists()


def _server_image() -> bool:
    from labkit.settings import settings

    return (settings().node / "images" / "oci" / "index.json").exists()


# name: (is it there?, what to do where it is not)
PARTS: dict[str, tuple[Callable[[], bool], str]] = {
    "bundled model": (_bundled_model, "run `labkit models fetch`"),
    "chromium": (_command("chromium"), PACKAGES),
    "git": (_command("git"), "install git"),
    "make": (_command("make"), "install make"),
    "skopeo": (_command("skopeo"), PACKAGES),
    "triton": (
        lambda: find_spec("triton") is not None,
        "on Linux, install torch's CUDA build, which brings it",
    ),
    "linux": (lambda: os.path.isdir("/proc/self"), "run it on Linux"),
    "test node": (_test_node, "run `make node` as root, once"),
    "server image": (_server_image, "run `make image` as root"),
    "network namespace": (_private_network, f"{PACKAGES}, and run as root or allow user namespaces"),
}


@cache
def missing(part: str) -> str:
    """Empty when the part is there, otherwise what it is and the remedy."""
    if part not in PARTS:
        raise pytest.UsageError(f"no part {part!r} in tests/conftest.py; known: {', '.join(sorted(PARTS))}")
    there, remedy = PARTS[part]
    return "" if there() else f"needs {part}: {remedy}"


def everything_must_run() -> bool:
    return os.environ.get("LABKIT_TEST_ALL") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*parts): what the test needs beyond Python")
    config.addinivalue_line(
        "markers", "gpu: runs on a GPU where there is one, else in Triton's interpreter"
    )
    os.environ["LABKIT_PROGRESS"] = "0"
    # A person's own choice of model or hub cache is not what the expected values were made with.
    for name in ("LABKIT_MODEL", "LABKIT_SHARED_CACHE", "RAY_ADDRESS"):
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for part in mark.args:
            reason = missing(part)
            if reason and everything_must_run():
                pytest.fail(f"{reason} (LABKIT_TEST_ALL=1 allows no skip)", pytrace=False)
            if reason:
                pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        counts[reason] = counts.get(reason, 0) + 1
    if counts:
        terminalreporter.section("not run on this machine")
        for reason, count in sorted(counts.items()):
            terminalreporter.line(f"{count} x {reason}")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment without any of the lab's settings; returns monkeypatch to set the ones under test."""
    for name in list(os.environ):
        if name.startswith("LABKIT_"):
            monkeypatch.delenv(name)
    yield monkeypatch
