"""A quantized model as a folder: written whole or not at all, checked when read, made once and found again.

config.json            the architecture, as Hugging Face writes it, marked with quant_method "labkit"
tokenizer.json, tokenizer_config.json
model.safetensors      packed codes, scales and zero points as NAME.weight.codes, NAME.weight.scale, ...;
                       layers left alone as NAME.weight in float32
labkit.json            format version, model, recipe with every option written out, seed, protocol hash,
                       the spec of each layer, online transforms, size and sha256 of model.safetensors,
                       package versions

A model with online transforms (see ``rotate``) is not the architecture it was: config.json names it
labkit_rotated_llama, so that programs which know nothing of them find no such model and say so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from labkit.files import whole_folder
from labkit.models.config import ModelConfig
from labkit.models.fingerprint import code, fingerprint
from labkit.models.llama import Llama
from labkit.models.protocol import protocol_for
from labkit.models.quantize import Made, quantize
from labkit.models.recipe import Recipe
from labkit.models.rotate import online, restore
from labkit.models.store import MARKER, build
from labkit.models.store import load as load_model
from labkit.models.tokenizer import Tokenizer
from labkit.models.unfinished import unfinished_folder
from labkit.quant import Packed, QuantizedTensor
from labkit.settings import settings

FORMAT = 1
WEIGHTS = "model.safetensors"
ROTATED = "labkit_rotated_"  # before model_type and architecture where online transforms stand
_PACKAGES = ("labkit", "torch", "safetensors", "tokenizers")


def save(model: Llama, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a quantized model to ``folder``, which appears whole, and return it.

    Raises FileExistsError when the folder exists and ``overwrite`` is not set, ValueError for a model that
    ``quantize`` did not make or that has no tokenizer.
    """
    folder = Path(folder)
    if model.made is None:
        raise ValueError(
            f"{model.name} is not quantized; a checkpoint holds what labkit.models.quantize returns"
        )
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    for name, linear in model.linears().items():
        if isinstance(linear.weight, QuantizedTensor):
            packed = linear.weight.pack()
            layers[name] = packed.metadata
            tensors |= {f"{name}.weight.{part}": t.contiguous() for part, t in packed.tensors.items()}
    tied = model.config.tie_embeddings and "lm_head" not in layers
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors[name] = tensor.detach().contiguous()
    made = model.made
    config = {**model.config.to_hf(), "quantization_config": {"quant_method": "labkit", "format": FORMAT}}
    if transforms := online(model):
        config["model_type"] = ROTATED + config["model_type"]
        config["architectures"] = [ROTATED + name for name in config["architectures"]]
    protocol = protocol_for(model.tokenizer)
    with whole_folder(folder, overwrite=overwrite) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / WEIGHTS).chmod(0o644)  # safetensors makes it private; a shared cache is read by others
        model.tokenizer.save(part)
        _write(part / "config.json", config)
        marker = {
            "format": FORMAT,
            "model": made.model,
            "model_seed": made.model_seed,
            "recipe": made.recipe.to_dict(),
            "seed": made.seed,
            "propagate": made.propagate,
            "fallbacks": list(made.fallbacks),
            "protocol": protocol.hash,
            "eos_ids": list(model.tokenizer.eos_ids),
            "weights": {"bytes": (part / WEIGHTS).stat().st_size, "sha256": _sha256(part / WEIGHTS)},
            "layers": layers,
            "online": transforms,
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # Last, because a folder is a checkpoint exactly when it has this file.
        _write(part / MARKER, marker)
    return folder


def load(folder: Path | str) -> Llama:
    """Read what ``save`` wrote: the same model, equal in every code and every float.

    Raises FileNotFoundError when the folder or one of its files is missing, ValueError when a file is
    damaged, cut short, from a newer labkit, or not a checkpoint at all. Nothing is executed while reading.
    """
    folder = Path(folder)
    marker = read_marker(folder)
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"checkpoint {folder} lacks {name}; make it again with labkit quantize")
    said, path = marker["weights"], folder / WEIGHTS
    if (size := path.stat().st_size) != said["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes, expected {said['bytes']}; it was cut short: make or copy it again"
        )
    if (found := _sha256(path)) != said["sha256"]:
        raise ValueError(
            f"{path} is damaged: sha256 {found[:12]}, expected {said['sha256'][:12]}; make or copy it again"
        )
    try:
        tensors = load_file(path)
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hf.pop("quantization_config", None)
        transforms = marker.get("online", {})
        if transforms:
            hf["model_type"] = hf["model_type"].removeprefix(ROTATED)
        signs = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".signs")}
        config = ModelConfig.from_hf(hf, str(folder / "config.json"))
        weights = {
            name: QuantizedTensor.unpack(Packed(_take(tensors, f"{name}.weight."), metadata))
            for name, metadata in marker["layers"].items()
        }
        recipe = Recipe.from_dict(marker["recipe"], where=f"{folder / MARKER}, recipe")
        made = Made(
            marker["model"],
            marker["model_seed"],
            recipe,
            marker["seed"],
            marker["propagate"],
            tuple(marker.get("fallbacks", ())),
        )
        eos_ids = tuple(marker["eos_ids"])
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read ({error}); make it again with labkit quantize"
        ) from error
    # The shapes of the quantized layers are checked like all others, by tensors that hold no memory.
    stand_ins = {f"{name}.weight": torch.empty(1).expand(weight.shape) for name, weight in weights.items()}
    tokenizer = Tokenizer.from_folder(folder, eos_ids)
    model = build(config, {**tensors, **stand_ins}, tokenizer, marker["model"])
    try:
        restore(model, transforms, signs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read ({error}); make it again with labkit quantize"
        ) from error
    linears = model.linears()
    for name, weight in weights.items():
        linears[name].weight, linears[name].input = weight, recipe.input_for(name)
    model.seed, model.made, model.kv = made.model_seed, made, recipe.kv
    return model


