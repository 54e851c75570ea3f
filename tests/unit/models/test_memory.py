"""Parameter counts as the models' authors publish them; bytes worked by hand and against a real tensor."""

from pathlib import Path

import pytest
import torch

from labkit.models import load, memory
from labkit.models.memory import KNOWN, available, kv_bytes, parameters, require, weight_bytes
from labkit.quant import QuantSpec, rtn

# Parameters on each model's page at the Hugging Face hub.
PUBLISHED = {
    "SmolLM2 135M": 134_515_008,
    "SmolLM2 360M": 361_821_120,
    "Llama 3.2 1B": 1_235_814_400,
    "Llama 3.2 3B": 3_212_749_824,
    "Llama 3.1 8B": 8_030_261_248,
    "Llama 3.1 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_as_published(name: str) -> None:
    assert parameters(KNOWN[name]) == PUBLISHED[name]


def test_parameters_of_a_loaded_model() -> None:
    model = load("tiny")
    assert parameters(model.config) == sum(
        p.numel() for p in {id(p): p for p in model.parameters()}.values()
    )


def test_weights_and_scales() -> None:
    assert weight_bytes(8_000_000_000, 4, group=64) == 8_000_000_000 * 4.25 / 8
    weight = torch.randn(8, 128)
    assert weight_bytes(8 * 128, 4, group=64) == rtn(weight, QuantSpec.parse("int4 g64")).nbytes


def test_the_cache_of_llama_8b_takes_128_kib_a_token() -> None:
    assert kv_bytes(KNOWN["Llama 3.1 8B"], 1) == 128 * 1024


def test_what_is_free_is_the_least_of_machine_and_cgroup(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   5000 kB\n")
    group = tmp_path / "group"
    group.mkdir()
    assert available(meminfo, group) == 5000 * 1024
    (group / "memory.max").write_text("4000000\n")
    (group / "memory.current").write_text("3500000\n")
    assert available(meminfo, group) == 500_000
    (group / "memory.stat").write_text("anon 3000000\nfile 400000\nfile_mapped 7\n")
    assert available(meminfo, group) == 900_000
    (group / "memory.max").write_text("max\n")
    assert available(meminfo, group) == 5000 * 1024
    assert available(tmp_path / "none", tmp_path / "none") is None


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    require(2**30, "this")
    with pytest.raises(MemoryError, match=r"that needs 3\.0 GiB, 1\.0 GiB are free"):
        require(3 * 2**30, "that")
    monkeypatch.setattr(memory, "available", lambda: None)
    require(2**60, "nothing is known, so")
