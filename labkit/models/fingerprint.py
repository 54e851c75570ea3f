"""Which work it is: a few digits that change with the recipe, the model's weights, the code and what else matters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import labkit.kernels
import labkit.quant
from labkit.models.llama import Llama
from labkit.models.recipe import Recipe

_PARTS = ["awq", "calibrate", "fisher", "fold", "protocol", "quantize", "rotate", "texts", "train"]
_KERNELS = ["build.py", "columns.py", "native/columns.h", "native/vectors.h"]


def fingerprint(recipe: Recipe, model: Llama, *more: object) -> str:
    """Ten hex digits for the recipe with every option written out (its name apart), the model and torch.

    more: anything else that the result depends on, JSON-able: the seed, ``code()``.
    """
    tree = {key: value for key, value in recipe.to_dict().items() if key != "name"}
    known = json.dumps([tree, torch.__version__, *more])
    return hashlib.sha256(known.encode() + _sample(model)).hexdigest()[:10]


def code() -> str:
    """The sha256 of the source files that quantize: another version of them may give another result."""
    digest = hashlib.sha256()
    for path in sorted(Path(labkit.quant.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for part in _PARTS:
        digest.update(Path(__file__).with_name(f"{part}.py").read_bytes())
    for part in _KERNELS:
        digest.update((Path(labkit.kernels.__file__).parent / part).read_bytes())
    return digest.hexdigest()


def _sample(model: Llama) -> bytes:
    """A thousand elements of each tensor of the model: other weights, another sample."""
    parts = [repr(model.config).encode()]
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        parts += [name.encode(), flat[:: max(1, len(flat) // 1000)].float().numpy().tobytes()]
    return b"".join(parts)
