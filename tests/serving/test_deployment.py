"""Deployment as data, and the application that is built from it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from labkit import models
from labkit.cluster.local import reserve
from labkit.serving import Deployment
from labkit.serving.app import build
from labkit.settings import DEFAULT_MODEL


def test_json_there_and_back() -> None:
    deployment = Deployment(checkpoint="work/w4", replicas=2, threads=1, max_len=512, seed=None)
    text = deployment.model_dump_json()
    assert Deployment.model_validate_json(text) == deployment
    assert json.loads(text)["replicas"] == 2 and json.loads(text)["name"] == "w4"


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("tiny", "tiny"), ("org/model", "model"), ("/a/b/w4a16-gptq-g64/", "w4a16-gptq-g64")],
)
def test_the_name_comes_from_the_checkpoint(checkpoint: str, name: str) -> None:
    assert Deployment(checkpoint=checkpoint).name == name
    assert Deployment(checkpoint=checkpoint, name="own").name == "own"


def test_a_path_is_a_checkpoint(tmp_path: Path) -> None:
    assert Deployment(checkpoint=tmp_path).checkpoint == str(tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"replicas": 0}, {"threads": 0}, {"engine": "other"}, {"replica": 1}])
def test_wrong_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Deployment(checkpoint="tiny", **fields)  # type: ignore[arg-type]


def test_names_are_left_to_load_and_folders_are_looked_at(tmp_path: Path) -> None:
    for name in ("tiny", DEFAULT_MODEL, "org/model"):
        Deployment(checkpoint=name).check()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for wrong, says in [
        (str(tmp_path / "empty"), "lacks config.json"),
        (str(tmp_path / "none"), "labkit quantize"),
        (str(tmp_path / "file"), "is not a folder"),
        ("../none", "is not a folder"),
        ("tinny", "labkit models list"),
    ]:
        with pytest.raises(FileNotFoundError, match=says):
            Deployment(checkpoint=wrong).check()


def test_what_save_writes_passes(tmp_path: Path) -> None:
    recipe = models.Recipe.parse("name: r\nrules: [{match: '*', weight: int8 channel, method: rtn}]")
    folder = models.save(models.quantize(models.load("tiny"), recipe), tmp_path / "w8")
    Deployment(checkpoint=str(folder)).check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Deployment(checkpoint=str(folder)).check()


def test_build_takes_what_a_serve_config_holds() -> None:
    fields = {"checkpoint": "tiny", "replicas": 3, "threads": 2, "max_batch": 4}
    app = build({"deployments": [fields]})
    assert app._bound_deployment.name == "Ingress"
    [models], _ = app._bound_deployment.init_args[0], app._bound_deployment.init_args[1]
    model = models._bound_deployment
    assert (model.name, model.num_replicas, model.max_ongoing_requests) == ("model-tiny", 3, 8)
    assert model.ray_actor_options["num_cpus"] == 2


@pytest.mark.parametrize(
    "args", [{}, {"deployments": []}, {"deployments": [{"checkpoint": "tiny"}], "other": 1}]
)
def test_build_says_what_it_expects(args: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="deployments"):
        build(args)


def test_a_reserved_port_is_nobody_elses() -> None:
    port, lock = reserve()
    with lock, pytest.raises(OSError, match=f"port {port} of 127.0.0.1"):
        reserve(port)  # before Ray listens, and for as long as it does
    reserve(port)[1].close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(OSError, match="choose another"):
            reserve(port)
