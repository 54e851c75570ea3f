"""Which cluster is meant, and when a person is asked first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from labkit.cluster.context import IN_CLUSTER, NODE, Context, Unreachable, confirm, current, reachable

NEVER = Context("never", "https://192.0.2.1:6443", Path("unused"))


def kubeconfig(path: Path, *contexts: str, default: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": f"cluster-of-{name}", "cluster": {"server": f"https://{name}.example:6443"}}
            for name in contexts
        ],
        "users": [{"name": "me", "user": {"token": "none"}}],
        "contexts": [
            {"name": name, "context": {"cluster": f"cluster-of-{name}", "user": "me"}} for name in contexts
        ],
    }
    if default:
        content["current-context"] = default
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def home(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    clean_environment.setenv(
        "KUBECONFIG", str(kubeconfig(tmp_path / "config", "office", "kind-lab", default="office"))
    )
    clean_environment.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    clean_environment.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return tmp_path


def test_the_default_context_is_never_taken(home: Path) -> None:
    with pytest.raises(Unreachable, match=r"LABKIT_KUBE_CONTEXT.*office.*make node-up"):
        current()


def test_the_named_context_is_taken(home: Path, clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "kind-lab")
    found = current()
    assert (found.name, found.server, found.is_node) == ("kind-lab", "https://kind-lab.example:6443", False)
    assert found.client().configuration.host == "https://kind-lab.example:6443"


def test_a_context_that_is_not_there_is_named_with_those_that_are(
    home: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "offize")
    with pytest.raises(Unreachable, match=r"offize.*kind-lab, office"):
        current()


def test_the_node_is_taken_where_nothing_is_named(home: Path) -> None:
    kubeconfig(home / "cache" / "node" / "kubeconfig", NODE)
    assert current().is_node
    assert current().name == NODE


def test_what_is_named_goes_before_the_node(home: Path, clean_environment: pytest.MonkeyPatch) -> None:
    kubeconfig(home / "cache" / "node" / "kubeconfig", NODE)
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "office")
    assert current().name == "office"
    assert not current().is_node


def test_a_context_of_the_users_own_that_is_called_like_the_node_is_not_the_node(
    home: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    kubeconfig(home / "cache" / "node" / "kubeconfig", NODE)
    clean_environment.setenv("KUBECONFIG", str(kubeconfig(home / "other", NODE)))
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", NODE)
    assert not current().is_node


def test_several_kubeconfigs(home: Path, clean_environment: pytest.MonkeyPatch) -> None:
    second = kubeconfig(home / "second", "far")
    clean_environment.setenv("KUBECONFIG", f"{home / 'config'}:{second}:{home / 'not there'}")
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "far")
    assert current().client().configuration.host == "https://far.example:6443"


def test_in_a_pod_it_is_the_cluster_around_it(home: Path, clean_environment: pytest.MonkeyPatch) -> None:
    from labkit.cluster import context

    kubeconfig(home / "cache" / "node" / "kubeconfig", NODE)
    clean_environment.setattr(context, "ACCOUNT", home)
    (home / "token").write_text("t")
    clean_environment.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert current() == Context(IN_CLUSTER, "https://10.96.0.1:443", None)
    (home / "token").unlink()
    assert current().is_node, "a pod without a token has no cluster to talk to"


@pytest.mark.parametrize("text", ["[", "contexts: 7", "- a"])
def test_a_file_that_is_no_kubeconfig_is_named(home: Path, text: str) -> None:
    (home / "config").write_text(text)
    with pytest.raises(Unreachable, match=str(home / "config")):
        current()


def test_why_a_server_does_not_answer(home: Path, clean_environment: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    content = yaml.safe_load((home / "config").read_text())
    content["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
    (home / "config").write_text(yaml.safe_dump(content))
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "office")
    said = reachable(current())
    assert said is not None
    assert "refused" in said
    assert str(port) in said
    assert "\n" not in said
    assert "0x" not in said


def test_the_first_write_asks_and_the_second_does_not(home: Path) -> None:
    asked: list[str] = []

    def yes(question: str) -> str:
        asked.append(question)
        return "y"

    confirm(NEVER, "my-space", ask=yes)
    assert len(asked) == 1
    assert "never" in asked[0]
    assert "https://192.0.2.1:6443" in asked[0]
    assert "my-space" in asked[0]
    confirm(NEVER, "my-space", ask=yes)
    assert len(asked) == 1


@pytest.mark.parametrize("answer", ["", "n", "no", "yess"])
def test_anything_but_yes_stops_and_is_not_remembered(home: Path, answer: str) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nothing was written"):
            confirm(NEVER, "lab", ask=lambda _: answer)


def test_another_server_under_the_same_name_is_asked_for_again(home: Path) -> None:
    confirm(NEVER, "lab", yes=True)
    moved = Context(NEVER.name, "https://192.0.2.2:6443", NEVER.kubeconfig)
    with pytest.raises(RuntimeError, match="nothing was written"):
        confirm(moved, "lab", ask=lambda _: "n")


def test_where_nobody_can_be_asked_yes_is_wanted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", (home / "config").open())
    with pytest.raises(RuntimeError, match="--yes"):
        confirm(NEVER, "lab")
    confirm(NEVER, "lab", yes=True)
    confirm(NEVER, "lab")


def test_the_node_and_the_cluster_around_a_pod_need_no_question(home: Path) -> None:
    def never(question: str) -> str:
        raise AssertionError(question)

    confirm(Context(NODE, "https://127.0.0.1:1", home, is_node=True), "lab", ask=never)
    confirm(Context(IN_CLUSTER, "https://10.96.0.1:443", None), "lab", ask=never)


def test_help_loads_neither_kubernetes_nor_ray_nor_torch() -> None:
    code = (
        "import sys; from labkit.cluster.commands import app; "
        "print([m for m in ('kubernetes', 'ray', 'torch', 'httpx', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
