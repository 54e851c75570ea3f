"""labkit doctor: verdicts on faked facts, gathering from faked files, and the command itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from labkit import doctor
from labkit.doctor import Facts, Verdict, judge

HEALTHY = Facts(
    system="Linux",
    processor="x86_64",
    python=(3, 12),
    wsl=False,
    checkout="/home/ada/lab",
    cores=4,
    memory=15.5,
    shm=7.7,
    cache="/home/ada/.cache/labkit",
    cache_writable=True,
    shared_cache=None,
    shared_cache_readable=False,
    disk=40.0,
    model=True,
    offline=False,
    packages={"torch": ("2.13.0", "2.13.0+cpu", True), "ray": ("2.60.0", None, False)},
    loopback=True,
    jupyter_port_free=True,
    gpus=(),
    kernel="AVX-512",
    kernel_error=None,
    context=None,
    cluster=None,
    cluster_error=None,
    kuberay=False,
)


def verdict(check: str, **changes: object) -> Verdict:
    verdicts = judge(replace(HEALTHY, **changes))  # type: ignore[arg-type]
    others = [v for v in verdicts if v.check != check]
    assert all(v.state == "ok" for v in others), "a fault must be named once, not several times"
    return next(v for v in verdicts if v.check == check)


def test_a_healthy_machine_is_all_green() -> None:
    verdicts = judge(HEALTHY)
    assert {v.state for v in verdicts} == {"ok"}
    assert [v.check for v in verdicts] == [
        "machine", "folder", "cores", "memory", "/dev/shm", "disk",
        "packages", "cache", "model", "ports", "GPU", "kernels", "cluster",
    ]  # fmt: skip
    assert doctor.as_json(verdicts)["ok"] is True


@pytest.mark.parametrize(
    ("check", "changes", "state", "words"),
    [
        ("machine", {"system": "Darwin", "processor": "x86_64"}, "missing", "Intel Mac"),
        ("machine", {"system": "Windows"}, "missing", "WSL"),
        ("machine", {"python": (3, 10)}, "missing", "PYTHON=python3.12"),
        ("machine", {"python": (3, 14)}, "missing", "3.11 to 3.13"),
        ("folder", {"wsl": True, "checkout": "/mnt/c/Users/ada/lab"}, "note", "Linux home folder"),
        ("cores", {"cores": 1}, "note", "twice as long"),
        ("memory", {"memory": 5.9}, "note", ".wslconfig"),
        ("memory", {"memory": None}, "note", "6 GiB"),
        ("/dev/shm", {"shm": 0.0625}, "note", "--shm-size"),
        ("disk", {"disk": 1.2, "model": True}, "note", "LABKIT_CACHE"),
        ("packages", {"packages": {"torch": ("2.13.0", None, True)}}, "missing", "make setup"),
        ("packages", {"packages": {"torch": ("2.13.0", "2.12.1", True)}}, "note", "make setup"),
        ("cache", {"cache_writable": False}, "missing", "LABKIT_CACHE"),
        ("cache", {"shared_cache": "/srv/gone"}, "note", "LABKIT_SHARED_CACHE"),
        ("model", {"model": False}, "missing", "labkit models fetch"),
        ("model", {"model": False, "offline": True}, "missing", "LABKIT_OFFLINE"),
        ("ports", {"loopback": False}, "missing", "127.0.0.1"),
        ("kernels", {"kernel": None, "kernel_error": "no C++ compiler; install g++"}, "note", "written out"),
        ("cluster", {"context": "dev", "cluster_error": "refused"}, "missing", "kubectl --context dev"),
        ("cluster", {"context": "dev", "cluster": "v1.35.0"}, "note", "KubeRay"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_remedy(
    check: str, changes: dict[str, object], state: str, words: str
) -> None:
    found = verdict(check, **changes)
    assert (found.state, words in found.remedy) == (state, True), found
    assert "\n" not in found.found + found.remedy
    assert doctor.as_json([found])["ok"] is (state != "missing")


def test_a_full_disk_is_only_fatal_while_the_model_is_not_there() -> None:
    states = {v.check: v.state for v in judge(replace(HEALTHY, disk=0.5, model=False))}
    assert states["disk"] == "missing"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"system": "Darwin", "processor": "arm64", "shm": None}, "/dev/shm"),
        ({"python": (3, 11)}, "machine"),
        ({"python": (3, 13)}, "machine"),
        ({"memory": 6.0}, "memory"),
        ({"wsl": True}, "folder"),
        ({"checkout": "/mnt/c/lab"}, "folder"),  # a mount of that name outside WSL is a disk like any other
        ({"wsl": True, "checkout": "/mnt/cache/lab"}, "folder"),
        ({"jupyter_port_free": False}, "ports"),
        ({"gpus": ("NVIDIA H100, 80 GiB",)}, "GPU"),
        ({"context": "dev", "cluster": "v1.35.0", "kuberay": True}, "cluster"),
        ({"shared_cache": "/srv/labkit", "shared_cache_readable": True}, "cache"),
    ],
)
def test_what_is_no_fault_stays_green(changes: dict[str, object], check: str) -> None:
    assert verdict(check, **changes).state == "ok"


def test_the_packages_that_differ_are_named() -> None:
    many = {name: ("1.0", "2.0", False) for name in "abcdef"}
    assert verdict("packages", packages=many).found.startswith("a 2.0 (tested with 1.0), b 2.0")
    assert verdict("packages", packages=many).found.endswith("and 2 more")
    missing = {"a": ("1.0", None, True), "b": (None, None, True), "c": ("1.0", None, False)}
    assert verdict("packages", packages=missing).found == "not installed: a, b"


def test_constraints_are_read_by_name_and_version(tmp_path: Path) -> None:
    lines = [
        "Ruamel_Yaml==0.19.1",
        "numpy==2.4.6 ; python_full_version < '3.12'",
        "numpy==2.5.5 ; python_full_version >= '3.12'",
        "# torch==1.0",
    ]
    path = tmp_path / "constraints.txt"
    path.write_text("\n".join(lines))
    assert doctor._constraints(path) == {"ruamel-yaml": "0.19.1"}


def test_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "pod" / "lab"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "pod" / "memory.max").write_text(f"{3 * 2**30}\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/lab\n")
    folders = doctor._cgroups(root=tmp_path, own=own)
    assert folders == [inner, tmp_path / "pod", tmp_path]
    monkeypatch.setattr(doctor, "_cgroups", lambda: folders)
    assert doctor._memory() == pytest.approx(3.0)
    assert doctor._cores() == 1


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not doctor._can_bind(server.getsockname()[1])
    assert doctor._can_bind(0)


def test_gather_looks_at_the_named_cache(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("LABKIT_CACHE", str(tmp_path / "not" / "yet"))
    facts = doctor.gather()
    assert (facts.cache_writable, facts.model) == (True, False)
    shared = tmp_path / "shared"
    (shared / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    clean_environment.setenv("LABKIT_SHARED_CACHE", str(shared))
    facts = doctor.gather()
    assert (facts.shared_cache_readable, facts.model) == (True, True)
    assert facts.packages["torch"][1] is not None and facts.packages["torch"][2]
    assert facts.packages["ray"][2] is False


def test_gather_does_not_take_a_file_for_a_cache(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    clean_environment.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert not doctor.gather().cache_writable


def test_an_unknown_cluster_is_a_fault_not_a_traceback(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("apiVersion: v1\nkind: Config\nclusters: []\ncontexts: []\nusers: []\n")
    clean_environment.setenv("KUBECONFIG", str(config))
    clean_environment.setenv("LABKIT_KUBE_CONTEXT", "nowhere")
    facts = doctor.gather()
    assert facts.cluster is None and facts.cluster_error
    assert doctor.cluster(facts).state == "missing"


def labkit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "labkit.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_command_says_what_is_missing_and_exits_1(tmp_path: Path) -> None:
    done = labkit("doctor", LABKIT_CACHE=str(tmp_path))
    assert done.returncode == 1
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["missing", "model"] in lines
    assert len(lines) == 13
    as_json = json.loads(labkit("doctor", "--json", LABKIT_CACHE=str(tmp_path)).stdout)
    assert as_json["ok"] is False
    assert [check["state"] for check in as_json["checks"] if check["check"] == "model"] == ["missing"]


def test_a_wrong_setting_is_one_line_on_stderr() -> None:
    done = labkit("doctor", LABKIT_OFFLINE="yes")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == "labkit: LABKIT_OFFLINE must be 0 or 1, found 'yes'; set it to one of them or unset it\n"
    )


def test_a_defect_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from labkit import cli

    def broken() -> None:
        int("not a number")  # raised by Python, not by a deliberate `raise` in labkit

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main()

    def without_ray() -> None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(cli, "app", without_ray)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("labkit: ray is not installed")

    def full_disk() -> None:
        raise OSError(28, "No space left on device", "/cache/model")

    monkeypatch.setattr(cli, "app", full_disk)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "labkit: [Errno 28] No space left on device: '/cache/model'\n"
