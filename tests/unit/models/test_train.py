"""Training: the loss and its gradients against one plain backward pass, the codes, the control, the breaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import models
from labkit.models import memory
from labkit.models.calibrate import shared_copy
from labkit.quant import QuantizedTensor, QuantSpec, encode, fit, lsq

RECIPE = models.Recipe.parse(
    """
    name: small
    train: {steps: 6, windows: 3, tokens: 32, rate: 0.02, scale_rate: 0.02, warmup: 2}
    rules:
      - {match: "*.0.self_attn.*", weight: int3 g64, method: rtn}
      - {match: "*.mlp.*", weight: int2 g64 asym, method: rtn, options: {observer: mse}}
    """
)
SPECS = {"self_attn": "int3 g64", "mlp": "int2 g64 asym"}


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def batches(tiny: models.Llama) -> Tensor:
    assert RECIPE.train is not None
    return models.training_batches(tiny.tokenizer, RECIPE.train, seed=1)


@pytest.fixture(scope="module")
def trained(tiny: models.Llama, batches: Tensor) -> models.Llama:
    return models.train(tiny, RECIPE, batches)


def packed(model: models.Llama) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, linear in model.linears().items()
        if isinstance(linear.weight, QuantizedTensor)
        for part, tensor in linear.weight.pack().tensors.items()
    }


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_batches_come_from_the_calibration_text_and_the_seed(tiny: models.Llama) -> None:
    training = models.Training(steps=5, windows=3, tokens=16)
    batches = models.training_batches(tiny.tokenizer, training, seed=4)
    assert batches.shape == (5, 3, 16) and batches.dtype == torch.int64
    assert torch.equal(batches, models.training_batches(tiny.tokenizer, training, seed=4))
    assert not torch.equal(batches, models.training_batches(tiny.tokenizer, training, seed=5))
    book = models.chapters()
    stream = tiny.tokenizer.encode("\n\n".join(c.text for c in book[: int(0.6 * len(book))]))
    text = ",".join(map(str, stream))
    for window in batches.flatten(0, 1):
        assert ",".join(map(str, window.tolist())) in text
    with pytest.raises(
        ValueError, match=r"asked for windows of 10000000 tokens; the calibration text has \d+"
    ):
        models.training_batches(tiny.tokenizer, replace(training, tokens=10**7))


def test_one_step_is_adamw_on_the_gradient_of_the_kl(tiny: models.Llama, batches: Tensor) -> None:
    """Written plainly: one graph through LSQ and the whole model, one backward, one AdamW by its formula."""
    rate = 0.02
    training = models.Training(
        steps=1, windows=3, tokens=32, rate=rate, scale_rate=2 * rate, warmup=0, decay=0.1
    )
    recipe = replace(RECIPE, train=training)
    losses: list[float] = []
    found = models.train(tiny, recipe, batches[:1], callback=lambda step, loss: losses.append(loss))

    plain, parameters = shared_copy(tiny), {}
    linears = plain.linears()
    for name, rule in recipe.plan(linears).items():
        v = tiny.linears()[name].weight.detach().clone().requires_grad_()
        params = fit(v.detach(), rule.weight, rule.options.get("observer", "minmax"))
        s, zero = params.dense()
        beta = None if zero is None else (-zero * s).requires_grad_()
        parameters[name] = (v, s.clone().requires_grad_(), beta, rule.weight)
        # A plain tensor in the parameter's place, so that the graph runs on into v, s and beta.
        del linears[name]._parameters["weight"]
        linears[name].__dict__["weight"] = lsq(v, rule.weight, parameters[name][1], beta)
    log_p, log_q = (F.log_softmax(m(batches[0]), dim=-1).double() for m in (tiny, plain))
    loss = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    loss.backward()
    assert losses == [pytest.approx(loss.item(), rel=1e-4)]

    everything = [p for v, s, beta, _ in parameters.values() for p in (v, s, beta) if p is not None]
    norm = torch.stack([p.grad.norm() for p in everything]).norm()
    clip = min(1.0, 1.0 / norm.item())
    for name, (v, s, beta, spec) in parameters.items():
        weight = found.linears()[name].weight
        # AdamW's first step: both moments are the gradient's own, so it moves by the rate times its sign.
        unit = v.detach().double().square().mean().sqrt().item()
        moved = {}
        for key, p, pace, decay in (
            ("v", v, rate, 0.1),
            ("s", s, 2 * rate, 0),
            ("beta", beta, 2 * rate, 0),
        ):
            if p is not None:
                g, pace = p.grad * clip, pace * unit
                moved[key] = p.detach() * (1 - pace * decay) - pace * g / (g.abs() + 1e-8)
        step = moved["s"].half()
        torch.testing.assert_close(weight.scale.float(), step.float(), rtol=2e-3, atol=1e-6, msg=name)
        assert not torch.equal(weight.scale, fit(v.detach(), spec, "mse").scale)
        expected = encode(moved["v"], spec, weight.params)
        assert (expected.codes == weight.codes).double().mean() > 0.99, name


def test_a_layer_whose_input_is_rounded_learns_with_that(tiny: models.Llama, batches: Tensor) -> None:
    """The last loss is that of the model that is handed over, whose passes round activations to 3 bits."""
    rules = tuple(replace(rule, input=QuantSpec.parse("int3 g32")) if rule.weight else rule for rule in RECIPE.rules)
    losses: dict[bool, list[float]] = {False: [], True: []}
    for rounded in losses:
        recipe = replace(RECIPE, rules=rules if rounded else RECIPE.rules)
        found = models.train(tiny, recipe, batches[:3], callback=lambda _, x, to=losses[rounded]: to.append(x))
        inputs = {str(linear.input) for linear in found.linears().values()}
        assert ("int3 g32" in inputs) == rounded
    assert losses[True][0] > 1.2 * losses[False][0] and losses[True][2] < losses[True][0]
    control = models.train(tiny, replace(RECIPE, rules=rules), batches[:1], control=True)
    assert all(linear.input is None for linear in control.linears().values())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_starts_where_the_rules_method_ended(tiny: models.Llama, batches: Tensor, method: str) -> None:
    """With both rates at almost nothing a step leaves the codes of the method: also those not the nearest."""
    still = replace(RECIPE.train, rate=1e-30, scale_rate=0.0)
    recipe, nearest = (
        replace(RECIPE, rules=tuple(replace(rule, method=m) for rule in RECIPE.rules), train=still)
        for m in (method, "rtn")
    )
    found = packed(models.train(tiny, recipe, batches[:1], seed=3))
    assert equal(found, packed(models.quantize(tiny, replace(recipe, train=None), seed=3)))
    rounded = packed(models.quantize(tiny, replace(nearest, train=None), seed=3))
    assert equal(found, rounded) == (method == "rtn")


def test_decay_takes_its_share_of_every_weight(tiny: models.Llama, batches: Tensor) -> None:
    """Decoupled: beside the same step, rate * decay * v is taken off. The rate is in units of v's RMS."""
    ended = {}
    for decay in (0.0, 50.0):
        training = models.Training(steps=1, rate=0.01, warmup=0, decay=decay)
        control = models.train(tiny, replace(RECIPE, train=training), batches[:1], control=True)
        ended[decay] = control.linears()["model.layers.1.mlp.up_proj"].weight
    v = tiny.linears()["model.layers.1.mlp.up_proj"].weight
    rate = 0.01 * v.square().mean().sqrt()
    torch.testing.assert_close(ended[0.0] - ended[50.0], rate * 50 * v, rtol=1e-3, atol=1e-6)


