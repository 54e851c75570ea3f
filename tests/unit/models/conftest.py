"""Small models that the tests of ``labkit.models`` share."""

from __future__ import annotations

import pytest
import torch

from labkit.models.config import ModelConfig
from labkit.models.llama import Llama


def random_llama(**changes: object) -> Llama:
    """Random weights, biases and gains; grouped heads 3:1, head_dim not hidden / heads."""
    options: dict = {
        "architecture": "llama",
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
    }
    model = Llama(ModelConfig(**(options | changes)), name="random")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        middle = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(4))
