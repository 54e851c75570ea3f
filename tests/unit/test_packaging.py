"""The wheel alone, away from the checkout, has what the package needs at run time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import json, sys
import torch
import labkit
from labkit import quant
from labkit.files import data_path
from labkit.models import Recipe, load, quantize, save

folder = sys.argv[1]
model = load("tiny")
text = data_path("texts/moby_dick.txt").read_text(encoding="utf-8")
small = quantize(model, Recipe.load("w4a16-rtn-g64"))
save(small, folder)
again = load(folder)
tokens = torch.tensor([model.tokenizer.encode(text[1000:1200])])
print(json.dumps({
    "package": labkit.__file__,
    "data": str(data_path("texts/moby_dick.txt")),
    "quantized": sum(isinstance(x.weight, quant.QuantizedTensor) for x in again.linears().values()),
    "same": bool(torch.equal(small(tokens), again(tokens))),
    "changed": bool((small(tokens) - model(tokens)).abs().max() > 0),
    "kept_out": sorted({"ray", "transformers", "jupyterlab", "IPython", "pandas"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and of this environment only what labkit did not bring."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("labkit-*.whl")
    venv.create(folder / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder / "venv")}))
    zipfile.ZipFile(wheel).extractall(site)
    # A .pth file adds the folder, and does not read the .pth of the editable install that lies in it.
    (site / "peers.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("LABKIT_", "PYTHON"))
    }
    environment |= {"LABKIT_CACHE": str(cwd / "cache"), "LABKIT_OFFLINE": "1", "LABKIT_PROGRESS": "0"}
    command = [str(installed / "bin" / "python"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_wheel_alone_quantizes_a_model(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", USE, str(tmp_path / "checkpoint"))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert Path(seen["package"]).is_relative_to(installed)
    assert Path(seen["data"]).is_relative_to(installed)
    assert seen["quantized"] > 0
    assert (seen["same"], seen["changed"]) == (True, True)
    assert seen["kept_out"] == []


def test_the_command_works_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    arguments = ["quantize", "--recipe", "w4a16-rtn-g64", "--model", "tiny", "--out", str(out)]
    done = run(installed, tmp_path, "-m", "labkit.cli", *arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(path.suffix for path in out.iterdir() if path.suffix == ".safetensors")
    again = run(installed, tmp_path, "-m", "labkit.cli", *arguments)
    assert again.returncode == 1
    assert "Traceback" not in again.stderr and str(out) in again.stderr


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    (info,) = (installed / "lib").glob("python*/site-packages/labkit-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
    assert (info.parent / "labkit" / "py.typed").exists()
