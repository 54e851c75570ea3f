"""What can be said of `up` and the command without a cluster."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from labkit.cli import app
from labkit.cluster import deploy, upload
from labkit.cluster.context import IN_CLUSTER, NODE, Context
from labkit.cluster.kuberay import KubeRayError
from labkit.cluster.render import DEFAULT
from labkit.serving import Deployment

ELSEWHERE = Path("somewhere")


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cluster", *args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def checkpoint(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_checkpoints_place_is_its_name_and_content(tmp_path: Path) -> None:
    first = upload.place(checkpoint(tmp_path / "a" / "int4 g64"))
    same = upload.place(checkpoint(tmp_path / "b" / "int4 g64"))
    other = upload.place(checkpoint(tmp_path / "c" / "int4 g64", b"weightz"))
    assert first == same
    assert first != other
    assert first.startswith("/checkpoints/int4-g64-")


def test_a_file_that_moved_is_another_content(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "x")
    place = upload.place(first)
    shutil.move(first / "model.safetensors", first / "model-1.safetensors")
    assert upload.place(first) != place


def test_places_can_stand_in_a_shell_line_and_in_an_annotation(tmp_path: Path) -> None:
    for name in ("$(reboot); 'x'", "…", "-rf", "x" * 200):
        place = upload.place(checkpoint(tmp_path / name))
        leaf = Path(place).name
        assert place == f"/checkpoints/{leaf}"
        assert len(leaf) <= 63
        assert all(letter.isascii() and (letter.isalnum() or letter in ".-") for letter in leaf)
        assert leaf[0].isalnum()


@pytest.mark.parametrize(
    ("context", "profile"),
    [
        (Context(NODE, "https://127.0.0.1:1", ELSEWHERE, is_node=True), "node"),
        (Context("kind-lab", "https://127.0.0.1:2", ELSEWHERE), "kind"),
        (Context("work", "https://192.0.2.1", ELSEWHERE), "base"),
        (Context(IN_CLUSTER, "https://10.96.0.1", None), "base"),
    ],
)
def test_the_profile_suits_the_context(context: Context, profile: str) -> None:
    assert deploy.profile_for(context).name == profile


def test_a_checkpoint_that_is_not_there_is_said_before_anything_is_asked_of_the_cluster() -> None:
    plan = deploy.Plan(deployments=[Deployment.model_validate({"checkpoint": "no/such/folder/x"})])
    with pytest.raises(FileNotFoundError, match="no/such/folder/x"):
        next(deploy.up(None, plan))  # type: ignore[arg-type]


def test_errors_name_the_object_and_keep_the_servers_words() -> None:
    error = KubeRayError(
        "is forbidden", kind="RayJob", name="sweep", namespace="lab", status=403, reason="Forbidden"
    )
    assert str(error) == "RayJob sweep in namespace lab: is forbidden"
    assert (error.status, error.reason, error.message) == (403, "Forbidden", "is forbidden")
    assert str(KubeRayError("is there", kind="Namespace", name="lab")) == "Namespace lab: is there"


def test_render_prints_what_check_takes(tmp_path: Path) -> None:
    code, text = run("render", "--profile", "node", "--service", "mine", "--namespace", "space", "--redis")
    assert code == 0
    documents = list(yaml.safe_load_all(text))
    assert {each["metadata"].get("namespace", "space") for each in documents} == {"space"}
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    assert service["metadata"]["name"] == "mine"
    (tmp_path / "all.yaml").write_text(text)
    code, text = run("check", str(tmp_path / "all.yaml"))
    assert code == 0
    assert f"{len(documents)} valid, 0 invalid" in text


def test_render_names_the_model_after_its_checkpoint() -> None:
    _, text = run(
        "render", "--json", "--checkpoint", "/checkpoints/int4-0123", "--image", "example.org/me:1"
    )
    (service,) = [each for each in json.loads(text) if each["kind"] == "RayService"]
    assert "lab@int4-0123" in service["spec"]["serveConfigV2"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["image"] == "example.org/me:1"
    assert DEFAULT.name not in service["spec"]["serveConfigV2"]


def test_check_says_where_and_ends_with_1(tmp_path: Path) -> None:
    _, text = run("render")
    (tmp_path / "wrong.yaml").write_text(text.replace("upgradeStrategy:", "upgradeStrategie:"))
    line = text.splitlines().index("  upgradeStrategy:") + 1
    code, said = run("check", str(tmp_path / "wrong.yaml"))
    assert code == 1
    assert "wrong.yaml" in said
    assert "upgradeStrategie" in said
    code, said = run("check", "--json", str(tmp_path / "wrong.yaml"))
    verdicts = json.loads(said)
    assert code == 1
    (invalid,) = [each for each in verdicts if each["state"] == "invalid"]
    assert invalid["errors"][0]["line"] == line


def test_without_a_cluster_each_command_says_how_to_name_one(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean_environment.setenv("LABKIT_CACHE", str(tmp_path))
    clean_environment.setenv("KUBECONFIG", str(tmp_path / "none"))
    manifest = tmp_path / "a.yaml"
    manifest.write_text("")
    for command in (
        ["up"],
        ["up", "--dry-run"],
        ["apply", str(manifest)],
        ["status"],
        ["logs"],
        ["query", "x"],
        ["down"],
    ):
        with pytest.raises(RuntimeError, match="LABKIT_KUBE_CONTEXT"):
            run(*command)


def test_an_update_that_fails_after_the_service_was_ready_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old replicas answer on, and the service is ready with them."""
    ray = SimpleNamespace(
        get=lambda kind, name: {}, port_forward=lambda *_: nullcontext(SimpleNamespace(url="", trouble=""))
    )
    plan = deploy.Plan([Deployment(checkpoint="/checkpoints/none", name="lab@none")], timeout=30)
    monkeypatch.setattr(deploy.client, "one_token", lambda url, name: "lab@tiny")
    monkeypatch.setattr(deploy, "POLL_S", 0.01)
    monkeypatch.setattr(deploy, "LOOK_S", 0.0)
    monkeypatch.setattr(deploy, "_problems", lambda ray, known, now: {"DEPLOY_FAILED: no model": now - 100})
    said: list[str] = []
    with pytest.raises(RuntimeError, match="an answer will not come:\n  DEPLOY_FAILED: no model"):
        deploy._answer(ray, plan, said.append)
    monkeypatch.setattr(deploy, "_problems", lambda ray, known, now: {})
    plan = deploy.Plan([Deployment(checkpoint="tiny", name="lab@tiny")])
    assert deploy._answer(ray, plan, said.append) == "lab is answered by lab@tiny"
