"""An interrupted quantization goes on: byte for byte what it would have been without the interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labkit import models
from labkit.models import checkpoint
from labkit.models.unfinished import Unfinished
from labkit.quant import METHODS, FellBack, QuantizedTensor, QuantSpec, Stats, gptq, rtn

RECIPE = """
name: gradual
calibration: {windows: 2, tokens: 32}
rules:
  - {match: "*.1.self_attn.*", weight: int4 g64 asym, method: gptq, options: {act_order: true}}
  - {match: "*.self_attn.*", weight: int3 g64, method: adaround, options: {steps: 20}}
  - {match: "*.down_proj", weight: nf4 b64 scale=fp32, method: rtn}
  - {match: "*.mlp.*", weight: int2 g64 asym, method: gptq}
"""


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


def bytes_of(model: models.Llama, folder: Path) -> bytes:
    return (models.save(model, folder) / checkpoint.WEIGHTS).read_bytes()


def test_an_interrupted_one_goes_on_to_the_same_bytes(
    tiny: models.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = models.Recipe.parse(RECIPE)
    whole = models.quantize(tiny, recipe, seed=4)
    calls: list[int] = []

    def interrupted(weight, spec, stats=None, **options):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return gptq(weight, spec, stats, **options)

    interrupted.needs = gptq.needs  # type: ignore[attr-defined]
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "gptq", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.quantize(tiny, recipe, seed=4, state=state)
    done = {path.stem for path in state.glob("*.safetensors")}
    assert "model.layers.1.self_attn.v_proj" in done and "model.layers.3.mlp.down_proj" not in done

    seen: list[int] = []

    def counted(weight, spec, stats=None, **options):  # type: ignore[no-untyped-def]
        seen.append(1)
        return gptq(weight, spec, stats, **options)

    counted.needs = gptq.needs  # type: ignore[attr-defined]
    monkeypatch.setitem(METHODS, "gptq", counted)
    again = models.quantize(tiny, recipe, seed=4, state=state)
    assert len(seen) == 4 + 2 * 4 - 5  # layer 1's four, gate and up of four layers; five were done
    assert bytes_of(again, tmp_path / "again") == bytes_of(whole, tmp_path / "whole")
    assert again.made == whole.made


def test_fallbacks_are_counted_across_an_interruption(
    tiny: models.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(weight, spec, stats=None):  # type: ignore[no-untyped-def]
        if weight.shape[0] == 256:  # the queries
            warnings.warn(FellBack("no better"), stacklevel=1)
        else:
            warnings.warn("something else", UserWarning, stacklevel=1)
        return rtn(weight, spec)

    half.needs = frozenset()  # type: ignore[attr-defined]
    monkeypatch.setitem(METHODS, "half", half)
    recipe = models.Recipe.parse("rules: [{match: '*.[01].*.[qk]_proj', weight: int3 g64, method: half}]")
    expected = tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    state = tmp_path / "state"
    with pytest.warns(UserWarning, match="something else") as said:
        first = models.quantize(tiny, recipe, state=state)
    assert len(said) == 2  # other warnings reach the caller; these are counted
    again = models.quantize(tiny, recipe, state=state)
    assert first.made is not None and again.made is not None
    assert first.made.fallbacks == again.made.fallbacks == expected
    kept = models.load(models.save(again, tmp_path / "kept"))
    assert kept.made is not None and kept.made.fallbacks == expected
    plain = models.quantize(tiny, "w4a16-rtn-g64")
    assert plain.made is not None and plain.made.fallbacks == ()


def test_every_kind_of_tensor_comes_back_as_it_was(tmp_path: Path) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    state = Unfinished(tmp_path / "state", "work")
    stats = Stats.of(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
    tensors = {
        text: rtn(weight, QuantSpec.parse(text))
        for text in ("int3 g64 asym-float", "mxfp4", "nvfp4", "nf4 b64", "fp8_e4m3 tensor scale=fp8_e5m2")
    }
    tensors["act-order"] = gptq(weight, QuantSpec.parse("int4 g64 asym"), stats, act_order=True)
    for text, tensor in tensors.items():
        state.keep(text, tensor, fell_back=text == "mxfp4")
    again = Unfinished(tmp_path / "state", "work")
    for text, tensor in tensors.items():
        found = again.take(text)
        assert found is not None and found[1] == (text == "mxfp4")
        assert isinstance(found[0], QuantizedTensor) and found[0].spec == tensor.spec
        for name, part in tensor.pack().tensors.items():
            assert torch.equal(found[0].pack().tensors[name].view(torch.uint8), part.view(torch.uint8)), (
                text,
                name,
            )
        assert torch.equal(found[0].dequantize(), tensor.dequantize())
    assert again.take("another") is None


def test_other_work_is_not_mixed_in(tiny: models.Llama, tmp_path: Path) -> None:
    state = tmp_path / "state"
    models.quantize(tiny, "w4a16-rtn-g64", state=state)
    for other in (
        lambda: models.quantize(tiny, "w3a16-rtn-g64", state=state),
        lambda: models.quantize(tiny, "w4a16-rtn-g64", seed=1, state=state),
        lambda: models.quantize(tiny, "w4a16-rtn-g64", propagate=False, state=state),
    ):
        with pytest.raises(ValueError, match="holds other unfinished work"):
            other()
    with pytest.raises(ValueError, match="labkit's own methods"):
        models.quantize(tiny, "w4a16-rtn-g64", state=tmp_path / "mine", methods={"rtn": rtn})


KILLER = """
import os, signal, sys
import labkit.quant.methods as m
from labkit.models import unfinished
from labkit.cli import main
keep, count = unfinished.Unfinished.keep, 0
def kill(self, *args):
    global count
    keep(self, *args)
    count += 1
    if count == 9: os.kill(os.getpid(), signal.SIGKILL)
unfinished.Unfinished.keep = kill
sys.argv = ["labkit", *sys.argv[1:]]
main()
"""


def test_kill_9_and_resume_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "gradual.yaml").write_text(RECIPE)
    environment = {
        **os.environ,
        "LABKIT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "LABKIT_PROGRESS": "0",
    }

    def run(out: str, *more: str, first: list[str]) -> subprocess.CompletedProcess[str]:
        command = [
            "quantize",
            "--model",
            "tiny",
            "--recipe",
            str(tmp_path / "gradual.yaml"),
            "--out",
            out,
            *more,
        ]
        return subprocess.run(
            [sys.executable, *first, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    plain = ["-m", "labkit.cli"]
    killed = run("resumed", first=["-c", KILLER])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    unfinished = list((tmp_path / "cache" / "unfinished").iterdir())
    assert len(unfinished) == 1 and len(list(unfinished[0].glob("*.safetensors"))) == 9
    assert not (tmp_path / "resumed").exists()
    resumed = run("resumed", "--resume", first=plain)
    assert resumed.returncode == 0 and "nothing to resume" not in resumed.stderr, resumed.stderr
    assert "GB beside the model" in resumed.stderr
    assert not list((tmp_path / "cache" / "unfinished").iterdir())
    whole = run("whole", "--resume", first=plain)
    assert "nothing to resume" in whole.stderr
    files = [(tmp_path / out / checkpoint.WEIGHTS).read_bytes() for out in ("resumed", "whole")]
    assert files[0] == files[1]
    assert len(load_file(tmp_path / "whole" / checkpoint.WEIGHTS)) > 28
