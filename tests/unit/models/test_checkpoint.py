"""Checkpoints: the same model back, whole or not at all, and a clear word about a damaged one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labkit import models
from labkit.models import checkpoint
from labkit.quant import QuantizedTensor

MIXED = """
name: mixed
calibration: {windows: 2, tokens: 32}
kv: {value: fp16}
rules:
  - {match: lm_head, weight: int8 channel, method: rtn}
  - {match: "*.0.*.q_proj", weight: int4 g64 asym, method: gptq, options: {act_order: true}}
  - {match: "*.k_proj", weight: nf4 b64 scale=fp32, method: rtn}
  - {match: "*.v_proj", weight: "fp8_e4m3 128x128", method: rtn}
  - {match: "*.mlp.*", weight: int3 g64, method: rtn, input: int8 g32 narrow scale=fp32}
"""


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def mixed(tiny: models.Llama) -> models.Llama:
    return models.quantize(tiny, models.Recipe.parse(MIXED), seed=3)


@pytest.fixture(scope="module")
def saved(mixed: models.Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(mixed, tmp_path_factory.mktemp("checkpoints") / "mixed")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def parts(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {**tensor.pack().tensors, "codes as they are": tensor.codes}


def test_the_round_trip_is_exact(mixed: models.Llama, saved: Path) -> None:
    again = models.load(saved)
    for (name, theirs), mine in zip(mixed.linears().items(), again.linears().values(), strict=True):
        assert mine.input == theirs.input and (mine.input is not None) == (".mlp." in name), name
        if not isinstance(theirs.weight, QuantizedTensor):
            assert torch.equal(mine.weight, theirs.weight), name
            continue
        assert isinstance(mine.weight, QuantizedTensor), name
        assert mine.weight.spec == theirs.weight.spec
        assert parts(mine.weight).keys() == parts(theirs.weight).keys(), name
        for part, tensor in parts(theirs.weight).items():
            other = parts(mine.weight)[part]
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), (name, part)
    assert mixed.linears()["model.layers.0.self_attn.q_proj"].weight.g_idx is not None
    for name, tensor in mixed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokens = models.calibration_windows(mixed.tokenizer, 1, 16, seed=0)
    with torch.no_grad():
        assert torch.equal(again(tokens), mixed(tokens))
    assert (again.name, again.config) == (mixed.name, mixed.config)
    assert again.tokenizer.eos_ids == mixed.tokenizer.eos_ids
    assert again.made is not None and mixed.made is not None
    assert again.made.recipe.to_dict() == mixed.made.recipe.to_dict()
    assert again.kv == mixed.kv == models.KVSpec("fp32", "fp16")
    assert (again.made.seed, again.made.model, again.made.model_seed) == (3, "tiny", None)


def test_the_marker_says_what_it_is(saved: Path, tiny: models.Llama) -> None:
    marker = json.loads((saved / "labkit.json").read_text())
    assert marker["format"] == 1
    assert (marker["model"], marker["seed"], marker["propagate"]) == ("tiny", 3, True)
    assert marker["protocol"] == models.protocol_for(tiny.tokenizer).hash
    assert (
        marker["recipe"]["rules"][1]["options"]["damp"] == 0.01
    )  # written out, though the recipe left it open
    assert marker["packages"]["torch"] == torch.__version__.partition("+")[0] or marker["packages"]["torch"]
    assert marker["weights"]["bytes"] == (saved / "model.safetensors").stat().st_size
    assert (
        json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == "labkit"
    )


def test_the_file_holds_packed_codes(mixed: models.Llama, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    rows, columns = mixed.linears()["model.layers.1.mlp.up_proj"].weight.shape
    assert tensors["model.layers.1.mlp.up_proj.weight.codes"].shape == (rows, columns * 3 // 8)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    _, _, size = models.sizes(mixed)
    assert sum(t.nbytes for t in tensors.values()) == size


def test_it_is_evaluated_like_the_model_it_was(
    mixed: models.Llama, saved: Path, tiny: models.Llama
) -> None:
    short = models.protocol.build(tiny.tokenizer, windows=2, tokens=16)
    mine, theirs = (models.evaluate(m, tiny, short) for m in (models.load(saved), mixed))
    assert (mine.kl, mine.perplexity, mine.bytes) == (theirs.kl, theirs.perplexity, theirs.bytes)


def test_it_does_not_overwrite_unasked(mixed: models.Llama, copy: Path, tiny: models.Llama) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        models.save(mixed, copy)
    models.save(models.quantize(tiny, "w8a16-rtn-channel"), copy, overwrite=True)
    made = models.load(copy).made
    assert made is not None and made.recipe.name == "w8a16-rtn-channel"
    with pytest.raises(ValueError, match="tiny is not quantized"):
        models.save(tiny, copy)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "labkit.json").read_text())
        change(tree)
        (folder / "labkit.json").write_text(json.dumps(tree))

    return apply


def flip(name: str, at: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return apply


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


DAMAGE = {
    "a bit of the codes": (flip("model.safetensors", -9), ValueError, "damaged: sha256"),
    "a bit of the header": (flip("model.safetensors", 30), ValueError, "damaged: sha256"),
    "half the weights": (cut("model.safetensors"), ValueError, "cut short"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "lacks model.safetensors",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "lacks tokenizer.json"),
    "half a tokenizer": (cut("tokenizer.json"), ValueError, "tokenizer.json"),
    "half a config": (cut("config.json"), ValueError, "cannot be read"),
    "no marker": (lambda f: (f / "labkit.json").unlink(), FileNotFoundError, "no labkit checkpoint"),
    "half a marker": (cut("labkit.json"), ValueError, "damaged or not labkit's"),
    "somebody else's json": (lambda f: (f / "labkit.json").write_text("[1]"), ValueError, "not labkit's"),
    "a newer format": (edit(lambda t: t.update(format=2)), ValueError, "format 2, this labkit reads 1"),
    "no recipe": (edit(lambda t: t.pop("recipe")), ValueError, "lacks recipe"),
    "a bad recipe": (edit(lambda t: t["recipe"].update(rules=[])), ValueError, "at least one rule"),
    "a layer not listed": (edit(lambda t: t["layers"].pop("lm_head")), ValueError, "lm_head"),
    "a layer too many": (
        edit(lambda t: t["layers"].update({"model.layers.9.mlp.up_proj": t["layers"]["lm_head"]})),
        ValueError,
        "cannot be read",
    ),
    "another shape": (
        edit(lambda t: t["layers"]["lm_head"].update(shape=[1024, 64])),
        ValueError,
        "cannot be read",
    ),
    "another spec": (
        edit(lambda t: t["layers"]["lm_head"].update(spec="int4 channel")),
        ValueError,
        "cannot be read",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(copy: Path, what: str) -> None:
    damage, kind, says = DAMAGE[what]
    damage(copy)
    with pytest.raises(kind, match=says) as caught:
        checkpoint.load(copy)
    assert "copy" in str(caught.value) or "tiny" in str(caught.value)  # which checkpoint


def test_no_folder_and_a_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labkit quantize --recipe"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no labkit checkpoint"):
        checkpoint.load(tmp_path)


# A process that stops at the given step of `save`, says so, and waits to be killed.
VICTIM = """
import sys, time
from labkit import models
from labkit.models import checkpoint

