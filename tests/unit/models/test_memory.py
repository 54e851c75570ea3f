"""Parameter counts as the models' authors publish them; bytes worked by hand and against a real tensor."""

import pytest
import torch

from labkit.models import load
from labkit.models.memory import KNOWN, kv_bytes, parameters, weight_bytes
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
