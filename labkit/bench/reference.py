"""The reference model as others read it: a folder in Hugging Face layout, and a GGUF file in float32.

It is the model off its grid, whose function every contender then has before it quantizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from labkit.models import Llama


def write_folder(model: Llama, folder: Path) -> Path:
    """config.json, model.safetensors in float32 and the tokenizer, in ``folder``, which is made."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()) + "\n", encoding="utf-8")
    save_file(tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    model.tokenizer.save(folder)
    return folder


def write_gguf(model: Llama, path: Path) -> Path:
    """A GGUF file without a vocabulary: llama.cpp is given token ids. Raises ValueError for another architecture than
    Llama's, or one with biases."""
    import gguf

    config = model.config
    if config.architecture != "llama" or config.rope_scaling or config.o_bias or config.mlp_bias:
        raise ValueError(f"{model.name} is no plain Llama; the benchmark writes no other as GGUF")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors(model).items():
        for part, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            if part in name:
                tensor = neighbours(tensor, heads)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, f"gguf has no name for {name}"
        writer.add_tensor(known, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: Llama) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name, a head that is the embedding left out."""
    found = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del found["lm_head.weight"]
    return found


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * head_dim, in), as llama.cpp rotates them: a pair in neighbouring rows, where Hugging
    Face has all first halves of a head and then all second."""
    halves = weight.view(heads, 2, -1, weight.shape[1])  # (heads, half, pair, in)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def prompt_of(model: Llama, tokens: int, start: int = 0) -> list[int]:
    """So many tokens of the evaluation text, from its ``start`` on."""
    from labkit.models.protocol import evaluation_stream

    found = evaluation_stream(model.tokenizer)[start : start + tokens]
    assert found.dtype == torch.int64 and len(found) == tokens
    return found.tolist()
