"""``fold``: the one place that rescales what a part of the model hands on and undoes it where it is used.

Smoothing, AWQ's scales and ``off_grid`` all rest on it: each only chooses the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.models.llama import Attention, Block, Linear, Llama, RMSNorm


@dataclass(frozen=True)
class Site:
    """A producer of channels and the linears that read them, each channel only scaled or mixed over tokens.

    name       the producer's Hugging Face name
    producer   a norm (its gain is scaled) or a linear (its rows and bias are)
    consumers  the linears whose input columns those channels are
    repeat     each block of ``head_dim`` producer channels feeds this many blocks of the consumer: the query
               heads that share one KV head; 1 everywhere else
    """

    name: str
    producer: RMSNorm | Linear
    consumers: tuple[Linear, ...]
    repeat: int = 1
    head_dim: int = 1

    @property
    def channels(self) -> int:
        """How many factors the site takes: one per channel that the producer hands on."""
        return int(self.producer.weight.shape[0])

    def spread(self, per_channel: Tensor) -> Tensor:
        """From one number per producer channel, (channels,), to one per consumer column, (in_features,)."""
        if self.repeat == 1:
            return per_channel
        return per_channel.view(-1, self.head_dim).repeat_interleave(self.repeat, dim=0).flatten()


def sites(model: Llama) -> dict[str, Site]:
    """Every place of the model where a factor can be folded in, by its producer's name, in order.

    Per layer: each norm into the linears that read it; v into o; up into down, unless an online transform
    stands between them. Not the gate, whose SiLU is no linear map; not q and k, between which the rotary
    embedding and perhaps a norm stand.
    """
    found: list[Site] = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention, mlp, prefix = block.self_attn, block.mlp, f"model.layers.{index}"
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        found += [
            Site(f"{prefix}.input_layernorm", block.input_layernorm, readers),
            _values(f"{prefix}.self_attn.v_proj", attention, model),
            Site(
                f"{prefix}.post_attention_layernorm",
                block.post_attention_layernorm,
                (mlp.gate_proj, mlp.up_proj),
            ),
        ]
        if isinstance(mlp.mix, nn.Identity):
            found.append(Site(f"{prefix}.mlp.up_proj", mlp.up_proj, (mlp.down_proj,)))
    return {site.name: site for site in found}


def _values(name: str, attention: Attention, model: Llama) -> Site:
    # Attention only mixes tokens, channel by channel, so what v's channel i is scaled by reaches o's
    # columns intact.
    config = model.config
    return Site(
        name, attention.v_proj, (attention.o_proj,), config.heads // config.kv_heads, config.head_dim
    )


def fold(site: Site, factor: Tensor) -> None:
    """Multiply what is handed on by ``factor`` (site.channels,), and divide the consumers' columns by it.

    The function of the model stays the same, up to rounding. The modules get new tensors; tensors that
    another model shares are not written to. Raises ValueError for a factor of another shape, one that is
    not positive and finite, or a layer that is quantized already.
    """
    if tuple(factor.shape) != (site.channels,):
        raise ValueError(
            f"{site.name}: expected {site.channels} factors, one per channel, shape ({site.channels},); "
            f"found shape {tuple(factor.shape)}"
        )
    if bad := int((~(torch.isfinite(factor) & (factor > 0))).sum()):
        raise ValueError(
            f"{site.name}: factors must be positive and finite, {bad} of {site.channels} are not"
        )
    producer, gain = site.producer, _dense(site, site.producer)
    columns = [_dense(site, linear) for linear in site.consumers]
    factor = factor.to(gain)
    if isinstance(producer, RMSNorm):
        producer.weight = _parameter(gain * factor)
    else:
        producer.weight = gain * factor[:, None]  # (out, in), a factor per row
        if producer.bias is not None:
            producer.bias = _parameter(producer.bias * factor)
    undo = site.spread(1 / factor)
    for linear, weight in zip(site.consumers, columns, strict=True):
        linear.weight = weight * undo  # (out, in), a factor per column


def absorb(site: Site) -> None:
    """Move the whole gain of a norm into the linears that read it: the gain is 1 afterwards.

    Any gain goes, negative and zero too, which ``fold`` cannot undo. Raises ValueError for a site that no
    norm produces, or a layer that is quantized already.
    """
    if not isinstance(site.producer, RMSNorm):
        raise ValueError(f"{site.name}: only a norm has a gain; fold a factor instead")
    gain = _dense(site, site.producer)
    columns = [_dense(site, linear) for linear in site.consumers]
    site.producer.weight = _parameter(torch.ones_like(gain))
    for linear, weight in zip(site.consumers, columns, strict=True):
        linear.weight = weight * gain  # (out, in), a factor per column


def _dense(site: Site, module: RMSNorm | Linear) -> Tensor:
    if not isinstance(module.weight, Tensor):
        raise ValueError(
            f"{site.name}: fold before quantizing; a layer here is {module.weight.spec} already"
        )
    return module.weight


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
