"""``train``: quantization-aware training. The model learns to do with the few numbers of its grids.

Each quantized layer keeps float32 weights v, which the forward pass sees only as LSQ rounds them (``lsq``), and
learns v and the scales of its blocks together. The loss is the KL divergence to the unquantized model over
the whole vocabulary, and nothing else: no token of the text is a target, so what is learned is the model and
not the text. ``control=True`` trains equally without quantizing, which shows that.

A step runs the chain rule in two halves: the pass through the model gives the gradient of each rounded weight,
then each layer alone hands it on to v, s and beta. So no layer's rounding is kept while another's runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labkit.files import whole_file
from labkit.models import memory
from labkit.models.calibrate import shared_copy
from labkit.models.config import ModelConfig
from labkit.models.fingerprint import fingerprint
from labkit.models.llama import Linear, Llama
from labkit.models.protocol import training_windows
from labkit.models.quantize import Made, prepare, quantize
from labkit.models.recipe import Method, Recipe, Training
from labkit.models.tokenizer import Tokenizer
from labkit.quant import METHODS, Blocks, QuantizedTensor, QuantSpec, lsq, lsq_encode
from labkit.quant.lsq import lsq_check
from labkit.settings import settings

AT_ONCE = 2  # windows in one pass; a step adds up the gradients of its passes
SAVE_EVERY = 25  # steps
INSIDE = 0.499  # of a step: how far from its code a weight may lie that has to round to it


def train(
    model: Llama,
    recipe: Recipe | str,
    batches: Sequence[Tensor] | Tensor,
    *,
    control: bool = False,
    seed: int = 0,
    methods: Mapping[str, Method] = METHODS,
    state: Path | None = None,
    save_every: int = SAVE_EVERY,
    callback: Callable[[int, float], None] | None = None,
    progress: bool | None = None,
) -> Llama:
    """``model`` quantized by ``recipe`` and trained on its grids: an ordinary quantized model.

    Its codes are those that the last step's weights had in training: equal, not close. The original is the
    teacher and is not changed.

    batches     one (windows, tokens) int64 for each step, such as ``training_batches`` gives
    control     leave the weights unquantized and train them equally. The result has plain weights
    seed        of the calibration windows, for rules whose method looks at text
    state       a file for the state of the training, written whole every ``save_every`` steps. One that is
                there is gone on from, and the result is what it would have been without a break
    callback    called with (step, loss) after each step, first with those before the break; the loss is the
                mean KL(original || quantized) of the step's batch, nats per token
    progress    a bar with the loss; None is ``LABKIT_PROGRESS``

    Peak memory beside the model: ``train_bytes``. Raises before any work: ValueError for a recipe without
    ``train`` or with transforms, a grid that LSQ cannot learn, no batches, or a state of other work;
    MemoryError where it does not fit. During it: ValueError when the loss is no number any more.
    """
    recipe, specs = _checked(model, recipe, batches, methods)
    assert recipe.train is not None  # _checked saw to it
    work = _work(recipe, model, batches, control, seed)
    saved = _read(state, work) if state is not None else None

    student = shared_copy(model)
    if not control:
        student.kv = recipe.kv
    layers = _layers(model, student, recipe, specs, control, seed, methods, saved is not None, progress)
    parameters = [p for layer in layers for p in (layer.v, layer.s, layer.beta) if p is not None]
    adam, rates = _optimizer(layers, recipe.train)
    losses: list[float] = []
    if saved is not None:
        losses = saved["losses"]
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        adam.load_state_dict(saved["optimizer"])
        del saved
    for step, loss in enumerate(losses):
        if callback:
            callback(step, loss)

    shown = settings().progress if progress is None else progress
    steps = tqdm(
        range(len(losses), len(batches)),
        initial=len(losses),
        total=len(batches),
        desc=f"{recipe.name}, unquantized" if control else recipe.name,
        disable=not shown,
        leave=False,
        unit="step",
    )
    for step in steps:
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * _pace(step, recipe.train.warmup, len(batches))
        loss = _gradients(model, student, layers, batches[step])
        if not math.isfinite(loss):
            raise ValueError(
                f"recipe {recipe.name}: the loss of step {step} is {loss}; lower train.rate or train.scale_rate"
            )
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss)
        steps.set_postfix(loss=f"{loss:.3f}")
        if callback:
            callback(step, loss)
        if state is not None and len(losses) % save_every == 0 and len(losses) < len(batches):
            kept = {"parameters": [p.detach() for p in parameters], "optimizer": adam.state_dict()}
            with whole_file(state) as part:
                torch.save({"work": work, "losses": losses, **kept}, part)

    for layer in layers:
        layer.linear.weight = layer.finished()
    student.made = None if control else Made(model.name, model.seed, recipe, seed, propagate=True)
    return student


train.needs = frozenset({"text", "gradients"})  # type: ignore[attr-defined]
train.paper = "LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576"  # type: ignore[attr-defined]


def training_batches(tokenizer: Tokenizer, training: Training, seed: int = 0) -> Tensor:
    """The batches of a training, int64 (steps, windows, tokens), from the calibration text."""
    count = training.steps * training.windows
    windows = training_windows(tokenizer, count, training.tokens, seed)
    return windows.view(training.steps, training.windows, training.tokens)


def train_bytes(config: ModelConfig, training: Training, weights: Collection[int]) -> int:
    """Bytes that ``train`` takes at its peak beside the model, for layers of so many weights.

    Five float32 numbers for each weight (v, its rounded form, the gradient, AdamW's two moments), a dozen for
    those of the largest layer while its rounding runs, and one pass with the logits of both models. A quarter is
    added for the allocator, as for the Fisher: on the reference model 3.9 GB were seen where the parts are 3.7.
    """
    tokens = min(AT_ONCE, training.windows) * training.tokens
    parts = 4 * (5 * sum(weights) + 12 * max(weights)) + memory.pass_bytes(config, tokens, logits=8)
    return 5 * parts // 4


@dataclass
class _Layer:
    """A layer in training: float32 weights v (out, in), steps s and offsets beta; no s in the control."""

    linear: Linear
    spec: QuantSpec
    v: Tensor
    s: Tensor | None = None
    beta: Tensor | None = None

    def rounded(self) -> Tensor:
        return self.v if self.s is None else lsq(self.v, self.spec, self.s, self.beta)

    def finished(self) -> Tensor | QuantizedTensor:
        return self.v.detach() if self.s is None else lsq_encode(self.v, self.spec, self.s, self.beta)


def _checked(
    model: Llama, recipe: Recipe | str, batches: Sequence[Tensor] | Tensor, methods: Mapping[str, Method]
) -> tuple[Recipe, dict[str, QuantSpec]]:
    """The recipe and each quantized layer's grid. Raises what ``train`` raises before any work."""
    recipe, plan = prepare(model, recipe, methods)
    if recipe.train is None or recipe.transforms:
        raise ValueError(
            f"recipe {recipe.name}: training needs `train: {{steps: ...}}` and takes no transforms"
        )
    specs = {name: rule.weight for name, rule in plan.items() if rule.weight is not None}
    for spec in specs.values():
        lsq_check(spec)
    if len(batches) == 0 or any(b.dim() != 2 or b.numel() == 0 for b in batches):
        raise ValueError(
            "expected a batch (windows, tokens) for each step; found "
            + (f"{len(batches)} of shape {tuple(batches[0].shape)}" if len(batches) else "none: no text")
        )
    training = replace(recipe.train, windows=len(batches[0]), tokens=batches[0].shape[1])
    weights = [model.linears()[name].weight.shape.numel() for name in plan]
    memory.require(train_bytes(model.config, training, weights), f"training by recipe {recipe.name}")
    return recipe, specs


def _optimizer(layers: Sequence[_Layer], training: Training) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over what the layers learn, and the full learning rate of each of its groups."""
    groups, rates = [], []
    for layer in layers:
        # Relative steps, as in Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, section 8).
        size = layer.v.detach().square().mean().sqrt().item()
        groups.append({"params": [layer.v], "weight_decay": training.decay})
        rates.append(training.rate * size)
        if layer.s is not None:
            scales = [p for p in (layer.s, layer.beta) if p is not None]
            groups.append({"params": scales, "weight_decay": 0.0})
            rates.append(training.scale_rate * size)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95)), rates


def _layers(
    model: Llama,
    student: Llama,
    recipe: Recipe,
    specs: Mapping[str, QuantSpec],
    control: bool,
    seed: int,
    methods: Mapping[str, Method],
    saved: bool,
    progress: bool | None,
) -> list[_Layer]:
    """The layers with the scales and codes that their rules' methods find; any will do where saved ones follow."""
    originals, linears, layers = model.linears(), student.linears(), []
    start = None
    if not control and not saved:
        start = quantize(
            model, replace(recipe, train=None), seed=seed, methods=methods, progress=progress
        ).linears()
    for name, spec in specs.items():
        weight = originals[name].weight
        assert isinstance(weight, Tensor)  # prepare() refuses others
        layer = _Layer(linears[name], spec, weight.detach().clone().float().requires_grad_())
        layers.append(layer)
        if control:
            continue
        layer.linear.input = recipe.input_for(name)
        scale, zero = torch.ones(_blocks(weight, spec)), torch.ones(_blocks(weight, spec))
        if start is not None:
            found = start[name].weight
            assert isinstance(found, QuantizedTensor)
            if found.g_idx is not None:
                raise ValueError(
                    f"{name}: training needs groups of neighbouring columns; set act_order: false"
                )
            dense, points = found.params.dense()
            scale, zero = dense.clamp(min=1e-30), zero if points is None else points
            layer.v.data.copy_(_rounding_to(layer.v.detach(), found))
        layer.s = scale.clone().requires_grad_()
        layer.beta = None if spec.zero == "none" else (-zero * scale).requires_grad_()
    return layers


def _rounding_to(weight: Tensor, found: QuantizedTensor) -> Tensor:
    """The weights nearest to ``weight`` that round to the codes of ``found``.

    Where the method rounded to nearest they are ``weight``, to a thousandth of a step. Where it did not, as
    GPTQ, they lie at the border of the code that it chose, and training starts from its model.
    """
    dense, points = found.params.dense()
    blocks = Blocks(tuple(weight.shape), found.spec.block)
    scale = blocks.spread(dense.clamp(min=1e-30))
    zero = 0 if points is None else blocks.spread(points)
    codes = found.codes.reshape(blocks.matrix).float()
    low, high = found.spec.code_range
    weight = weight.reshape(blocks.matrix)
    off = weight / scale + zero - codes  # in steps
    there = (off.abs() <= INSIDE) | ((codes == low) & (off < 0)) | ((codes == high) & (off > 0))
    moved = (codes - zero + off.clamp(-INSIDE, INSIDE)) * scale
    return torch.where(there, weight, moved).reshape(blocks.shape)


@torch.enable_grad()
def _gradients(teacher: Llama, student: Llama, layers: list[_Layer], batch: Tensor) -> float:
    """The gradients of one step, left on the layers' parameters; returns the loss, nats per token."""
    with torch.no_grad():
        for layer in layers:
            layer.linear.weight = nn.Parameter(layer.rounded(), requires_grad=True)
    loss = 0.0
    for windows in batch.split(AT_ONCE):
        with torch.no_grad():
            log_p = F.log_softmax(teacher(windows), dim=-1)  # (windows, tokens, vocab)
        log_q = F.log_softmax(student(windows), dim=-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / batch.numel()
        kl.backward()
        loss += kl.item()
    for layer in layers:
        rounded = layer.linear.weight
        assert isinstance(rounded, Tensor)
        gradient = rounded.grad
        layer.linear.weight = torch.empty(0)  # one layer's rounding at a time
        layer.rounded().backward(gradient)
    return loss


def _pace(step: int, warmup: int, steps: int) -> float:
    """The learning rate's factor: up in a line, then down along a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _work(
    recipe: Recipe, model: Llama, batches: Sequence[Tensor] | Tensor, control: bool, seed: int
) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.numpy().tobytes())
    return fingerprint(recipe, model, digest.hexdigest(), control, seed)


def _read(state: Path, work: str) -> dict | None:
    if not state.exists():
        return None
    tree = torch.load(state, weights_only=True, mmap=True)
    if tree["work"] != work:
        raise ValueError(
            f"{state} is the state of another training ({tree['work']}, expected {work}): another model, recipe, "
            "text or version; remove it or choose another file"
        )
    return tree


def _blocks(weight: Tensor, spec: QuantSpec) -> tuple[int, ...]:
    return Blocks(tuple(weight.shape), spec.block).grid
