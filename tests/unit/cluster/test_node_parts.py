"""What of the test node can be said without starting it: builds, images, certificates, the forwarder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
NODE = ROOT / "cluster" / "node"
sys.path.insert(0, str(NODE))

import certificates  # noqa: E402
import programs  # noqa: E402
from node import SECOND, Node  # noqa: E402

# A `go` that builds nothing: it notes its calls, makes the files that are asked for, and fails where told to.
GO = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path({here!r})
words = sys.argv[1:]
if words[0] == "env":
    print("go{version}")
elif words[:2] == ["mod", "download"]:
    print(json.dumps({{"Dir": str(here / "module")}}))
elif words[0] == "build":
    folder = pathlib.Path.cwd().name
    with open(here / "calls", "a") as calls:
        calls.write(folder + "\\n")
    if (here / "broken").exists() and (here / "broken").read_text() == folder:
        sys.exit("broken: no space left on device")
    target = pathlib.Path(words[words.index("-o") + 1])
    pathlib.Path(os.environ["GOCACHE"]).mkdir(parents=True, exist_ok=True)
    names = [target] if not target.is_dir() else [target / w.split("/")[-1] for w in words if "/cmd/" in w]
    for name in names:
        name.write_text(folder)
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Go of this test's own, first on the PATH, and a module that it hands out."""
    here = tmp_path / "go"
    for folder in ("crd", "rbac", "manager", "default", "samples"):
        (here / "module" / "config" / folder).mkdir(parents=True)
        (here / "module" / "config" / folder / "a.yaml").write_text(folder)
    (here / "module" / "api" / "openapi-spec").mkdir(parents=True)
    (here / "module" / "api" / "openapi-spec" / "swagger.json").write_text("{}")
    write_go(here, "1.26.0")
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    return here


def write_go(here: Path, version: str) -> None:
    (here / "go").write_text(GO.format(python=sys.executable, here=str(here), version=version))
    (here / "go").chmod(0o755)


def calls(here: Path) -> list[str]:
    path = here / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def quiet(line: str) -> None:
    pass


# ---- builds