def read_marker(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``labkit.json``: what it is, without loading it. Raises as ``load`` does."""
    path = folder / MARKER
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no checkpoint at {folder}; make one with labkit quantize --recipe ... --out {folder}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no labkit checkpoint: it has no {MARKER}")
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        version = marker["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or not labkit's ({error!r}); make the checkpoint again"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, this labkit reads {FORMAT}; make it again or update labkit"
        )
    needed = {
        "model",
        "model_seed",
        "recipe",
        "seed",
        "propagate",
        "protocol",
        "eos_ids",
        "weights",
        "layers",
    }
    if missing := needed - set(marker):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; make the checkpoint again")
    return marker


def checkpoint_for(
    recipe: Recipe | str, *, model: str | None = None, seed: int = 0, progress: bool | None = None
) -> Path:
    """The folder of the checkpoint that ``recipe`` makes of ``model``: made once, found again afterwards.

    model: as ``load`` takes it, None for ``LABKIT_MODEL``. seed: of off-grid factors and calibration
    windows alike. A checkpoint is found by the recipe with all its options, the model's weights, the seed,
    the code of the quantizers and the version of torch, in ``LABKIT_SHARED_CACHE`` first, then in the
    cache. Several processes may ask at once: one makes it, the others wait; after an interruption the next
    goes on with what was done. Raises as ``load`` and
    ``quantize`` do.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    original = load_model(model, seed=seed)
    key = fingerprint(recipe, original, FORMAT, seed, code())
    name = re.sub(r"[^\w.-]", "_", f"{original.name}-{recipe.name}-{seed}-{key}")
    where = settings()
    for cache in (where.shared_cache, where.cache):
        if cache is not None and (found := cache / "checkpoints" / name / MARKER).exists():
            return found.parent
    folder = where.cache / "checkpoints" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f".{name}.lock"):
        if not (folder / MARKER).exists():
            # Left by makers that were killed: while we hold the lock, none of them is alive.
            for left in folder.parent.glob(f".{name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
            state = unfinished_folder(recipe, original, seed)
            quantized = quantize(original, recipe, seed=seed, state=state, progress=progress)
            save(quantized, folder, overwrite=True)
            shutil.rmtree(state, ignore_errors=True)
    return folder


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Move the tensors whose name starts with ``prefix`` out of ``tensors``, named by the rest."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
