"""Quantizing: GPTQ of a whole model beside llm-compressor, and a learned codebook beside scikit-learn."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import labkit
from labkit import models
from labkit.bench.measure import Contender, Row, Setting, Unit, by_turns, invited
from labkit.bench.pipe import Fresh, Peer
from labkit.bench.reference import write_folder
from labkit.models import checkpoint
from labkit.models.store import build
from labkit.quant import QuantSpec, kmeans

GROUP, DAMP = 64, 0.01
WINDOWS, TOKENS = 32, 256
# llm-compressor fits every scale on the weights as they came, so ours does here.
RECIPE = f"""\
calibration: {{windows: {WINDOWS}, tokens: {TOKENS}}}
rules:
  - match: model.layers.*
    weight: int4 g{GROUP} asym
    method: gptq
    options: {{damp: {DAMP}, act_order: false, static_groups: true}}
  - {{match: "*", weight: keep}}
"""
GOAL = 2.0
ROUNDS = 2
LAYER = "model.layers.0.self_attn.q_proj"
LEVELS = 16


def quantize(setting: Setting, name: str | None = None, rounds: int = ROUNDS) -> Iterator[list[Row]]:
    """The rows of quantizing, work by work. ``name`` as ``models.load`` takes it."""
    original = models.load(name, seed=0)
    with tempfile.TemporaryDirectory(prefix="labkit-bench-") as scratch:
        yield from gptq(setting, name, original, Path(scratch), rounds)
    yield codebooks(setting, original, rounds)


def gptq(
    setting: Setting, name: str | None, original: models.Llama, scratch: Path, rounds: int
) -> Iterator[list[Row]]:
    """Both in a new process each time, whose peak of memory is a row of its own; no round is warmer than another."""
    recipe, windows, made, theirs = (
        scratch / part for part in ("gptq.yaml", "windows.json", "checkpoint", "model.safetensors")
    )
    recipe.write_text(RECIPE)
    tokens = models.calibration_windows(original.tokenizer, WINDOWS, TOKENS, seed=0)
    windows.write_text(json.dumps(tokens.tolist()))
    folder = write_folder(original, scratch / "reference")

    def compressor() -> Contender:
        with Peer("llm_compressor", setting.threads) as peer:
            version = peer.ask("version")
        places = str(folder), str(windows), GROUP, DAMP, setting.threads, str(theirs)
        return Contender(
            "llm-compressor", version, Fresh("llm_compressor", setting.threads, "gptq", *places)
        )

    ours = Contender(
        f"GPTQ, int4 g{GROUP} asym", f"labkit {labkit.__version__}, torch {torch.__version__}",
        Fresh("labkit", setting.threads, "gptq", name, str(recipe), setting.threads, str(made)),
    )  # fmt: skip
    peer = replace(invited("llm-compressor", compressor), goal=GOAL, even_kl=True)
    work = f"GPTQ of the whole model, {WINDOWS} x {TOKENS} tokens"
    costs = by_turns([ours, peer], rounds, work, warm=False)
    found = {}
    if costs[0]:
        found[id(ours)] = checkpoint.load(made)
    if costs[1]:
        found[id(peer)] = build(original.config, load_file(theirs), original.tokenizer, "llm-compressor")
    for who, report in zip(
        (who for who in (ours, peer) if id(who) in found),
        models.compare(found.values(), original, "lesson"),
        strict=True,
    ):
        who.kl = report.kl
    yield setting.rows_of(work, Unit("s"), ours, [peer], costs)
    yield setting.peaks(f"peak memory, {work}", ours, [peer])


def codebooks(setting: Setting, original: models.Llama, rounds: int) -> list[Row]:
    """A codebook of 16 values for each row of a layer, as SqueezeLLM has them; scikit-learn fits row after row."""
    weight = original.linears()[LAYER].weight
    assert isinstance(weight, Tensor)
    spec, rows = QuantSpec.parse("table4 tensor"), weight.detach().numpy()

    def scikit_learn() -> Contender:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        def turn() -> float:
            start = time.perf_counter()
            with threadpool_limits(setting.threads):
                for row in rows:
                    KMeans(LEVELS, n_init=1, random_state=0).fit(row[:, None])
            return time.perf_counter() - start

        return Contender(
            "scikit-learn KMeans", f"scikit-learn {importlib.metadata.version('scikit-learn')}", turn
        )

    def turn() -> float:
        start = time.perf_counter()
        kmeans(weight, spec)
        return time.perf_counter() - start

    ours = Contender("kmeans, table4", f"labkit {labkit.__version__}, torch {torch.__version__}", turn)
    work = f"k-means, {LEVELS} values for each of {len(rows)} rows of {rows.shape[1]}"
    return setting.rows(
        work, Unit("s"), ours, [invited("scikit-learn KMeans", scikit_learn)], rounds=rounds
    )
