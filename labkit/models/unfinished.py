"""Unfinished work: the layers that an interrupted ``quantize`` had done, so that the next one goes on from there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from labkit.files import whole_file
from labkit.models.fingerprint import code, fingerprint
from labkit.models.llama import Llama
from labkit.models.recipe import Recipe
from labkit.quant import Packed, QuantizedTensor
from labkit.settings import settings


class Unfinished:
    """A folder with a file for each finished layer; each file appears whole.

    A layer depends on those before it through the text that it sees, and on nothing else: with the finished
    layers put in place, the rest comes out as it would have without the interruption, byte for byte.
    """

    def __init__(self, folder: Path, work: str) -> None:
        """work: a fingerprint. Raises ValueError when the folder holds other work."""
        self.folder = folder
        marker = folder / "work"
        if marker.exists() and (found := marker.read_text(encoding="utf-8")) != work:
            raise ValueError(
                f"{folder} holds other unfinished work ({found}, expected {work}): another model, recipe, seed or "
                "version; remove the folder or choose another"
            )
        with whole_file(marker) as part:
            part.write_text(work, encoding="utf-8")

    def take(self, name: str) -> tuple[QuantizedTensor, bool] | None:
        """A finished layer and whether its method fell back to rounding to nearest; None if it is not done."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            known = json.loads(file.metadata()["labkit"])
        return QuantizedTensor.unpack(Packed(tensors, known["packed"])), known["fell_back"]

    def keep(self, name: str, weight: QuantizedTensor, fell_back: bool) -> None:
        """Write a finished layer."""
        packed = weight.pack()
        known = json.dumps({"packed": packed.metadata, "fell_back": fell_back})
        tensors = {key: tensor.contiguous() for key, tensor in packed.tensors.items()}
        with whole_file(self.folder / f"{name}.safetensors") as part:
            save_file(tensors, part, metadata={"labkit": known})


def unfinished_folder(recipe: Recipe, model: Llama, seed: int) -> Path:
    """Where ``labkit quantize`` keeps what it has done of this work until it is finished: in the cache."""
    work = fingerprint(recipe, model, seed, code())
    name = re.sub(r"[^\w.-]", "_", f"{model.name}-{recipe.name}-{seed}-{work}")
    return settings().cache / "unfinished" / name
