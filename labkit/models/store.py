"""``load``: from a name, a folder or a hub's ``org/name`` to a model that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from labkit.files import data_path
from labkit.models import fetch
from labkit.models.config import ModelConfig
from labkit.models.llama import Llama
from labkit.models.off_grid import off_grid
from labkit.models.tokenizer import Tokenizer
from labkit.settings import DEFAULT_MODEL, settings

MARKER = "labkit.json"  # in the folder of a checkpoint that labkit quantized


def load(name: str | Path | None = None, *, seed: int | None = 0) -> Llama:
    """Load a model in float32, its weights memory-mapped where the file allows.

    name: None for ``LABKIT_MODEL`` or the bundled ``smollm2-135m-instruct``; ``tiny``; a folder in
        Hugging Face layout or a labkit checkpoint; ``org/name`` on the Hugging Face hub.
    seed: which off-grid factors the bundled model gets (see ``off_grid``); None leaves it as shipped.
        Other models are never changed.
    Raises FileNotFoundError, ValueError (unsupported architecture, missing or misshapen tensors) or
    RuntimeError (it cannot be fetched).
    """
    name = settings().model if name is None else name
    if name == DEFAULT_MODEL:
        model = load_folder(fetch.fetch(), DEFAULT_MODEL)
        return model if seed is None else off_grid(model, seed)
    if name == "tiny":
        return load_folder(data_path("models/tiny"), "tiny")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / MARKER).exists():
            from labkit.models import checkpoint

            return checkpoint.load(folder)
        return load_folder(folder, folder.resolve().name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return load_folder(_from_hub(str(name)), str(name))
    raise FileNotFoundError(
        f"no model {str(name)!r}: expected {DEFAULT_MODEL}, tiny, a folder with config.json and "
        "*.safetensors, or org/name of the Hugging Face hub"
    )


def load_folder(folder: Path, name: str) -> Llama:
    """Load a folder in Hugging Face layout. Raises as ``load`` does."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing; expected a model in Hugging Face layout"
        )
    config = ModelConfig.from_file(folder / "config.json")
    eos_ids = config.eos_ids
    if (generation := folder / "generation_config.json").exists():
        more = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") or []
        eos_ids = tuple(dict.fromkeys([*eos_ids, *(more if isinstance(more, list) else [more])]))
    tokenizer = Tokenizer.from_folder(folder, eos_ids) if (folder / "tokenizer.json").exists() else None
    return build(config, read_tensors(folder), tokenizer, name)


def build(
    config: ModelConfig, tensors: dict[str, torch.Tensor], tokenizer: Tokenizer | None, name: str
) -> Llama:
    """A model around tensors by Hugging Face name; those in float32 are used as they are, without a copy.

    Raises ValueError that names every tensor that is missing, left over, or has another shape than the
    config says.
    """
    model = Llama(config, tokenizer, name)  # allocated but never written to, so it takes no memory
    expected = dict(model.state_dict())
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("rotary_emb.inv_freq")}
    problems = [
        f"missing {key}, expected shape {_shape(t)}" for key, t in expected.items() if key not in tensors
    ]
    problems += [f"left over {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {_shape(tensor)}, expected {_shape(expected[key])}"
        for key, tensor in tensors.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    if problems:
        raise ValueError(
            f"the tensors of {name} do not fit its config.json "
            f"({config.architecture}, {config.layers} layers): "
            + "; ".join(problems[:6])
            + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
            + ". The download may be incomplete, or the config belongs to another model"
        )
    model.load_state_dict(
        {key: tensor.float() for key, tensor in tensors.items()}, strict=False, assign=True
    )
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, memory-mapped. Raises when a file is missing or cut
    short."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    if missing := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(files)} weight files missing ({', '.join(missing[:3])}); "
            "the download stopped half-way: fetch the model again"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as handle:
                tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{folder / file} cannot be read ({error}); it may be cut short: fetch the model again"
            ) from error
    return tensors


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = settings().offline
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja"], local_files_only=offline
        )
    except LocalEntryNotFoundError as error:
        reason = "LABKIT_OFFLINE=1 forbids fetching it" if offline else "the hub cannot be reached"
        raise RuntimeError(
            f"{name} is not in the Hugging Face cache and {reason}; fetch it where there is a network, or give "
            f"the path of a folder. Without one the bundled model works: LABKIT_MODEL={DEFAULT_MODEL}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(f"fetching {name} from the Hugging Face hub failed: {error}") from error
    return Path(found)
