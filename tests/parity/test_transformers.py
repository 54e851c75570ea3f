"""Our forward pass beside transformers' on the same weights: logits within 1e-4, for every family and
option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.models import GrowingCache, chapters, fetch, load
from labkit.models.config import ModelConfig

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that every band of it is met within the prompt
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama rope scaling": {"rope_parameters": LLAMA3},
    "llama linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama one kv head each": {"num_key_value_heads": 6},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen3 biases": {"attention_bias": True},
    "qwen3 window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "mistral": {"sliding_window": None},
    "mistral tied": {"tie_word_embeddings": True, "sliding_window": None},
    "mistral window": {"sliding_window": 7},
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Theirs with random weights, and ours loaded from what it saved."""
    family = CLASSES[request.param.split()[0]]
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 300,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,  # not 48 / 6
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        | CASES[request.param]
    )
    torch.manual_seed(len(request.param))
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():  # biases and gains are born as 0 and 1, which would hide a mistake with them
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load(folder)


@torch.no_grad()
def test_logits(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # else any two models would agree
    assert (ours(tokens) - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (13, 1, 1, 20, 5)])
def test_prefill_in_pieces_equals_transformers(pair: tuple[Any, Any], pieces: tuple[int, ...]) -> None:
    theirs, ours = pair
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    cache = GrowingCache(ours.config)
    logits = torch.cat([ours(piece, cache.expect(piece)) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert (logits - theirs(tokens).logits).abs().max() < TOLERANCE


def test_the_config_it_writes_means_the_same_to_transformers(pair: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = pair
    kind = type(theirs.config)
    again = ModelConfig.from_hf(kind(**ours.config.to_hf()).to_dict())
    assert again == ours.config


@torch.no_grad()
def test_sharded_folder(pair: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 300, (1, 20))
    assert torch.equal(load(tmp_path)(tokens), ours(tokens))


@torch.no_grad()
def test_bf16_checkpoint_runs_in_float32(pair: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, _ = pair
    theirs = type(theirs)(theirs.config).bfloat16().eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 300, (1, 20))
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    assert (load(tmp_path)(tokens) - again(tokens).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_bundled_model_as_transformers_reads_the_gguf_tensors() -> None:
    """Our reading of the converted folder beside transformers'."""
    folder = fetch.fetch()
    ours = load(seed=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    text = chapters()[130].text
    tokens = torch.tensor([ours.tokenizer.encode(text)[:200]])
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() < TOLERANCE
    # A model whose rows or pairs are mixed up does not predict English.
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:])
    assert loss < 5.0
