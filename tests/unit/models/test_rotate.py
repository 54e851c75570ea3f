"""Rotation: the function stays, the weights are those of the formula, and a checkpoint knows of it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from labkit import models
from labkit.models import TRANSFORMS, GrowingCache, ModelStats, RotationWarning, online, rotate
from labkit.models.calibrate import shared_copy
from labkit.models.config import ModelConfig
from labkit.models.fold import absorb, sites
from labkit.models.llama import Llama
from labkit.models.rotate import Rotation, restore
from labkit.quant import QuantSpec, hadamard, rtn
from labkit.serving.engine import Engine
from labkit.serving.sampling import SamplingParams

from .conftest import random_llama

VARIANTS = [
    {},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"qk_norm": True, "architecture": "qwen3"},
    {"kv_heads": 6},
    {"tie_embeddings": True},
    {"windows": (5, None), "architecture": "mistral"},
]


def exact_logits(model: Llama, tokens: Tensor) -> Tensor:
    """Logits in the dtype of the weights; ``forward`` gives float32."""
    with torch.no_grad():
        x, rotary, cache = model.begin(tokens)
        for block in model.blocks:
            x = block(x, rotary, cache)
        return model.lm_head(model.final(x))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_function_stays(options: dict, dtype: torch.dtype, tolerance: float, tokens: Tensor) -> None:
    model = random_llama(**options).to(dtype)
    model.blocks[0].input_layernorm.weight.data[:2] = torch.tensor([0.0, -1.5])  # gains that fold refuses
    model.blocks[1].post_attention_layernorm.weight.data[7] = -0.3
    before = exact_logits(model, tokens)
    assert rotate(model) is model
    after = exact_logits(model, tokens)
    assert after.dtype == dtype
    assert (after - before).abs().max() < tolerance * before.abs().max()


def test_the_tiny_model_says_the_same() -> None:
    model = models.load("tiny")
    tokens = models.calibration_windows(model.tokenizer, 2, 64, seed=0)
    single, double = shared_copy(model), shared_copy(model).double()
    for which, tolerance in ((single, 1e-3), (double, 1e-6)):
        before = exact_logits(which, tokens)
        assert (exact_logits(rotate(which), tokens) - before).abs().max() < tolerance


@pytest.mark.needs("bundled model")
def test_the_bundled_model_says_the_same() -> None:
    model = models.load()
    tokens = torch.tensor([model.tokenizer.encode("Call me Ishmael. Some years ago, never mind how long")])
    before = exact_logits(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 576 = 36 x 16 and 1536 = 12 x 128: nothing falls back
        rotate(model)
    assert (exact_logits(model, tokens) - before).abs().max() < 1e-3
    del model
    model = models.load().double()
    before = exact_logits(model, tokens)
    assert (exact_logits(rotate(model), tokens) - before).abs().max() < 1e-6


def test_the_weights_are_those_of_the_formula() -> None:
    model = random_llama(qkv_bias=True, o_bias=True, mlp_bias=True)
    old = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rotate(model, seed=4)
    signs = model.model.enter.signs.double()
    assert set(signs.tolist()) == {-1.0, 1.0}
    R = signs[:, None] * hadamard(48) / 48**0.5  # x R: signs first, then H
    per_head = hadamard(16) / 4
    heads, kv = torch.block_diag(*[per_head] * 6), torch.block_diag(*[per_head] * 2)
    down = hadamard(64) / 8
    for i in range(2):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        g1 = old[f"model.layers.{i}.input_layernorm.weight"]
        g2 = old[f"model.layers.{i}.post_attention_layernorm.weight"]
        expected = {
            f"model.layers.{i}.input_layernorm.weight": torch.ones(48).double(),
            f"model.layers.{i}.post_attention_layernorm.weight": torch.ones(48).double(),
            f"{at}.q_proj.weight": old[f"{at}.q_proj.weight"] * g1 @ R,
            f"{at}.k_proj.weight": old[f"{at}.k_proj.weight"] * g1 @ R,
            f"{at}.v_proj.weight": kv.T @ (old[f"{at}.v_proj.weight"] * g1) @ R,
            f"{at}.v_proj.bias": old[f"{at}.v_proj.bias"] @ kv,
            f"{at}.o_proj.weight": R.T @ old[f"{at}.o_proj.weight"] @ heads,
            f"{at}.o_proj.bias": old[f"{at}.o_proj.bias"] @ R,
            f"{mlp}.gate_proj.weight": old[f"{mlp}.gate_proj.weight"] * g2 @ R,
            f"{mlp}.up_proj.weight": old[f"{mlp}.up_proj.weight"] * g2 @ R,
            f"{mlp}.down_proj.weight": R.T @ old[f"{mlp}.down_proj.weight"] @ down,
            f"{mlp}.down_proj.bias": old[f"{mlp}.down_proj.bias"] @ R,
            f"{at}.q_proj.bias": old[f"{at}.q_proj.bias"],
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(
                model.state_dict()[name], tensor.float(), msg=lambda m, n=name: f"{n}: {m}"
            )
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name].double(), old[name]), name


def test_what_stays_is_shared_and_tied() -> None:
    model = random_llama(tie_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    turned = rotate(shared_copy(model))
    assert turned.lm_head.weight is turned.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert not online(model) and not torch.equal(
        turned.linears()["model.layers.0.mlp.up_proj"].weight,
        model.linears()["model.layers.0.mlp.up_proj"].weight,
    )


def test_the_seed_draws_the_signs() -> None:
    first, again, other = (rotate(random_llama(), seed=seed).model.enter.signs for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 12 < int((first == 1).sum()) < 36


def test_an_outlier_channel_is_spread_over_all() -> None:
    name, model = "model.layers.0.mlp.gate_proj", random_llama()
    model.linears()[name].weight.data[:, 5] *= 30
    peaks = []  # how far each row's largest weight stands out
    for which in (model, rotate(shared_copy(model))):
        w = which.linears()[name].weight
        peaks.append(float((w.abs().amax(dim=1) / w.square().mean(dim=1).sqrt()).mean()))
    assert peaks[0] > 4 and peaks[1] < 2.5, peaks  # of 48 equal weights it would be 1, of a lone one 6.9


def test_a_dimension_without_a_hadamard_matrix_gets_blocks_and_says_so(tokens: Tensor) -> None:
    model = random_llama(hidden_size=50, intermediate_size=100, head_dim=14).double()
    before = exact_logits(model, tokens)
    with pytest.warns(RotationWarning) as said:
        rotate(model)
    texts = " ".join(str(w.message) for w in said)
    assert "order 50 (hidden_size): rotating 25 blocks of 2" in texts
    assert "order 14 (head_dim): rotating 7 blocks of 2" in texts
    assert "order 100 (intermediate_size): rotating 5 blocks of 20" in texts
    assert (exact_logits(model, tokens) - before).abs().max() < 1e-9 * before.abs().max()
    R = torch.block_diag(*[hadamard(2)] * 25) / 2**0.5 * model.model.enter.signs.double()[:, None]
    x = torch.randn(3, 50, dtype=torch.float64)
    torch.testing.assert_close(model.model.enter(x), x @ R)
    torch.testing.assert_close(model.model.leave(x), x @ R.T)


def test_twice_or_too_late_is_refused_and_changes_nothing() -> None:
    model = rotate(random_llama())
    with pytest.raises(ValueError, match="rotated already"):
        rotate(model)
    model = random_llama()
    linear = model.linears()["model.layers.1.mlp.down_proj"]
    linear.weight = rtn(linear.weight, QuantSpec.parse("int8 channel"))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down_proj is quantized already, int8 channel"):
        rotate(model)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())


def test_a_gain_is_absorbed_whole(tokens: Tensor) -> None:
    model = random_llama()
    model.blocks[0].input_layernorm.weight.data[:2] = torch.tensor([0.0, -1.5])
    before, held = model(tokens), model.linears()["model.layers.0.self_attn.q_proj"].weight.clone()
    gain = model.blocks[0].input_layernorm.weight.clone()
    absorb(sites(model)["model.layers.0.input_layernorm"])
    assert bool((model.blocks[0].input_layernorm.weight == 1).all())
    torch.testing.assert_close(model.linears()["model.layers.0.self_attn.q_proj"].weight.data, held * gain)
    assert (model(tokens) - before).abs().max() < 1e-4 * before.abs().max()
    with pytest.raises(ValueError, match="only a norm has a gain"):
        absorb(sites(model)["model.layers.0.mlp.up_proj"])


RECIPE = """
name: turned
calibration: {windows: 2, tokens: 32}
transforms: [{name: awq_scale, options: {steps: 2}}, {name: rotate, options: {seed: 9}}]
rules:
  - {match: "*.1.*", weight: keep}
  - {match: "*.2.mlp.*", weight: int4 g64 asym, method: gptq}
  - {match: "model.layers.*", weight: int8 channel, method: rtn}
