"""``labkit quantize --list``, and that what cannot be done is said in one line before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labkit import models
from labkit.cli import app
from labkit.models.catalogue import catalogue
from labkit.models.recipe import names
from labkit.quant import METHODS

ARXIV = {  # looked up on arXiv: number to the first author and year that stand before it
    "2210.17323": "Frantar et al. 2022",
    "2004.10568": "Nagel et al. 2020",
    "2306.00978": "Lin et al. 2023",
    "2306.07629": "Kim et al. 2023",
    "2305.14314": "Dettmers et al. 2023",
    "2404.00456": "Ashkboos et al. 2024",
    "1902.08153": "LSQ",
    "2004.09576": "LSQ+",
}


def test_every_method_and_transform_is_listed_with_paper_and_needs() -> None:
    entries = {(entry.kind, entry.name): entry for entry in catalogue()}
    assert {name for kind, name in entries if kind == "method"} == set(METHODS)
    assert {name for kind, name in entries if kind == "transform"} == set(models.TRANSFORMS)
    assert ("training", "train") in entries
    for (_, name), entry in entries.items():
        assert (entry.paper.startswith("none")) == (name == "rtn"), f"{name} lacks .paper"
        assert entry.what.endswith(".") and len(entry.what) > 20
        for number in re.findall(r"\d{4}\.\d{5}", entry.paper):
            assert f"{ARXIV[number]}, arXiv {number}" in entry.paper
    assert entries["method", "rtn"].needs == "nothing"
    assert entries["method", "gptq"].needs == "calibration text"
    assert "gradients" in entries["method", "squeezellm"].needs
    assert "gradients" in entries["training", "train"].needs


def test_the_command_prints_a_table_or_json() -> None:
    text = CliRunner().invoke(app, ["quantize", "--list"], env={"COLUMNS": "120"})
    assert text.exit_code == 0
    for name in (*METHODS, *models.TRANSFORMS, "train", "2210.17323", *names()):
        assert name in text.output, name
    found = json.loads(CliRunner().invoke(app, ["quantize", "--list", "--json"]).output)
    assert {entry["name"] for entry in found["entries"]} >= set(METHODS) | {"train"}
    assert found["recipes"] == names()


def test_a_recipe_and_a_folder_are_asked_for() -> None:
    ended = CliRunner().invoke(app, ["quantize", "--recipe", "w4a16-rtn-g64"])
    assert ended.exit_code == 2 and "--list" in ended.output


def spoilt(model: models.Llama, value: float) -> models.Llama:
    from labkit.models.calibrate import shared_copy

    copy = shared_copy(model)
    layer = copy.linears()["model.layers.2.mlp.up_proj"]
    layer.weight = layer.weight.clone()
    layer.weight[3, 5] = value
    return copy


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("weight: nf4 b64, method: adaround", "AdaRound rounds down or up between integers, found nf4"),
        ("weight: int4 g64, method: hqq", "hqq"),
        ("weight: table4 channel, method: gptq", "table4"),
        ("weight: int4 g64, method: kmeans", "kmeans|codebook|table"),
    ],
)
def test_a_spec_that_the_method_cannot_do_is_said_before_any_work(
    rule: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import labkit.models.quantize  # noqa: F401  (the function of that name hides the module)

    module = sys.modules["labkit.models.quantize"]
    for work in ("walk", "fisher", "_apply", "calibration_windows"):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it worked"))
    recipe = models.Recipe.parse(f"rules: [{{match: 'model.layers.*', {rule}}}]")
    with pytest.raises(ValueError, match=says):
        models.quantize(models.load("tiny"), recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w3a16-gptq-g64", "w2a16-qat-g64"])
def test_damaged_weights_are_said_before_any_work(name: str, value: float) -> None:
    model = spoilt(models.load("tiny"), value)
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj.weight holds NaN or infinity"):
        models.quantize(model, name)


def test_a_text_too_short_to_calibrate_is_said() -> None:
    recipe = models.Recipe.parse(
        "calibration: {windows: 9999, tokens: 4096}\n"
        "rules: [{match: 'model.layers.*', weight: int4 g64, method: gptq}]"
    )
    with pytest.raises(
        ValueError, match=r"asked for 9999 calibration windows of 4096 tokens; the text holds \d+"
    ):
        models.quantize(models.load("tiny"), recipe)


def test_peak_memory_by_hand() -> None:
    """tiny: 4 layers of 128 x (256 + 64 + 64) + 256 x 128 + 3 x 128 x 384 weights; 2 windows of 32 tokens."""
    tiny = models.load("tiny")
    layer = 128 * (256 + 64 + 64) + 256 * 128 + 3 * 128 * 384
    head = "calibration: {windows: 2, tokens: 32}\nrules: "
    rtn = models.Recipe.parse(head + "[{match: 'model.layers.*', weight: int4 g64, method: rtn}]")
    assert models.peak_bytes(tiny, rtn) == 4 * layer + 4 * layer
    gptq = models.Recipe.parse(head + "[{match: 'model.layers.*', weight: int4 g64, method: gptq}]")
    inside = 4 * 2 * 32 * (3 * 384 + 3 * 128) + 3 * 8 * 384**2
    assert models.peak_bytes(tiny, gptq) == models.peak_bytes(tiny, rtn) + inside
    qat = models.Recipe.load("w2a16-qat-g64")
    linears = [linear.weight.numel() for name, linear in tiny.linears().items() if name != "lm_head"]
    assert models.peak_bytes(tiny, qat) == models.train_bytes(tiny.config, qat.train, linears)


def test_memory_that_is_not_there_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from labkit.models import memory; memory.available = lambda: 1000\n"
        "from labkit.cli import main; sys.argv = ['labkit', *sys.argv[1:]]; main()"
    )
    command = ["quantize", "--model", "tiny", "--recipe", "w2a16-qat-g64", "--out", str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert re.match(r"labkit: training by recipe w2a16-qat-g64 needs 0\.\d GiB, 0\.0 GiB are free", said)
    assert "Traceback" not in ended.stderr and not (tmp_path / "out").exists()
