"""A learner's own GPTQ update, from the exercise's check to an answer over HTTP (on the tiny model)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import openai
import pytest
import torch
from server import Server
from torch import Tensor

from labkit.course import checkpoint, exercise
from labkit.models import checkpoint as checkpoints
from labkit.models import load, quantize, save
from labkit.quant import METHODS, gptq
from labkit.serving import Engine, SamplingParams

calls = 0


def my_column_update(weights_right: Tensor, error: Tensor, hinv_row: Tensor) -> Tensor:
    """As a learner might write it: with einsum, and a counter to see that it was used."""
    global calls
    calls += 1
    return weights_right - torch.einsum("r,c->rc", error, hinv_row)


@pytest.mark.needs("linux")
def test_the_learners_update_is_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global calls
    monkeypatch.setenv("LABKIT_WORK", str(tmp_path / "work"))
    update = exercise("06.2").check(my_column_update)
    assert update is my_column_update  # found right, so the learner's own goes on
    calls = 0
    mine = {**METHODS, "gptq": partial(gptq, update=update)}
    original = load("tiny")
    quantized = quantize(original, "w4a16-gptq-g64", methods=mine, progress=False)
    assert calls > 1000  # a call for each column of each layer
    folder = save(quantized, tmp_path / "work" / "checkpoints" / "w4a16-gptq-g64")
    assert checkpoint("w4a16-gptq-g64") == folder
    builtin = quantize(original, "w4a16-gptq-g64", progress=False).linears()
    for name, layer in checkpoints.load(folder).linears().items():
        if name.startswith("model.layers.0."):
            # The same formula in another order of operations: a tie may fall the other way, no more. Later
            # layers see the outputs of these, and differ by more.
            different = layer.weight.codes != builtin[name].weight.codes
            assert different.float().mean() < 0.02, name

    server = Server(tmp_path / "server", "--checkpoint", str(folder))
    try:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        said = client.completions.create(
            model="w4a16-gptq-g64", prompt="Call me Ishmael.", max_tokens=16, temperature=0
        )
    finally:
        server.clean_up()
    with Engine(load(str(folder))) as engine:
        [expected] = engine.generate(["Call me Ishmael."], SamplingParams(max_tokens=16))
    assert said.choices[0].text == expected.text
