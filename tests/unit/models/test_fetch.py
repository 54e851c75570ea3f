"""The conversion, on a small GGUF file that llama.cpp's own package writes: the bundled one is cached and hides it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from labkit.models import Llama, fetch, store

from .conftest import random_llama

TOKENS = ["<|end|>", "a", "b", "1", "2", "ab", "12", "Ġ", "Ġa"]
MERGES = ["a b", "1 2", "Ġ a"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a head's rows, row by row: 0, d/2, 1, d/2 + 1, ..."""
    rows = weight.shape[0] // heads
    order = [
        h * rows + half * (rows // 2) + i for h in range(heads) for i in range(rows // 2) for half in (0, 1)
    ]
    return weight[order]


def write(path: Path, model: Llama) -> None:
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.layers)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_context_length(c.max_positions)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
    state = model.state_dict()
    for layer in range(c.layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, c.heads if theirs == "attn_q" else c.kv_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.numpy())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    if not c.tie_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_same_model(tied: bool, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = random_llama(head_dim=8, tie_embeddings=tied, eos_ids=(0,), bos_id=0)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    write(tmp_path / "model.gguf", model)
    folder = tmp_path / "out"
    folder.mkdir()
    fetch.convert(tmp_path / "model.gguf", folder)
    found = store.load_folder(folder, "found")
    assert found.config == model.config
    assert torch.equal(found(tokens), model(tokens))
    # Digits stand alone whatever the merge list says, letters merge, the special token is only made by the template.
    assert found.tokenizer.encode("ab12 a") == [5, 3, 4, 8]
    assert found.tokenizer.encode(found.tokenizer.chat([{"role": "user", "content": "ab"}])) == [5, 0]
    assert found.tokenizer.eos_ids == (0,)
