"""Calibration: which text it sees, and that the Hessians are those of the layers' inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from labkit import models
from labkit.models import protocol
from labkit.models.calibrate import shared_copy, walk


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def windows(tiny: models.Llama) -> Tensor:
    return models.calibration_windows(tiny.tokenizer, 3, 40, seed=0)


def test_calibration_and_evaluation_chapters_are_far_apart() -> None:
    first = [chapter.number for chapter in protocol.calibration_chapters()]
    last = [chapter.number for chapter in protocol.evaluation_chapters()]
    assert first == list(range(1, 82))  # 60 % of 135
    assert last == list(range(109, 136))  # 20 % of 135


def test_no_window_of_one_lies_in_the_text_of_the_other(tiny: models.Llama) -> None:
    by_number = {chapter.number: chapter.text for chapter in models.chapters()}
    first = "\n\n".join(by_number[n] for n in range(1, 82))
    last = "\n\n".join(by_number[n] for n in range(109, 136))
    for seed in range(3):
        for window in models.calibration_windows(tiny.tokenizer, 32, 256, seed):
            text = tiny.tokenizer.decode(window.tolist()).strip("\ufffd")
            assert text in first
            assert text not in last
    for ids in models.protocol_for(tiny.tokenizer).windows:
        text = tiny.tokenizer.decode(ids).strip("\ufffd")
        assert text in last
        assert text not in first


def test_windows_are_drawn_by_seed_and_do_not_overlap(tiny: models.Llama) -> None:
    text = "\n\n".join(chapter.text for chapter in models.chapters()[:81])
    stream = torch.tensor(tiny.tokenizer.encode(text))
    everything = len(stream) // 512
    windows = models.calibration_windows(tiny.tokenizer, everything, 512, seed=7)
    # All of them together are the whole text, cut and shuffled: so no two overlap.
    expected = sorted(map(tuple, stream[: everything * 512].view(-1, 512).tolist()))
    assert sorted(map(tuple, windows.tolist())) == expected
    assert windows.dtype == torch.int64
    again = models.calibration_windows(tiny.tokenizer, 5, 512, seed=7)
    assert again.tolist() == windows[:5].tolist()
    other = models.calibration_windows(tiny.tokenizer, 5, 512, seed=8)
    assert other.tolist() != again.tolist()
    with pytest.raises(ValueError, match=f"holds {everything}"):
        models.calibration_windows(tiny.tokenizer, everything + 1, 512, seed=7)


def inputs_of(model: models.Llama, tokens: Tensor) -> dict[str, Tensor]:
    """Every linear's input by plain forward passes, a window at a time: (tokens seen, in_features)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in model.linears()}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name, linear in model.linears().items()
    ]
    with torch.no_grad():
        for window in tokens:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_hessians_are_those_of_the_inputs(tiny: models.Llama, windows: Tensor) -> None:
    found = models.hessians(tiny, windows, "*")
    inputs = inputs_of(tiny, windows)
    assert found.keys() == inputs.keys()
    for name, stats in found.items():
        x = inputs[name].double()
        assert stats.samples == 120
        torch.testing.assert_close(stats.hessian.double(), x.T @ x / 120, rtol=1e-4, atol=1e-6)


def test_layers_with_one_input_share_one_hessian(tiny: models.Llama, windows: Tensor) -> None:
    found = models.hessians(tiny, windows, "model.layers.1.*")
    q, k, v, o = (found[f"model.layers.1.self_attn.{part}_proj"] for part in "qkvo")
    gate, up, down = (found[f"model.layers.1.mlp.{part}_proj"] for part in ("gate", "up", "down"))
    assert len(found) == 7
    assert q is k is v
    assert gate is up
    assert not any(a is b for a, b in itertools.combinations((q, o, gate, down), 2))
    with pytest.raises(ValueError, match="no linear layer matches"):
        models.hessians(tiny, windows, "layers.1")


def test_a_walk_stops_after_the_last_layer_asked_for(tiny: models.Llama, windows: Tensor) -> None:
    model, entered = shared_copy(tiny), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: entered.append(i))
    walk(model, windows, lambda *_: None, ["model.layers.1.mlp.up_proj"], progress=False)
    assert entered == [0, 1]


def test_a_walk_leaves_no_hooks_behind_even_when_interrupted(tiny: models.Llama, windows: Tensor) -> None:
    model = shared_copy(tiny)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(model, windows, interrupt, model.linears(), progress=False)
    assert not any(linear._forward_pre_hooks for linear in model.linears().values())


def test_a_shared_copy_shares_tensors_and_nothing_else(tiny: models.Llama) -> None:
    copy = shared_copy(tiny)
    for (name, mine), (_, theirs) in zip(copy.linears().items(), tiny.linears().items(), strict=True):
        assert mine is not theirs, name
        assert mine.weight is theirs.weight, name
    assert copy.tokenizer is tiny.tokenizer
    before = tiny.lm_head.weight
    copy.lm_head.weight = torch.zeros(copy.lm_head.weight.shape)
    assert tiny.lm_head.weight is before
    assert copy.model.embed_tokens.weight is tiny.model.embed_tokens.weight
