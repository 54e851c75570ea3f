from __future__ import annotations

import pytest
import torch

from labkit.models import GrowingCache, KVSpec, Linear, visible
from labkit.models.llama import WholeText
from labkit.quant import QuantSpec, encode, fit, rtn

from .conftest import random_llama


def test_visible_by_hand() -> None:
    mask = visible(torch.tensor([[2, 3]]), torch.tensor([[0, 1, 2, 3, 4, -1]]), window=2)
    assert mask.shape == (1, 1, 2, 6)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_a_token_changes_nothing_before_it(tokens: torch.Tensor) -> None:
    model = random_llama(windows=(3, None))
    changed = tokens.clone()
    changed[:, 7] = (tokens[:, 7] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_window_forgets(tokens: torch.Tensor) -> None:
    model = random_llama(windows=(3, 3))  # two layers of it see 2 + 2 tokens back
    changed = tokens.clone()
    changed[:, 2] = (tokens[:, 2] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, 7:], after[:, 7:], atol=1e-6)
    assert (before[:, 6] - after[:, 6]).abs().max() > 1e-4


def test_only_distances_matter(tokens: torch.Tensor) -> None:
    model = random_llama()
    cache = GrowingCache(model.config)
    cache.length = 100  # the same text, further on

    class Later(GrowingCache):
        def update(self, layer, k, v):  # what is before position 100 does not exist
            return k, v, visible(self.positions, self.positions)

    later = Later(model.config)
    later.length = 100
    assert (model(tokens, later.expect(tokens)) - model(tokens)).abs().max() < 1e-4


def test_keys_and_values_are_rounded_where_they_are_kept(tokens: torch.Tensor) -> None:
    """A cache that does not round itself sees numbers that fp16 holds, of the one that is asked for."""

    class Seen(WholeText):
        def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):  # type: ignore[no-untyped-def]
            for name, part in (("key", k), ("value", v)):
                fits[name] = fits.get(name, True) and torch.equal(part, part.half().float())
            return super().update(layer, k, v)

    model, results = random_llama(), {}
    for kv in (KVSpec(), KVSpec("fp16"), KVSpec(value="fp16"), KVSpec("fp16", "fp16")):
        fits: dict[str, bool] = {}
        model.kv = kv
        results[kv] = model(tokens, Seen(model.config, tokens))
        assert fits == {"key": kv.key == "fp16", "value": kv.value == "fp16"}
    exact = results.pop(KVSpec())
    for kv, found in results.items():
        assert 0 < (found - exact).abs().max() < 0.01 * exact.abs().max(), kv


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_takes_a_quantized_weight_and_gives_it_back(bias: bool) -> None:
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    linear = Linear(weight, torch.randn(32) if bias else None)
    quantized = rtn(weight, QuantSpec.parse("int4 g32 asym"))
    linear.weight = quantized
    assert linear.weight is quantized and "weight" not in dict(linear.named_parameters())
    expected = x @ quantized.dequantize().T + (linear.bias if bias else 0)
    assert (linear(x) - expected).abs().max() < 0.02 * expected.abs().max()
    linear.weight = again = rtn(-weight, QuantSpec.parse("int4 g32 asym"))
    expected = x @ again.dequantize().T + (linear.bias if bias else 0)  # the old kernel is gone
    assert (linear(x) - expected).abs().max() < 0.02 * expected.abs().max()
    linear.weight = weight * 2
    torch.testing.assert_close(linear(x), x @ (2 * weight).T + (linear.bias if bias else 0))
    assert (linear.out_features, linear.in_features) == (32, 64)


def test_a_linear_rounds_what_it_multiplies_where_it_has_a_grid_for_it() -> None:
    weight, x, grid = torch.randn(32, 64), torch.randn(3, 64), QuantSpec.parse("int4 channel")
    seen = encode(x, grid, fit(x, grid)).dequantize()
    linear = Linear(weight)
    before = linear(x)
    for held in (weight, rtn(weight, QuantSpec.parse("int4 g32 asym"))):
        linear.weight, linear.input = held, grid
        dense = held if isinstance(held, torch.Tensor) else held.dequantize()
        torch.testing.assert_close(linear(x), seen @ dense.T)
        assert "input int4 channel" in repr(linear)
        linear.input = None
        torch.testing.assert_close(linear(x), x @ dense.T)  # the kernel that rounded is gone
    assert not torch.allclose(before, seen @ weight.T, atol=0.01)


def test_the_steps_of_the_pass_are_the_pass(tokens: torch.Tensor) -> None:
    model = random_llama()
    x, rotary, cache = model.begin(tokens)
    for block in model.blocks:
        x = block(x, rotary, cache)
    assert torch.equal(model.end(x), model(tokens))
