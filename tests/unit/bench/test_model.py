"""What the model's benchmark makes before it measures: the files that peers read, and the KL of what is timed."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import pytest
import torch

from labkit import models
from labkit.bench import kernels
from labkit.bench.kernels import Products
from labkit.bench.model import Bfloat16, decode, held_bytes, per_token, with_kernel
from labkit.bench.quality import Reference
from labkit.bench.reference import prompt_of, stored_bytes, write_folder, write_gguf
from labkit.kernels import prepare
from labkit.models import fetch
from labkit.quant import QuantSpec, rtn
from labkit.serving.engine import Engine


@pytest.fixture(scope="module")
def original() -> models.Llama:
    return models.load("tiny", seed=0)


@pytest.fixture(scope="module")
def made(original: models.Llama) -> models.Llama:
    return models.quantize(original, "w4a16-rtn-g64")


def test_the_gguf_file_reads_back_as_the_model(original: models.Llama, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_gguf(original, tmp_path / "model.gguf"))
    found = {fetch._hf_name(t.name): fetch._tensor(t, original.config) for t in reader.tensors}
    expected = dict(original.state_dict())
    del expected["lm_head.weight"]
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert reader.fields["llama.attention.head_count_kv"].contents() == original.config.kv_heads
    assert stored_bytes(tmp_path / "model.gguf") == sum(4 * tensor.numel() for tensor in expected.values())


def test_the_folder_is_the_model(original: models.Llama, tmp_path: Path) -> None:
    again = models.load(str(write_folder(original, tmp_path / "folder")), seed=None)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens), original(tokens))


def test_the_kl_of_decoding_is_that_of_the_whole_windows(
    original: models.Llama, made: models.Llama
) -> None:
    protocol = models.protocol.build(original.tokenizer, windows=2, tokens=24)
    reference = Reference(original, protocol)
    expected = models.evaluate(made, original, protocol).kl
    assert reference.of_decode(made) == pytest.approx(expected, rel=1e-2)
    assert reference.of_decode(made, native=False) == pytest.approx(expected, rel=1e-2)
    found = reference.of_windows(lambda window: made(torch.tensor([window]))[0])
    assert found == pytest.approx(expected, rel=1e-2)
    assert reference.of_windows(lambda window: original(torch.tensor([window]))[0]) == pytest.approx(
        0, abs=1e-6
    )


def test_another_kernel_leaves_the_model_as_it_was(made: models.Llama) -> None:
    other = with_kernel(made, Bfloat16)
    name = "model.layers.0.mlp.up_proj"
    assert isinstance(other.linears()[name].prepared, Bfloat16)
    assert not isinstance(made.linears()[name].prepared, Bfloat16)
    tokens = torch.tensor([[5, 6, 7]])
    error = (other(tokens) - made(tokens)).norm() / made(tokens).norm()
    assert 0 < error < 0.02


def test_bytes_by_hand(original: models.Llama) -> None:
    config = original.config
    matrices = sum(linear.weight.numel() for linear in original.linears().values())  # type: ignore[operator]
    assert held_bytes(original) == 4 * matrices
    kv = 2 * config.layers * config.kv_heads * config.head_dim * 2  # bytes a token in 16 bits
    assert per_token(1000, original, at=10, sequences=4, bits=16) == 250 + 10 * kv


def test_decode_times_the_steps_and_leaves_nothing_running(made: models.Llama) -> None:
    prompts = [prompt_of(made, 8, start=8 * i) for i in range(3)]
    with Engine(made, max_batch=3, max_len=128) as engine:
        assert decode(engine, prompts, 4) > 0
        end = time.monotonic() + 30
        while engine.running and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("backend", ["auto", "int4_cpu"])
def test_copies_of_a_weight_are_read_in_turn(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    weight = prepare(rtn(torch.randn(64, 64), QuantSpec.parse("int4 g32")), backend)
    monkeypatch.setattr(kernels, "STREAMED", 2.5 * weight.nbytes)
    products = Products(weight)
    x = torch.randn(1, 64)
    assert products.turn(x) > 0
    assert len({id(copy) for copy in products._copies}) == 3
    assert all(torch.equal(copy(x), weight(x)) for copy in products._copies)