def test_each_program_is_built_once_and_a_broken_build_goes_on(go: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    (go / "broken").write_text("coredns")
    with pytest.raises(RuntimeError, match=r"(?s)coredns.*`make node` again.*no space left"):
        programs.build(node, quiet)
    assert not programs.is_built(node)
    before = calls(go)
    assert before[-1] == "coredns"
    (go / "broken").unlink()
    programs.build(node, quiet)
    assert programs.is_built(node)
    after = calls(go)
    assert after[0] == "coredns"
    assert set(before[:-1]) & set(after) == set()
    assert {*before, *after} == {folder.name for folder in (NODE / "programs").iterdir()}
    programs.build(node, quiet)
    assert calls(go) == []


def test_what_is_built_lies_where_the_contract_says(go: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    programs.build(node, quiet)
    for name in ("kubectl", "kubelet", "kube-apiserver", "etcd", "containerd", "ctr", "pause"):
        assert (node / "bin" / name).is_file(), name
    assert (node / "share" / "kuberay" / "crd" / "a.yaml").read_text() == "crd"
    assert (node / "share" / "kuberay" / "samples" / "a.yaml").read_text() == "samples"
    assert (node / "share" / "kubernetes" / "swagger.json").read_text() == "{}"
    assert {path.name for path in (node / "images").iterdir()} == {
        "pause.tar", "coredns.tar", "metrics-server.tar", "kuberay-operator.tar",
    }  # fmt: skip


@pytest.mark.parametrize("keep", [False, True])
def test_gos_caches_lie_in_the_nodes_folder_and_stay_only_on_request(
    go: Path, tmp_path: Path, keep: bool
) -> None:
    node = tmp_path / "node"
    (go / "broken").write_text("coredns")
    with pytest.raises(RuntimeError):
        programs.build(node, quiet, keep=keep)
    assert (node / "go" / "build").is_dir()  # a build that goes on needs them
    (go / "broken").unlink()
    programs.build(node, quiet, keep=keep)
    assert (node / "go").exists() is keep
    programs.build(node, quiet)
    assert not (node / "go").exists()


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go"])
def test_a_program_is_built_again_when_what_decides_it_changes(
    go: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    sources = tmp_path / "programs"
    for path in (NODE / "programs").rglob("*"):
        if path.is_file():
            (sources / path.relative_to(NODE / "programs")).parent.mkdir(parents=True, exist_ok=True)
            (sources / path.relative_to(NODE / "programs")).write_bytes(path.read_bytes())
    monkeypatch.setattr(programs, "SOURCES", sources)
    node = tmp_path / "node"
    programs.build(node, quiet)
    calls(go)
    with (sources / "coredns" / changed).open("a") as file:
        file.write("// one more line\n")
    assert not programs.is_built(node)
    programs.build(node, quiet)
    assert calls(go) == ["coredns"]


def test_an_old_go_is_refused_with_the_remedy(go: Path, tmp_path: Path) -> None:
    write_go(go, "1.25.9")
    with pytest.raises(RuntimeError, match=r"1\.26.*found go1\.25\.9.*go\.dev/dl"):
        programs.build(tmp_path / "node", quiet)
    assert calls(go) == []


def test_no_go_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.shutil, "which", lambda name, path=None: None)
    with pytest.raises(RuntimeError, match=r"1\.26.*no `go` was found.*go\.dev/dl"):
        programs.build(tmp_path / "node", quiet)


def test_versions_are_those_the_modules_require() -> None:
    assert programs.version("kubernetes", "k8s.io/kubernetes") == "v1.37.2"
    assert programs.version("kuberay-operator", "github.com/ray-project/kuberay/ray-operator") == "v1.6.2"
    with pytest.raises(ValueError, match=r"etcd/go\.mod does not require k8s\.io/kubernetes"):
        programs.version("etcd", "k8s.io/kubernetes")


# ---- images


def test_an_image_names_what_it_holds(tmp_path: Path) -> None:
    """Every digest is counted again here, as whoever loads the archive does."""
    binary = tmp_path / "program"
    binary.write_bytes(os.urandom(5000))
    programs.write_image(tmp_path / "a.tar", "lab/program:1", binary, "manager", 10002)
    with tarfile.open(tmp_path / "a.tar") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    [entry] = json.loads(files["manifest.json"])
    assert entry["RepoTags"] == ["lab/program:1"]
    config = json.loads(files[entry["Config"]])
    assert entry["Config"] == f"{hashlib.sha256(files[entry['Config']]).hexdigest()}.json"
    layers = [hashlib.sha256(files[name]).hexdigest() for name in entry["Layers"]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{digest}" for digest in layers]
    assert config["config"] == {"Entrypoint": ["/manager"], "User": "10002"}
    with tarfile.open(fileobj=io.BytesIO(files[entry["Layers"][0]])) as layer:
        assert layer.extractfile("manager").read() == binary.read_bytes()  # type: ignore[union-attr]
        assert layer.getmember("manager").mode == 0o755
        assert layer.getmember("tmp").mode == 0o1777


# ---- certificates


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node") / "pki"
    certificates.write(folder, ["kubernetes.default.svc"], ["127.0.0.1", "192.0.2.2"])
    return folder


def handshake(pki: Path, server: str, client: str | None, name: str, authority: Path) -> dict[str, str]:
    """TLS between two certificates as the API server does it: the subject that the server sees."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(pki / f"{server}.crt", pki / f"{server}.key")
    listening.load_verify_locations(authority)
    listening.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(authority))
    if client:
        calling.load_cert_chain(pki / f"{client}.crt", pki / f"{client}.key")
    one, other = socket.socketpair()
    seen: dict[str, str] = {}

    def serve() -> None:
        try:
            with listening.wrap_socket(one, server_side=True) as secured:
                for ((field, value),) in secured.getpeercert()["subject"]:  # type: ignore[index, misc]
                    seen[str(field)] = str(value)
                secured.sendall(b"k")
        except OSError:
            one.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with calling.wrap_socket(other, server_hostname=name) as secured:
            assert secured.recv(1) == b"k"
    finally:
        other.close()
        thread.join()
    return seen


# Kubernetes' own names for them: https://kubernetes.io/docs/setup/best-practices/certificates/
@pytest.mark.parametrize(
    ("client", "user", "group"),
    [
        ("admin", "kubernetes-admin", "system:masters"),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("kube-proxy", "system:kube-proxy", None),
        ("kubelet", "system:node:lab", "system:nodes"),
    ],
)
def test_the_api_server_knows_each_client(pki: Path, client: str, user: str, group: str | None) -> None:
    seen = handshake(pki, "apiserver", client, "127.0.0.1", pki / "ca.crt")
    assert (seen["commonName"], seen.get("organizationName")) == (user, group)


@pytest.mark.parametrize("name", ["127.0.0.1", "192.0.2.2", "kubernetes.default.svc"])
def test_the_api_server_is_known_by_its_names_alone(pki: Path, name: str) -> None:
    assert handshake(pki, "apiserver", "admin", name, pki / "ca.crt")
    for stranger in ("192.0.2.3", "kubernetes.example"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(pki, "apiserver", "admin", stranger, pki / "ca.crt")


def test_another_authority_and_the_wrong_purpose_are_refused(pki: Path, tmp_path: Path) -> None:
    certificates.write(tmp_path / "pki", ["kubernetes.default.svc"], ["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, "apiserver", "admin", "127.0.0.1", tmp_path / "pki" / "ca.crt")
    with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
        handshake(pki, "apiserver", "kubelet-serving", "127.0.0.1", pki / "ca.crt")


def test_keys_are_for_their_owner_alone(pki: Path) -> None:
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700
    keys = list(pki.glob("*.key"))
    assert len(keys) >= 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_kubeconfig_stands_alone(pki: Path) -> None:
    text = certificates.kubeconfig(pki, "admin", "https://127.0.0.1:4242", "somewhere")
    config = yaml.safe_load(text)
    assert config["current-context"] == "somewhere"
    assert [item["cluster"]["server"] for item in config["clusters"]] == ["https://127.0.0.1:4242"]
    [user] = config["users"]
    assert base64.b64decode(user["user"]["client-key-data"]) == (pki / "admin.key").read_bytes()
    assert str(pki) not in text


# ---- processes


@contextmanager
def forwarder(port: int, owner: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The forwarder as the launcher starts it, and the port that it accepts at."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        command = [sys.executable, str(NODE / "forward.py"), str(listener.fileno()), "127.0.0.1", str(port)]
        process = subprocess.Popen(
            [*command, str(owner / "run")], pass_fds=[listener.fileno()], stderr=subprocess.PIPE
        )
        accepting = listener.getsockname()[1]
    try:
        yield process, accepting
    finally:
        process.kill()
        _, words = process.communicate()
    assert words == b""  # a far side that comes and goes fills no log


def test_the_forwarder_carries_both_ways_and_hands_the_end_on(tmp_path: Path) -> None:
    """The far side answers only when it has seen the end, so a half-closed connection must stay open."""
    content = os.urandom(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as far:

        def reverse() -> None:
            connection, _ = far.accept()
            with connection, connection.makefile("rb") as file:
                connection.sendall(file.read()[::-1])

        thread = threading.Thread(target=reverse, daemon=True)
        thread.start()
        with (
            forwarder(far.getsockname()[1], tmp_path) as (_, port),
            socket.create_connection(("127.0.0.1", port), timeout=20) as near,
        ):
            near.sendall(content)
            near.shutdown(socket.SHUT_WR)
            with near.makefile("rb") as file:
                assert file.read() == content[::-1]


def test_a_far_side_that_is_not_there_ends_one_connection_only(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port_of_nobody = gone.getsockname()[1]
    with forwarder(port_of_nobody, tmp_path) as (process, port):
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as near:
                assert near.recv(1) == b""
        assert process.poll() is None


@pytest.mark.needs("linux")
def test_a_node_ends_its_own_processes_and_no_others(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    with forwarder(1, mine) as (kept_by_me, _), forwarder(1, other) as (kept_by_other, _):
        sleepers = [
            subprocess.Popen([str(folder / "bin" / "kubelet"), "60"], executable="/bin/sleep")
            for folder in (mine, other)
        ]
        try:
            node = Node(mine)
            node.stop_part("kubelet")
            node.stop_part("forwarder")
            assert [sleepers[0].wait(10), kept_by_me.wait(10)] == [-9, -9]
            assert [sleepers[1].poll(), kept_by_other.poll()] == [None, None]
        finally:
            for sleeper in sleepers:
                sleeper.kill()
                sleeper.wait()


def test_an_unbuilt_node_and_a_plain_user_are_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(RuntimeError, match="make node"):
        Node(tmp_path).up(quiet)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="root"):
        Node(tmp_path).up(quiet)


def test_a_node_that_has_joined_does_not_join_again(tmp_path: Path) -> None:
    """Its containerd has the copy of the images open: nothing may be copied over it."""
    node = Node(tmp_path)
    for folder in (node.storage(), node.storage(SECOND)):
        (folder / "images").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"lab-2 has joined already: leave\(\) first"):
        node.join()
    assert [path.name for path in node.storage(SECOND).iterdir()] == ["images"]
