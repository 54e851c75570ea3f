"""The Fisher against gradients taken one window at a time, finite differences, and what a pass keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.models import Llama, fisher, load, memory
from labkit.models.fisher import fisher_bytes
from labkit.quant import QuantSpec, rtn

from .conftest import random_llama


def loss(model: Llama, window: Tensor) -> Tensor:
    """A window's mean negative log-likelihood, a token at a time."""
    log_p = torch.log_softmax(model(window[None])[0].double(), dim=-1)
    return -torch.stack([log_p[t, window[t + 1]] for t in range(len(window) - 1)]).mean()


@pytest.mark.parametrize("tied", [True, False])
def test_mean_of_squared_gradients(tokens: Tensor, tied: bool) -> None:
    model = random_llama(tie_embeddings=tied, qkv_bias=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    found = fisher(model, tokens)
    linears = {name: linear for name, linear in model.linears().items() if name != "lm_head"}
    assert list(found) == list(linears)
    weights = [linear.weight.requires_grad_() for linear in linears.values()]
    squares = [torch.zeros_like(w) for w in weights]
    for window in tokens:
        for square, gradient in zip(
            squares, torch.autograd.grad(loss(model, window), weights), strict=True
        ):
            square += gradient**2 / len(tokens)
    for name, square in zip(found, squares, strict=True):
        torch.testing.assert_close(found[name], square, rtol=1e-4, atol=1e-4 * float(square.max()))


def test_finite_differences(tokens: Tensor) -> None:
    model = random_llama()
    name = "model.layers.1.mlp.down_proj"
    found = fisher(model, tokens[:1], name)[name]
    weight = model.linears()[name].weight
    for index in found.flatten().argsort(descending=True)[:5].tolist():
        losses = []
        for step in (-0.02, 0.02):
            with torch.no_grad():
                kept = weight.view(-1)[index].clone()
                weight.view(-1)[index] += step
                losses.append(loss(model, tokens[0]).item())
                weight.view(-1)[index] = kept
        assert found.flatten()[index].item() == pytest.approx(
            ((losses[1] - losses[0]) / 0.04) ** 2, rel=0.02
        )


def test_which_layers_and_what_is_left_as_it_was(tokens: Tensor) -> None:
    model = random_llama(tie_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert list(fisher(model, tokens, "*.1.*.q_proj")) == ["model.layers.1.self_attn.q_proj"]
    found = fisher(model, tokens, ["*.0.mlp.up_proj", "lm_head"])
    assert [(name, tuple(square.shape)) for name, square in found.items()] == [
        ("model.layers.0.mlp.up_proj", (64, 48)),
        ("lm_head", (64, 48)),
    ]
    for name, parameter in model.named_parameters():
        kept, values = before[name]
        assert parameter is kept and torch.equal(parameter, values)
        assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize("length", [16, 64, 256])
def test_memory_is_what_the_pass_keeps(length: int) -> None:
    """Counts every storage that autograd keeps, other than the model's own, and the logits' gradients."""
    model = load("tiny")
    window = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # holds on to it, so no address comes twice
        return tensor

    for name, linear in model.linears().items():
        linear.weight.requires_grad_(name != "lm_head")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(window)
        F.cross_entropy(logits[0, :-1], window[0, 1:])
    counted = sum(t.untyped_storage().nbytes() for t in kept.values()) + 2 * logits.nbytes
    said = fisher_bytes(model.config, length, [0])
    assert 1.2 * counted <= said <= 1.6 * counted
    assert fisher_bytes(model.config, length, [10, 30, 20]) - said == 5 * (60 + 30)


def test_what_cannot_be_done_is_refused(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    with pytest.raises(ValueError, match="no linear layer matches"):
        fisher(model, tokens, "layers.0")
    for wrong in (tokens[:0], tokens[:, :1], tokens[0]):
        with pytest.raises(ValueError, match="at least two tokens"):
            fisher(model, wrong)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(MemoryError, match="Fisher information of 14 layers needs"):
        fisher(model, tokens)
    name = "model.layers.0.mlp.up_proj"
    model.linears()[name].weight = rtn(model.linears()[name].weight, QuantSpec.parse("int8 channel"))
    with pytest.raises(ValueError, match=f"{name} is quantized"):
        fisher(model, tokens)
