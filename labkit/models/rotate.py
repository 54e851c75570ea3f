"""``rotate``: turn the axes of the residual stream so that no channel has outliers, and the function stays.

QuaRot, Ashkboos et al. 2024, arXiv 2404.00456. In rows: where a linear reads ``x`` it now reads ``x R``, so
its weight becomes ``W R``; where one writes ``y`` it now writes ``y R``, so its weight becomes ``R^T W``. R is
a Hadamard matrix with random signs. RMSNorm commutes with R once its gain is 1.

What cannot be multiplied into a weight is an online transform, a module of the running model: R after the
embedding and R^T before the last norm, so that embedding and head are the same matrix as before; and a
Hadamard matrix before every down projection. Online transforms are recorded in a checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.models.calibrate import ModelStats
from labkit.models.fold import absorb, sites
from labkit.models.llama import Attention, Block, Linear, Llama
from labkit.quant.hadamard import hadamard_block, hadamard_transform


class RotationWarning(UserWarning):
    """A dimension has no Hadamard matrix: its rotation is block-diagonal and mixes less."""


class Rotation(nn.Module):
    """``x -> (x signs) H``, or back with ``inverse``: an orthogonal map of the last axis, (..., size).

    H is ``hadamard_transform``'s, block-diagonal where ``size`` has no Hadamard matrix. ``signs`` is (size,)
    int8 of 1 and -1, or None for all 1.
    """

    signs: Tensor | None

    def __init__(self, size: int, signs: Tensor | None = None, *, inverse: bool = False) -> None:
        super().__init__()
        self.size, self.inverse = size, inverse
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        if self.signs is not None and not self.inverse:
            x = x * self.signs
        x = hadamard_transform(x, inverse=self.inverse)
        return x * self.signs if self.signs is not None and self.inverse else x

    def extra_repr(self) -> str:
        block = hadamard_block(self.size)
        return f"{self.size} in blocks of {block}{', inverse' if self.inverse else ''}"


@torch.no_grad()
def rotate(model: Llama, stats: ModelStats | None = None, *, seed: int = 0) -> Llama:
    """Rotate the residual stream, each head between v and o, and what down reads; returns the same model.

    Norm gains are folded into their readers first. ``seed`` draws the signs of R. ``stats`` is not used.
    Where a dimension has no Hadamard matrix the rotation is block-diagonal, said with a RotationWarning.
    Weights are computed in float64 and keep their dtype: logits change by rounding only.
    Raises ValueError for a model that is rotated or quantized already.
    """
    if online(model):
        raise ValueError(f"{model.name} is rotated already; rotate the original")
    config = model.config
    for what, size in (
        ("hidden_size", config.hidden_size),
        ("head_dim", config.head_dim),
        ("intermediate_size", config.intermediate_size),
    ):
        if (largest := hadamard_block(size)) != size:
            warnings.warn(
                f"no Hadamard matrix of order {size} ({what}): rotating {size // largest} blocks of {largest}",
                RotationWarning,
                stacklevel=2,
            )
    for name, linear in model.linears().items():
        if not isinstance(linear.weight, Tensor):
            raise ValueError(f"{name} is quantized already, {linear.weight.spec}; rotate the original")
    for site in sites(model).values():
        if not isinstance(site.producer, Linear):
            absorb(site)
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(0, 2, (config.hidden_size,), generator=generator) * 2 - 1).to(torch.int8)
    stream, head = Rotation(config.hidden_size, signs), Rotation(config.head_dim)
    down = Rotation(config.intermediate_size)
    for block in model.blocks:
        assert isinstance(block, Block) and isinstance(block.self_attn, Attention)
        attention, mlp = block.self_attn, block.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _turn_inputs(reader, stream)
        _turn_outputs(attention.v_proj, head)
        _turn_inputs(attention.o_proj, head)
        _turn_inputs(mlp.down_proj, down)
        for writer in (attention.o_proj, mlp.down_proj):
            _turn_outputs(writer, stream)
        mlp.mix = Rotation(config.intermediate_size)
    model.model.enter = stream
    model.model.leave = Rotation(config.hidden_size, signs.clone(), inverse=True)
    return model


rotate.paper = "Ashkboos et al. 2024, arXiv 2404.00456"  # type: ignore[attr-defined]


def online(model: Llama) -> dict[str, dict[str, Any]]:
    """The model's online transforms by module name, as plain data; empty for a model that has none.

    Whoever writes the weights for another program must refuse a model whose ``online`` is not empty, unless
    that program can be told of them: without them its weights are those of no model.
    """
    return {
        name: {
            "kind": "hadamard",
            "size": module.size,
            "inverse": module.inverse,
            "signs": module.signs is not None,
        }
        for name, module in model.named_modules()
        if isinstance(module, Rotation)
    }


def restore(model: Llama, places: Mapping[str, Mapping[str, Any]], signs: Mapping[str, Tensor]) -> None:
    """Put online transforms back: ``places`` as ``online`` gives them, ``signs`` (size,) by NAME.signs.

    Raises ValueError for a kind or a place that this labkit does not know, and for signs that do not fit.
    """
    modules, config = dict(model.named_modules()), model.config
    for name, how in places.items():
        size = config.intermediate_size if name.endswith(".mix") else config.hidden_size
        if (how["kind"], how["size"]) != ("hadamard", size) or not isinstance(
            modules.get(name), nn.Identity
        ):
            raise ValueError(f"unknown online transform {name}: {dict(how)}; update labkit")
        found = signs[f"{name}.signs"] if how["signs"] else None
        if found is not None and (
            found.dtype != torch.int8 or found.shape != (size,) or not bool((found.abs() == 1).all())
        ):
            raise ValueError(f"{name}.signs must be {size} int8 of 1 and -1")
        model.set_submodule(name, Rotation(size, found, inverse=how["inverse"]))


def _turn_inputs(linear: Linear, rotation: Rotation) -> None:
    """The linear reads what ``rotation`` makes of each run of its size: W becomes W R."""
    W = linear.weight
    assert isinstance(W, Tensor)
    linear.weight = rotation(W.double().unflatten(1, (-1, rotation.size))).flatten(1).to(W)


def _turn_outputs(linear: Linear, rotation: Rotation) -> None:
    """The linear writes what ``rotation`` makes of each run of its size: W becomes R^T W."""
    W, bias = linear.weight, linear.bias
    assert isinstance(W, Tensor)
    linear.weight = rotation(W.T.double().unflatten(1, (-1, rotation.size))).flatten(1).T.contiguous().to(W)
    if bias is not None:
        turned = rotation(bias.double().unflatten(0, (-1, rotation.size))).flatten().to(bias)
        linear.bias = nn.Parameter(turned, requires_grad=False)
