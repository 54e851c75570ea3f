"""evaluate: against the same quantities computed in float64 from plain logits; and the frozen protocol."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from labkit import models
from labkit.cli import app
from labkit.files import data_path
from labkit.models import fetch, protocol
from labkit.quant import QuantizedTensor


@pytest.fixture(scope="module")
def tiny() -> models.Llama:
    return models.load("tiny")


@pytest.fixture(scope="module")
def coarse(tiny: models.Llama) -> models.Llama:
    return models.quantize(
        tiny, models.Recipe.parse("rules: [{match: 'model.*', weight: int2 g64 asym, method: rtn}]")
    )


@pytest.fixture(scope="module")
def short(tiny: models.Llama) -> models.Protocol:
    return protocol.build(tiny.tokenizer, windows=3, tokens=24)


def log_probabilities(model: models.Llama, ids: tuple[int, ...]) -> np.ndarray:
    """(tokens, vocab), float64, from one plain forward pass with dequantized weights."""
    plain = models.calibrate.shared_copy(model)
    for linear in plain.linears().values():
        if isinstance(linear.weight, QuantizedTensor):
            linear.weight = linear.weight.dequantize()
    with torch.no_grad():
        logits = plain(torch.tensor([ids]))[0].double().numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_perplexity_kl_and_top1_by_hand(
    tiny: models.Llama, coarse: models.Llama, short: models.Protocol
) -> None:
    nll, kl, reverse, same = [], [], [], []
    for ids in short.windows:
        p, q = log_probabilities(tiny, ids), log_probabilities(coarse, ids)
        for t in range(len(ids) - 1):
            nll.append(-q[t, ids[t + 1]])
            kl.append(float(np.sum(np.exp(p[t]) * (p[t] - q[t]))))
            reverse.append(float(np.sum(np.exp(q[t]) * (q[t] - p[t]))))
            same.append(p[t].argmax() == q[t].argmax())
    assert len(kl) == 3 * 23
    assert abs(np.mean(kl) - np.mean(reverse)) > 0.01 * np.mean(kl)  # so that a swapped direction shows
    report = models.evaluate(coarse, tiny, short)
    assert report.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert report.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert report.top1 == pytest.approx(np.mean(same))
    assert (report.model, report.recipe) == ("tiny", "unnamed")
    assert (report.windows, report.protocol) == (3, short.hash)


def test_a_model_is_its_own_reference(tiny: models.Llama, short: models.Protocol) -> None:
    report = models.evaluate(tiny, protocol=short)
    assert (report.kl, report.top1, report.recipe) == (0.0, 1.0, "none")
    count = sum(p.numel() for p in tiny.parameters())
    assert (report.bits_per_weight, report.bits_per_weight_model, report.bytes) == (32, 32, 4 * count)


def test_the_reference_is_loaded_by_name(
    tiny: models.Llama, coarse: models.Llama, short: models.Protocol
) -> None:
    assert models.evaluate(coarse, protocol=short).kl == models.evaluate(coarse, tiny, short).kl


def test_several_models_share_the_references_pass(
    tiny: models.Llama, coarse: models.Llama, short: models.Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = models.quantize(tiny, "w8a16-rtn-channel")
    alone = [replace(models.evaluate(m, tiny, short), seconds=0.0) for m in (fine, coarse)]
    passes, begin = [], models.Llama.begin
    monkeypatch.setattr(models.Llama, "begin", lambda self, *a: passes.append(self.made) or begin(self, *a))
    together = models.compare((m for m in (fine, coarse)), tiny, short)
    assert [replace(r, seconds=0.0) for r in together] == alone
    assert passes == [None, fine.made, coarse.made]
    assert together[0].kl < 0.01 * together[1].kl


def test_it_is_exact_whatever_kernel_the_server_would_take(
    tiny: models.Llama, short: models.Protocol
) -> None:
    quantized = models.quantize(tiny, "w4a16-rtn-g64")
    plain = models.calibrate.shared_copy(quantized)
    for linear in plain.linears().values():
        if isinstance(linear.weight, QuantizedTensor):
            linear.weight = linear.weight.dequantize()
    exact, report = (models.evaluate(m, tiny, short) for m in (plain, quantized))
    assert (report.kl, report.perplexity, report.top1) == (exact.kl, exact.perplexity, exact.top1)
    # and evaluating leaves the model packed
    assert isinstance(quantized.linears()["model.layers.0.mlp.up_proj"].weight, QuantizedTensor)


def test_bits_and_bytes_by_hand(tiny: models.Llama) -> None:
    quantized = models.quantize(tiny, "w4a16-rtn-g64")
    layers, whole, size = models.sizes(quantized)
    inside = sum(m.weight.shape.numel() for n, m in quantized.linears().items() if n != "lm_head")
    rest = (
        sum(p.numel() for p in tiny.parameters()) - inside
    )  # embedding (the head is the same matrix) and norms
    assert (
        layers == 4 + (16 + 4) / 64
    )  # codes, and for each group of 64 an fp16 scale and a 4-bit zero point
    assert size == inside * (4 + 20 / 64) / 8 + 4 * rest
    assert whole == pytest.approx(8 * size / (inside + rest))


def test_a_wrong_reference_is_refused(
    tiny: models.Llama, coarse: models.Llama, short: models.Protocol
) -> None:
    other = models.calibrate.shared_copy(tiny)
    other.seed = 4
    with pytest.raises(
        ValueError, match="made from tiny with off-grid seed None, the reference is tiny with 4"
    ):
        models.evaluate(coarse, other, short)
    other.config = replace(tiny.config, vocab_size=7)
    with pytest.raises(ValueError, match=r"has 7;"):
        models.evaluate(coarse, other, short)


def test_the_frozen_protocol_is_what_the_design_says() -> None:
    frozen = models.Protocol.from_file(data_path(protocol.FROZEN))
    assert frozen.hash == "3215de8ccf88"  # figures in notebooks and data/measurements stand under this hash
    assert [len(window) for window in frozen.windows] == [256] * 32
    assert frozen.positions == (0, 255)
    assert frozen.dtype == "float32"
    assert frozen.kl == "KL(reference || quantized) over the full vocabulary, nats per token"
    assert len({*frozen.windows}) == 32


@pytest.mark.needs("bundled model")
def test_the_frozen_windows_follow_from_the_text_and_the_tokenizer() -> None:
    folder = fetch.find()
    assert folder is not None
    tokenizer = models.Tokenizer.from_folder(folder)
    assert protocol.build(tokenizer) == models.Protocol.from_file(data_path(protocol.FROZEN))
    assert models.protocol_for(tokenizer).hash == "3215de8ccf88"
    assert models.protocol_for(tokenizer, "lesson").windows == models.protocol_for(tokenizer).windows[::4]


def test_another_tokenizer_gets_windows_by_the_same_rule(tiny: models.Llama) -> None:
    full, lesson = (models.protocol_for(tiny.tokenizer, which) for which in ("full", "lesson"))
    assert full == protocol.build(tiny.tokenizer)
    assert full.tokens.shape == (32, 256)
    assert lesson.windows == full.windows[::4]
    assert len({full.hash, lesson.hash, "3215de8ccf88"}) == 3
    text = "\n\n".join(chapter.text for chapter in models.chapters()[108:])
    ids = tiny.tokenizer.encode(text)
    starts = [i * (len(ids) // 256) // 32 * 256 for i in range(32)]
    assert [list(window) for window in full.windows] == [ids[s : s + 256] for s in starts]
    with pytest.raises(ValueError, match="'full' or 'lesson'"):
        models.protocol_for(tiny.tokenizer, "short")


def test_the_hash_follows_everything_that_is_measured(short: models.Protocol) -> None:
    first = short.windows[0]
    changed = [
        replace(short, windows=((first[0] + 1, *first[1:]), *short.windows[1:])),
        replace(short, positions=(1, 23)),
        replace(short, dtype="bfloat16"),
        replace(short, text="x"),
        replace(short, tokenizer="x"),
    ]
    assert len({short.hash, *(p.hash for p in changed)}) == 6


def test_a_changed_protocol_file_is_refused(short: models.Protocol, tmp_path: Path) -> None:
    path = tmp_path / "protocol.json"
    short.save(path)
    assert models.Protocol.from_file(path) == short
    tree = json.loads(path.read_text())
    tree["windows"][0][0] += 1
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"says hash {short.hash}"):
        models.Protocol.from_file(path)
    for text in ("{", "[]", '{"hash": 1}', '{"hash": "x", "windows": [], "positions": [0, 1], "more": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no evaluation protocol"):
            models.Protocol.from_file(path)


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-w4"
    made = CliRunner().invoke(
        app,
        ["quantize", "--recipe", "w4a16-rtn-g64", "--model", "tiny", "--out", str(folder)],
        catch_exceptions=False,
    )
    assert made.exit_code == 0
    assert "damp" not in made.stdout and "method: rtn" in made.stdout
    found = CliRunner().invoke(app, ["eval", str(folder), "--json", "--lesson"], catch_exceptions=False)
    report = json.loads(found.stdout)
    assert list(report) == [
        "model", "recipe", "perplexity", "kl", "top1", "bits_per_weight", "bits_per_weight_model", "bytes",
        "windows", "protocol", "seconds",
    ]  # fmt: skip
    assert (report["model"], report["recipe"], report["windows"]) == ("tiny", "w4a16-rtn-g64", 8)
    assert report["bits_per_weight"] == 4.3125
    table = CliRunner().invoke(app, ["eval", "fp32", "--model", "tiny", "--lesson"], catch_exceptions=False)
    assert "nats per token" in table.stdout and "100.0%" in table.stdout