"""


@pytest.fixture(scope="module")
def tiny() -> Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def turned(tiny: Llama) -> Llama:
    return models.quantize(tiny, models.Recipe.parse(RECIPE), seed=3)


@pytest.fixture(scope="module")
def saved(turned: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(turned, tmp_path_factory.mktemp("checkpoints") / "turned")


def test_quantizing_a_rotated_model_quantizes_the_rotated_weights(tiny: Llama) -> None:
    made = models.quantize(tiny, "w3a16-rotate-rtn-g64")
    by_hand, spec = rotate(shared_copy(tiny)), QuantSpec.parse("int3 g64 asym")
    for name, linear in made.linears().items():
        if name != "lm_head":
            assert torch.equal(linear.weight.codes, rtn(by_hand.linears()[name].weight, spec).codes), name
    assert online(made).keys() == online(by_hand).keys() and not online(tiny)
    assert made.lm_head.weight is tiny.lm_head.weight


def test_transforms_run_in_their_order(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spied(name: str) -> Callable[..., Llama]:
        def spy(model: Llama, stats: ModelStats | None = None, *, steps: int = 20, seed: int = 0) -> Llama:
            called.append(name)
            assert stats is not None and stats.tokens.shape == (2, 32)
            assert len(stats.grids) == 3 * 7 and not any(".1." in layer for layer in stats.grids)
            return model

        return spy

    for name in ("awq_scale", "rotate"):
        monkeypatch.setitem(TRANSFORMS, name, spied(name))
    models.quantize(tiny, models.Recipe.parse(RECIPE))
    assert called == ["awq_scale", "rotate"]


def test_the_head_reads_the_same_after_a_rotation(tiny: Llama) -> None:
    tokens = models.calibration_windows(tiny.tokenizer, 2, 32, seed=0)
    before = models.hessians(tiny, tokens, "lm_head")["lm_head"].hessian
    after = models.hessians(rotate(shared_copy(tiny)), tokens, "lm_head")["lm_head"].hessian
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_evaluation_runs_the_online_transforms(tiny: Llama, turned: Llama) -> None:
    short = models.protocol.build(tiny.tokenizer, windows=2, tokens=32)
    report = models.evaluate(turned, tiny, short)
    assert report.kl < 0.01  # int8, int4 in one MLP
    for place in online(turned):
        without = shared_copy(turned)
        without.set_submodule(place, nn.Identity())
        assert models.evaluate(without, tiny, short).kl > 10 * report.kl, place


def test_a_checkpoint_restores_the_online_transforms(turned: Llama, saved: Path) -> None:
    again = models.load(saved)
    assert online(again) == online(turned)
    assert {name: how["signs"] for name, how in online(again).items()} == {
        "model.enter": True,
        "model.leave": True,
        **{f"model.layers.{i}.mlp.mix": False for i in range(4)},
    }
    tokens = models.calibration_windows(turned.tokenizer, 1, 24, seed=0)
    with torch.no_grad():
        assert torch.equal(again(tokens), turned(tokens))
    assert again.config == turned.config and again.made.recipe.to_dict() == turned.made.recipe.to_dict()
    assert models.sizes(again) == models.sizes(turned)
    stored = load_file(saved / "model.safetensors")
    assert models.sizes(again)[2] == sum(tensor.nbytes for tensor in stored.values())


def test_a_checkpoint_can_be_served(tiny: Llama, saved: Path) -> None:
    model = models.load(saved)
    prompt = tiny.tokenizer.encode("Call me Ishmael.")
    expected, cache = list(prompt), GrowingCache(model.config)
    with torch.no_grad():
        step = torch.tensor([prompt])
        for _ in range(6):
            chosen = int(model(step, cache.expect(step))[0, -1].argmax())
            expected.append(chosen)
            step = torch.tensor([[chosen]])
    with Engine(model) as engine:
        [answer] = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    assert [token.id for token in answer.tokens] == expected[len(prompt) :]


def test_no_other_reader_takes_it_for_the_plain_architecture(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "labkit_rotated_llama"
    assert config["architectures"] == ["labkit_rotated_LlamaForCausalLM"]
    config.pop("quantization_config")
    with pytest.raises(ValueError, match="unsupported model_type 'labkit_rotated_llama'"):
        ModelConfig.from_hf(config)
    folder = Path(shutil.copytree(saved, tmp_path / "stripped"))
    marker = json.loads((folder / "labkit.json").read_text())
    del marker["online"]  # as an older labkit would read it
    (folder / "labkit.json").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.enter": {"kind": "givens"}}, "unknown online transform model.enter"),
        ({"model.enter": {"size": 64}}, "unknown online transform model.enter"),
        ({"model.norm": {"kind": "hadamard"}}, "unknown online transform model.norm"),
        ({"model.layers.7.mlp.mix": {"kind": "hadamard"}}, "unknown online transform"),
        ({"model.layers.0.mlp.mix": {"signs": True}}, "mix.signs"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    saved: Path, tmp_path: Path, change: dict, says: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    marker = json.loads((folder / "labkit.json").read_text())
    default = {"kind": "hadamard", "size": 128, "inverse": False, "signs": False}
    for name, how in change.items():
        marker["online"][name] = {**marker["online"].get(name, default), **how}
    (folder / "labkit.json").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=says):
        models.load(folder)


def test_signs_must_be_signs() -> None:
    model = random_llama()
    places = {"model.enter": {"kind": "hadamard", "size": 48, "inverse": False, "signs": True}}
    for bad in (torch.zeros(48, dtype=torch.int8), torch.ones(47, dtype=torch.int8), torch.ones(48)):
        with pytest.raises(ValueError, match="48 int8 of 1 and -1"):
            restore(model, places, {"model.enter.signs": bad})
    restore(model, places, {"model.enter.signs": torch.ones(48, dtype=torch.int8)})
    assert isinstance(model.model.enter, Rotation)