def test_the_codes_are_those_of_training(
    tiny: models.Llama, batches: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both rates at almost nothing, the last step's rounded weights are the checkpoint's, bit for bit."""
    module = sys.modules["labkit.models.train"]
    seen: dict[int, Tensor] = {}
    original = module.lsq

    def spy(v, spec, s, beta=None):  # type: ignore[no-untyped-def]
        out = original(v, spec, s, beta)
        seen[id(v)] = out.detach().clone()
        return out

    monkeypatch.setattr(module, "lsq", spy)
    still = replace(RECIPE, train=replace(RECIPE.train, rate=1e-30, scale_rate=0.0))
    found = models.train(tiny, still, batches[:1])
    layers = [
        linear.weight for linear in found.linears().values() if isinstance(linear.weight, QuantizedTensor)
    ]
    assert len(layers) == len(seen) == 4 + 3 * tiny.config.layers
    for weight, rounded in zip(layers, seen.values(), strict=True):
        assert torch.equal(weight.dequantize(), rounded)


def test_training_lowers_the_kl_and_leaves_the_original_alone(tiny: models.Llama) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    training = models.Training(steps=15, windows=4, tokens=64, rate=0.01, scale_rate=0.005, warmup=2)
    recipe = replace(RECIPE, train=training)
    batches = models.training_batches(tiny.tokenizer, training)
    protocol = models.protocol_for(tiny.tokenizer, "lesson")
    start = models.quantize(tiny, replace(recipe, train=None))
    found = models.train(tiny, recipe, batches)
    control = models.train(tiny, recipe, batches, control=True)
    kl = [r.kl for r in models.compare([start, found, control], tiny, protocol)]
    assert kl[1] < 0.8 * kl[0]
    assert kl[2] < 0.2 * kl[1]  # nothing to learn for a model that is its own teacher
    assert control.made is None and not any(
        isinstance(linear.weight, QuantizedTensor) for linear in control.linears().values()
    )
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert not tensor.requires_grad
    assert all(p.grad is None for p in tiny.parameters())


def test_it_is_an_ordinary_checkpoint(trained: models.Llama, tmp_path: Path) -> None:
    again = models.load(models.save(trained, tmp_path / "trained"))
    assert equal(packed(again), packed(trained))
    assert again.made is not None and again.made.recipe.train == RECIPE.train
    specs = {
        str(linear.weight.spec)
        for linear in again.linears().values()
        if isinstance(linear.weight, QuantizedTensor)
    }
    assert specs == set(SPECS.values())


def test_quantize_trains_a_recipe_that_says_so(tiny: models.Llama) -> None:
    assert RECIPE.train is not None
    batches = models.training_batches(tiny.tokenizer, RECIPE.train, seed=2)
    expected = models.train(tiny, RECIPE, batches, seed=2)
    assert equal(packed(models.quantize(tiny, RECIPE, seed=2)), packed(expected))


@pytest.mark.parametrize("control", [False, True])
def test_goes_on_after_a_break_as_if_there_had_been_none(
    tiny: models.Llama, batches: Tensor, trained: models.Llama, tmp_path: Path, control: bool
) -> None:
    whole: list[tuple[int, float]] = []
    uninterrupted = models.train(
        tiny, RECIPE, batches, control=control, callback=lambda *said: whole.append(said)
    )

    def stop(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    state = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        models.train(tiny, RECIPE, batches, control=control, state=state, save_every=2, callback=stop)
    said: list[tuple[int, float]] = []
    again = models.train(
        tiny, RECIPE, batches, control=control, state=state, callback=lambda *now: said.append(now)
    )
    assert said == whole and [step for step, _ in said] == list(range(6))
    if control:
        for left, right in zip(again.parameters(), uninterrupted.parameters(), strict=True):
            assert torch.equal(left, right)
    else:
        assert equal(packed(again), packed(trained))
    with pytest.raises(ValueError, match="the state of another training"):
        models.train(tiny, RECIPE, batches, control=not control, state=state)
    with pytest.raises(ValueError, match="the state of another training"):
        models.train(tiny, RECIPE, batches.flip(0), control=control, state=state)


KILLED = """
import os, signal, sys
from pathlib import Path
from labkit import models
def callback(step, loss):
    if step == 4: os.kill(os.getpid(), signal.SIGKILL)
tiny, recipe = models.load("tiny"), models.Recipe.load(sys.argv[1])
batches = models.training_batches(tiny.tokenizer, recipe.train, seed=1)
models.train(tiny, recipe, batches, state=Path(sys.argv[2]), save_every=2, callback=callback)
"""


def test_goes_on_after_kill_9(
    tiny: models.Llama, batches: Tensor, trained: models.Llama, tmp_path: Path
) -> None:
    recipe, state = tmp_path / "small.yaml", tmp_path / "training.pt"
    recipe.write_text(str(RECIPE))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(state)], env=environment, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pt"] == ["training.pt"]
    steps: list[int] = []
    again = models.train(tiny, RECIPE, batches, state=state, callback=lambda step, _: steps.append(step))
    assert equal(packed(again), packed(trained)) and steps == list(range(6))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r, b: (replace(r, train=None), b), "training needs `train: {steps: ...}`"),
        (lambda r, b: (r, b[:0]), "none: no text"),
        (lambda r, b: (r, b[:, :0]), r"6 of shape \(0, 32\)"),
        (lambda r, b: (r, b[0]), r"3 of shape \(32,\)"),
        (
            lambda r, b: (
                models.Recipe.parse(
                    "train: {steps: 1}\nrules: [{match: '*.q_proj', weight: nf4 b64, method: rtn}]"
                ),
                b,
            ),
            "LSQ learns the step of an integer grid",
        ),
        (
            lambda r, b: (
                models.Recipe.parse(
                    "train: {steps: 1}\ntransforms: [{name: rotate}]\n"
                    "rules: [{match: '*.q_proj', weight: int4 g64, method: rtn}]"
                ),
                b,
            ),
            "takes no transforms",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_work(  # type: ignore[no-untyped-def]
    tiny: models.Llama, batches: Tensor, change, says: str
) -> None:
    recipe, batches = change(RECIPE, batches)
    with pytest.raises(ValueError, match=says):
        models.train(tiny, recipe, batches, callback=lambda *_: pytest.fail("it worked"))


def test_refuses_where_it_does_not_fit(
    tiny: models.Llama, batches: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    with pytest.raises(MemoryError, match=r"training by recipe small needs 0\.\d GiB, 0\.0 GiB are free"):
        models.train(tiny, RECIPE, batches)


def test_peak_memory_by_hand(tiny: models.Llama) -> None:
    """20 bytes a weight, 48 for the largest layer's, a pass with eight times the logits; a quarter more."""
    training = models.Training(steps=1, windows=8, tokens=100)
    config = tiny.config  # 4 layers, hidden 128, MLP 384, queries 8 x 32, 1,024 tokens
    by_hand = 20 * 30_000 + 48 * 20_000 + 4 * 200 * (4 * (4 * 128 + 4 * 384 + 5 * 256) + 8 * 1024)
    assert models.train_bytes(config, training, [10_000, 20_000]) == by_hand + by_hand // 4


def test_a_loss_that_is_no_number_ends_it(tiny: models.Llama, batches: Tensor) -> None:
    wild = replace(RECIPE, train=replace(RECIPE.train, rate=1e30, warmup=0))
    with pytest.raises(ValueError, match=r"the loss of step 1 is (nan|inf); lower train.rate"):
        models.train(tiny, wild, batches, control=True)  # a grid would hold them in its range


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ("{steps: 0}", "train.steps must be a whole number above 0, found 0"),
        ("{steps: 1.5}", "train.steps must be a whole number"),
        ("{rate: 0}", "train.rate must be a number above 0"),
        ("{rate: fast}", "train.rate must be a number above 0, found 'fast'"),
        ("{decay: -1}", "train.decay must be a number of at least 0"),
        ("{step: 3}", "train: unknown key 'step'"),
        ("3", "train: expected a mapping"),
    ],
)
def test_bad_yaml_is_named(train: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.Recipe.parse(f"train: {train}\nrules: [{{match: '*', weight: int4 g64, method: rtn}}]")


def test_the_recipe_and_its_expansion() -> None:
    recipe = models.Recipe.load("w2a16-qat-g64")
    assert recipe.train == models.Training(steps=160, windows=4, warmup=8)
    assert models.Recipe.parse(str(recipe)) == models.Recipe.from_dict(recipe.to_dict())
    assert models.Recipe.from_dict(recipe.to_dict()).train == recipe.train
    plain = models.Recipe.load("w4a16-rtn-g64")
    assert plain.train is None and "train" not in plain.to_dict()
