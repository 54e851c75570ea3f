"""The one environment, in its three descriptions: pyproject.toml, constraints.txt, environment.yml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_here() -> dict[str, str]:
    """Name to version, of the pins whose markers hold on this machine."""
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins()
        if pin.marker is None or pin.marker.evaluate()
    }


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in requirements if requirement.name != "labkit"]


def test_every_pin_is_exact() -> None:
    assert [str(pin) for pin in pins() if not re.fullmatch(r"==[^*]+", str(pin.specifier))] == []


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    pinned = pinned_here()
    for requirement in declared():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


def test_this_environment_is_at_the_pinned_versions() -> None:
    wrong = {
        name: (version, metadata.version(name))
        for name, version in pinned_here().items()
        if metadata.version(name).split("+")[0] != version
    }
    assert wrong == {}, "run `make setup`"


def test_no_index_is_named() -> None:
    for name in ("constraints.txt", "environment.yml", "pyproject.toml", "Makefile", "tools/setup.py"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|(?<!--no-emit-)(index-url|find-links)", text), name


def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_conda_versions_equal_the_pins() -> None:
    conda = dict(
        line.split("=") for line in environment()["dependencies"] if isinstance(line, str) and "=" in line
    )
    assert conda.pop("pytorch-cpu") == pinned_here()["torch"]
    python = conda.pop("python")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{requires}").specifier.contains(f"{python}.0")
    assert conda == {}, "a new conda version must be compared with its pin here"


def test_the_rest_comes_by_pip_at_the_pins() -> None:
    (pip,) = [part["pip"] for part in environment()["dependencies"] if isinstance(part, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[all]"]
    assert environment()["channels"] == ["conda-forge", "nodefaults"]


def test_repo2docker_would_build_it(tmp_path: Path) -> None:
    """The dry run: which build pack, which Python, and that the pins are there before pip reads them."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("environment.yml", "constraints.txt", "pyproject.toml"):
        (repository / name).write_text((ROOT / name).read_text())
    tool = Path(sys.executable).with_name("jupyter-repo2docker")
    command = [tool, "--no-build", "--debug", "--user-id", "1000", "--user-name", "jovyan", repository]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "DOCKER_HOST": ""},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    assert "Building conda environment for python=3.12" in output
    copied, updated = output.index("COPY --chown=1000:1000 src/"), output.index("env update -p")
    assert copied < updated, "pip would not find constraints.txt"
    assert '--file "environment.yml"' in output


def test_an_old_python_is_refused_with_a_way_on(tmp_path: Path) -> None:
    """tools/setup.py judges the version, the system and the processor before it touches anything."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import setup\n"
        "for arguments in [((3, 10), 'Linux', 'x86_64'), ((3, 14), 'Linux', 'x86_64'),\n"
        "    ((3, 12), 'Darwin', 'x86_64'), ((3, 11), 'Linux', 'x86_64'), ((3, 13), 'Darwin', 'arm64')]:\n"
        "    try:\n        setup.check_machine(*arguments); print('fine')\n"
        "    except setup.Stop as stop:\n        print(stop)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    old, new, intel, *fine = done.stdout.splitlines()
    assert "3.11, 3.12 or 3.13 is needed, this is 3.10" in old and "make lab PYTHON=python3.1" in old
    assert "this is 3.14" in new
    assert "Intel" in intel
    assert fine == ["fine", "fine"]
