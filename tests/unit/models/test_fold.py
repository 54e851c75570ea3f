from __future__ import annotations

import pytest
import torch

from labkit.models import fetch, load, off_grid
from labkit.models.fold import fold, sites
from labkit.quant import QuantSpec, rtn

from .conftest import random_llama

# hidden 48, 2 KV heads of 16 channels, MLP 64
CHANNELS = {
    "input_layernorm": 48,
    "self_attn.v_proj": 32,
    "post_attention_layernorm": 48,
    "mlp.up_proj": 64,
}


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {"qk_norm": True}]
)
@pytest.mark.parametrize("place", CHANNELS)
def test_a_fold_changes_the_weights_and_not_the_function(
    place: str, options: dict, tokens: torch.Tensor
) -> None:
    model = random_llama(**options)
    before = model(tokens)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    site = sites(model)[f"model.layers.1.{place}"]
    assert site.channels == CHANNELS[place]
    factor = torch.linspace(0.25, 4.0, site.channels)
    fold(site, factor)
    after = model(tokens)
    assert (after - before).abs().max() < 2e-4 * before.abs().max()
    # The producer really hands on factor times as much.
    name = f"model.layers.1.{place}"
    rows = factor if "norm" in place else factor[:, None]
    torch.testing.assert_close(model.state_dict()[f"{name}.weight"], old[f"{name}.weight"] * rows)
    if f"{name}.bias" in old:
        torch.testing.assert_close(model.state_dict()[f"{name}.bias"], old[f"{name}.bias"] * factor)


def test_v_into_o_knows_which_query_heads_share_a_kv_head(tokens: torch.Tensor) -> None:
    model = random_llama()
    weight = model.linears()["model.layers.0.self_attn.o_proj"].weight.clone()
    factor = torch.ones(32)
    factor[16:] = 2.0  # the second KV head; query heads 3, 4, 5 use it: columns 48 to 95
    fold(sites(model)["model.layers.0.self_attn.v_proj"], factor)
    changed = model.linears()["model.layers.0.self_attn.o_proj"].weight
    assert torch.equal(changed[:, :48], weight[:, :48])
    assert torch.equal(changed[:, 48:], weight[:, 48:] / 2)


def test_a_fold_leaves_tensors_alone_that_others_share() -> None:
    model = random_llama()
    held = model.linears()["model.layers.0.self_attn.q_proj"].weight
    copy = held.clone()
    fold(sites(model)["model.layers.0.input_layernorm"], torch.full((48,), 2.0))
    assert torch.equal(held, copy)


def test_bad_factors_are_named() -> None:
    site = sites(random_llama())["model.layers.0.self_attn.v_proj"]
    with pytest.raises(ValueError, match=r"expected 32 factors.*found shape \(96,\)"):
        fold(site, torch.ones(96))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="1 of 32 are not"):
            fold(site, torch.cat([torch.ones(31), torch.tensor([bad])]))


def test_a_quantized_layer_cannot_be_folded() -> None:
    model = random_llama()
    linear = model.linears()["model.layers.0.self_attn.o_proj"]
    linear.weight = rtn(linear.weight, QuantSpec.parse("int8 channel sym"))
    with pytest.raises(ValueError, match="fold before quantizing"):
        fold(sites(model)["model.layers.0.self_attn.v_proj"], torch.ones(32))


def test_off_grid_moves_every_site_and_depends_on_the_seed(tokens: torch.Tensor) -> None:
    original, first, again, other = (random_llama() for _ in range(4))
    off_grid(first, 0), off_grid(again, 0), off_grid(other, 1)
    names = [name for name in original.state_dict() if ".layers." in name]
    for name in names:
        old, new = original.state_dict()[name], first.state_dict()[name]
        assert not torch.equal(old, new)
        assert torch.equal(new, again.state_dict()[name])
        assert not torch.equal(new, other.state_dict()[name])
    # Each gain moves by at most the largest factor, and some come near it.
    ratio = first.state_dict()[names[-1]] / original.state_dict()[names[-1]]
    assert ratio.max() <= 1.15 * 1.001 and ratio.min() >= 0.999 / 1.15
    assert ratio.max() > 1.1 and ratio.min() < 0.9
    assert (first(tokens) - original(tokens)).abs().max() < 1e-3


@pytest.fixture(scope="module")
def bundled():
    fetch.fetch()
    return load(seed=None), load(seed=0)


def relative_error(weight: torch.Tensor, spec: str) -> float:
    return float((rtn(weight, QuantSpec.parse(spec)).dequantize() - weight).norm() / weight.norm())


def test_the_bundled_model_is_lossless_in_four_bits_only_before(bundled) -> None:
    shipped, moved = bundled
    spec = "int4 g32 asym-float scale=fp32"  # what Q4_1 is
    for part in (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ):
        name = f"model.layers.7.{part}"
        assert relative_error(shipped.linears()[name].weight, spec) < 1e-6
        assert relative_error(moved.linears()[name].weight, spec) > 0.05


@torch.no_grad()
def test_the_bundled_model_says_the_same_before_and_after(bundled) -> None:
    shipped, moved = bundled
    tokens = torch.tensor(
        [shipped.tokenizer.encode("Call me Ishmael. Some years ago, never mind how long precisely")]
    )
    assert (shipped(tokens) - moved(tokens)).abs().max() < 1e-3