folder, step = sys.argv[1:]

def stop(*args, **kwargs):
    if step == "weights":  # half the bytes are there
        args[1].write_bytes(b"x" * 1000)
    print("now", flush=True)
    time.sleep(600)

model = models.quantize(models.load("tiny"), "w4a16-rtn-channel")
if step == "weights":
    checkpoint.save_file = stop
elif step == "marker":
    write = checkpoint._write
    checkpoint._write = lambda path, tree: stop() if path.name == "labkit.json" else write(path, tree)
checkpoint.save(model, folder, overwrite=True)
"""


@pytest.mark.parametrize("step", ["weights", "marker"])
def test_a_killed_save_leaves_what_was_there_before(mixed: models.Llama, tmp_path: Path, step: str) -> None:
    new, old = tmp_path / "new", models.save(mixed, tmp_path / "old")
    before = (old / "labkit.json").read_bytes()
    for folder in (new, old):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(folder), step],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"now\n"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert not new.exists()
    assert (old / "labkit.json").read_bytes() == before
    assert models.load(old).made is not None
    models.save(mixed, new)  # and what the killed process left beside it is in nobody's way
    assert models.load(new).made is not None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def test_made_once_and_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.checkpoint_for("w4a16-rtn-g64", model="tiny", seed=2)
    assert folder.parent == cache
    made = models.load(folder).made
    assert made is not None and (made.recipe.name, made.seed) == ("w4a16-rtn-g64", 2)
    others = {
        models.checkpoint_for("w4a16-rtn-g64", model="tiny", seed=3),
        models.checkpoint_for("w4a16-rtn-channel", model="tiny", seed=2),
    }
    assert folder not in others and len(others) == 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(checkpoint, "quantize", refuse)
    assert models.checkpoint_for("w4a16-rtn-g64", model="tiny", seed=2) == folder
    # The same name with other content is another checkpoint.
    mine = models.Recipe.parse(
        "name: w4a16-rtn-g64\nrules: [{match: 'model.*', weight: int4 g32, method: rtn}]"
    )
    with pytest.raises(AssertionError, match="made again"):
        models.checkpoint_for(mine, model="tiny", seed=2)


def test_a_hubs_shared_cache_is_looked_up_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.checkpoint_for("w4a16-rtn-g64", model="tiny")
    monkeypatch.setenv("LABKIT_SHARED_CACHE", str(cache.parent))
    monkeypatch.setenv("LABKIT_CACHE", str(cache.parent.parent / "own"))
    assert models.checkpoint_for("w4a16-rtn-g64", model="tiny") == folder
    assert not (cache.parent.parent / "own" / "checkpoints").exists()


MAKER = """
from labkit import models
from labkit.models import checkpoint
save = checkpoint.save
checkpoint.save = lambda *a, **k: print("made", flush=True) or save(*a, **k)
print(models.checkpoint_for("w4a16-rtn-g64", model="tiny"))
"""


def test_makers_at_the_same_time_make_it_once(cache: Path) -> None:
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [maker.communicate(timeout=120)[0].split() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert len({output[-1] for output in outputs}) == 1
    assert sum(output.count("made") for output in outputs) == 1
    assert models.load(Path(outputs[0][-1])).made is not None


def test_what_a_killed_maker_left_is_cleared_away(cache: Path) -> None:
    folder = models.checkpoint_for("w4a16-rtn-g64", model="tiny")
    left = cache / f".{folder.name}.abc.part"
    shutil.move(folder, left)
    assert models.checkpoint_for("w4a16-rtn-g64", model="tiny") == folder
    assert not left.exists()
