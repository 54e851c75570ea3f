"""Rotation beside others: scipy's Hadamard matrices, and transformers, which must not read a rotated model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from labkit import models
from labkit.quant import hadamard


@pytest.mark.parametrize("order", [1, 2, 4, 64, 512])
def test_powers_of_two_are_scipys(order: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    assert torch.equal(hadamard(order), torch.from_numpy(linalg.hadamard(order)).double())


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = models.quantize(models.load("tiny"), "w4a16-rotate-rtn-g64")
    return models.save(made, tmp_path_factory.mktemp("checkpoints") / "rotated")


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModelForCausalLM"])
def test_transformers_knows_no_such_model(rotated: Path, loader: str) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="labkit_rotated_llama"):
        getattr(transformers, loader).from_pretrained(rotated)
