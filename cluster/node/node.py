"""A Kubernetes on this machine, of one node or two: start, stop and look at it.

Everything runs in a network namespace of its own with no route out, and what mounts anything runs in a mount
namespace of its own, so that both vanish with the last process. ``up`` begins by clearing what a crash
left. The folder is ``LABKIT_NODE``; the only thing that stands on the machine's own network is a forwarder
on 127.0.0.1 that carries connections to the API server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import certificates
import images
import programs

from labkit.cluster.context import NODE as CONTEXT

HERE = Path(__file__).resolve().parent
NETWORK = "bits-to-pods"  # the network namespace
CGROUP = "k8s.io"  # where containerd puts pods that kubelet gives no cgroup: its namespace's name
SERVICES = "10.96.0.0/16"
PODS = "10.244.0.0/16"
API_PORT = 6443
VOLUMES = 32
PATIENCE_S = 120.0
# What kubelet would set; where a container may not write these, the wish stands over the entry instead.
SYSCTL = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


@dataclass(frozen=True)
class Kubelet:
    """A kubelet with a containerd of its own: a node to Kubernetes, a few processes to this machine.

    mark  stands at the end of the names of its parts and files
    """

    name: str
    address: str  # RFC 5737: for documentation, nobody's
    mark: str = ""


FIRST, SECOND = Kubelet("lab", "192.0.2.2"), Kubelet("lab-2", "192.0.2.3", "-2")
KUBELETS = (FIRST, SECOND)


def parts_of(kubelet: Kubelet) -> list[str]:
    """Its parts, in the order they are stopped."""
    return [part + kubelet.mark for part in ("kubelet", "tasks", "shims", "containerd")]


# In the order they are stopped: nothing outlives what would restart it or needs it to end well.
STOP_ORDER = (
    *(parts_of(kubelet)[0] for kubelet in KUBELETS),
    "forwarder", "proxy", "scheduler", "controller-manager",
    *(part for kubelet in KUBELETS for part in parts_of(kubelet)[1:]),
    "mounts", "apiserver", "etcd",
)  # fmt: skip
WORKLOADS = {"CoreDNS": ("kube-system", "coredns"), "KubeRay": ("kuberay-system", "kuberay-operator"),
             "metrics": ("kube-system", "metrics-server")}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One process of the node. ``mounts``: it runs in the node's mount namespace too."""

    name: str
    command: tuple[str, ...]
    mounts: bool = False


class Node:
    """The node that lives in a folder (``bin``, ``images``, ``share`` made by ``programs.build``).

    kubeconfig  for the administrator, over 127.0.0.1; its context is ``bits-to-pods-node``
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.bin, self.run = self.folder / "bin", self.folder / "run"
        self.pki, self.kubeconfig = self.run / "pki", self.folder / "kubeconfig"
        self.volumes = self.folder / "volumes"

    def storage(self, kubelet: Kubelet = FIRST) -> Path:
        """Where a kubelet's containerd keeps images and containers."""
        return self.folder / f"containerd{kubelet.mark}"

    # ---- start and stop

    def up(self, say: Callable[[str], None] = print) -> dict[str, float]:
        """Start it, and return once DNS, metrics and the KubeRay operator work: seconds for each stage.

        Raises RuntimeError where something does not come up, with the log to read; PermissionError unless
        root.
        """
        if os.geteuid() != 0:
            raise PermissionError("the test node makes namespaces and mounts: run it as root")
        if not programs.is_built(self.folder):
            raise RuntimeError("the node's programs are not built yet: run `make node`")
        clock = _Clock(say)
        self.down()
        self._prepare()
        self._make_network()
        clock.stage("clean start")
        self._start_all("etcd", "apiserver", "mounts")
        self._start_forwarder()
        self._until(self.answers, "apiserver")
        self._start_all("controller-manager", "scheduler")
        clock.stage("API server")
        self._start_containerd(FIRST)
        for image in (*sorted((self.folder / "images").glob("*.tar")), self.folder / "images" / "oci"):
            if image.exists():
                self.load_image(image)
        clock.stage("images")
        self.start_part("kubelet")
        self._until(lambda: bool(self._node(FIRST, "{.status.addresses}")), "kubelet")
        self.start_part("proxy")  # it ends itself when the node gets an address
        self.kubectl("apply", "--server-side", "-f", str(HERE / "config" / "addons.yaml"))
        self.kubectl("apply", "--server-side", "-k", str(self.folder / "share" / "kuberay"))
        self._apply_volumes()
        self._until_ready(FIRST)
        clock.stage("node ready")
        for what, (namespace, name) in WORKLOADS.items():
            self.kubectl(
                "rollout", "status", f"deployment/{name}", f"--namespace={namespace}", "--timeout=120s"
            )
            clock.stage(what)
        clock.stage("total", clock.began)
        return clock.stages

    def down(self) -> None:
        """End every process of the node, and remove its mounts, its network, its cgroups and its state.

        Also what a crash left; with nothing there it does nothing.
        """
        for name in STOP_ORDER:
            self.stop_part(name)
        self._unmount()
        _remove_cgroups()
        shutil.rmtree(self.storage(SECOND), ignore_errors=True)
        if Path("/run/netns", NETWORK).exists():
            _call("ip", "netns", "delete", NETWORK)
        shutil.rmtree(self.run, ignore_errors=True)
        self.kubeconfig.unlink(missing_ok=True)

    def join(self) -> None:
        """Start the second kubelet, the node ``lab-2``, and return once it is ready.

        It has the images that the first has now; nothing may be loaded meanwhile. Both say that the machine's
        cores and memory are theirs, so what they offer together is twice what there is. Raises RuntimeError
        where it has joined already.
        """
        one, two = self.storage(FIRST), self.storage(SECOND)
        if two.exists():
            raise RuntimeError(f"{SECOND.name} has joined already: leave() first, or `make node-down`")
        _linked(one, two)
        for database in two.rglob("*.db"):
            content = database.read_bytes()
            database.unlink()
            database.write_bytes(content)
        self._start_containerd(SECOND)
        self.start_part(parts_of(SECOND)[0])
        self._until_ready(SECOND)

    def leave(self) -> None:
        """End the second kubelet with all its pods, as if the machine were switched off, and forget the node."""
        for name in parts_of(SECOND):
            self.stop_part(name)
        self.kubectl("delete", "node", SECOND.name, "--ignore-not-found")
        shutil.rmtree(self.storage(SECOND), ignore_errors=True)

    def leftovers(self) -> list[str]:
        """What of the node stands on the machine now, one line each; empty after ``down``."""
        found = [f"process {pid} {name}" for name in STOP_ORDER for pid in self._pids(name)]
        found += [f"mount {path}" for path in self._mounts()]
        found += [f"cgroup {path}" for path in _cgroups()]
        if Path("/run/netns", NETWORK).exists():
            found.append(f"network namespace {NETWORK}")
        return found

    def status(self) -> list[str]:
        """One line for each part: running or not."""
        lines = []
        for name in reversed(STOP_ORDER):
            pids = self._pids(name)
            lines.append(
                f"{name:20} {'running' if pids else 'not running'}" + f" ({len(pids)})" * (len(pids) > 1)
            )
        if self._pids("apiserver"):
            lines.append(self.kubectl("get", "pods", "--all-namespaces", check=False))
        return lines

    def answers(self) -> bool:
        """Whether its API server is up."""
        return self.kubeconfig.exists() and self.kubectl("get", "--raw", "/readyz", check=False) == "ok"

    # ---- parts, for tests that break things

    def stop_part(self, name: str) -> None:
        """Kill the processes of one part and wait until they are gone: what a crash of it looks like."""
        while pids := self._pids(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def start_part(self, name: str) -> None:
        """Start one part; it answers a little later."""
        part = {part.name: part for part in self._parts()}[name]
        if part.mounts:
            holder = self._pids("mounts")[0]
            prefix = ["nsenter", f"--target={holder}", "--mount", "--net", "--"]
        else:
            prefix = self.in_network([])
        with (self.run / f"{name}.log").open("ab") as log:
            subprocess.Popen(
                [*prefix, *part.command], cwd=self.run, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
            )  # fmt: skip

    def renew_operator(self) -> None:
        """An operator that lost the API server has ended itself, and its pod waits longer each time before it
        starts again; a new pod starts at once.
        """
        namespace, name = WORKLOADS["KubeRay"]
        where = f"--namespace={namespace}"
        self.kubectl("delete", "pod", where, "--all", "--grace-period=0", "--force")
        self.kubectl("rollout", "status", f"deployment/{name}", where, "--timeout=60s")

    # ---- use

    def in_network(self, command: list[str]) -> list[str]:
        """The command as it runs inside the node's network, where pods and services have addresses."""
        return ["nsenter", f"--net=/run/netns/{NETWORK}", "--", *command]

    def load_image(self, image: Path) -> None:
        """Give containerd the images of an archive or of a folder in OCI's layout; what it has already is not
        copied again.
        """
        if image.is_dir():
            return self._load_layout(image)
        stamp = self.folder / "containerd" / "loaded.json"
        loaded = json.loads(stamp.read_text()) if stamp.exists() else {}
        state = [image.stat().st_size, image.stat().st_mtime_ns]
        if loaded.get(str(image)) != state:
            self.ctr("images", "import", "--local", str(image))
            stamp.write_text(json.dumps({**loaded, str(image): state}))

    def _load_layout(self, layout: Path) -> None:
        have = self.ctr("content", "list", "--quiet").split()
        command = self._ctr_command("images", "import", "--local", "-")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE) as ctr:  # fmt: skip
            assert ctr.stdin is not None and ctr.stderr is not None
            with suppress(BrokenPipeError), ctr.stdin:  # where it ended early, its own words say why
                images.pack(layout, have, ctr.stdin)
            words = ctr.stderr.read().decode(errors="replace").strip()
        if ctr.returncode != 0:
            raise RuntimeError(f"containerd refused {layout}: {words[-500:]}")

    def ctr(self, *arguments: str, check: bool = True, kubelet: Kubelet = FIRST) -> str:
        """containerd's own command, in the namespace that kubelet uses."""
        return _call(*self._ctr_command(*arguments, kubelet=kubelet), check=check)

    def _ctr_command(self, *arguments: str, kubelet: Kubelet = FIRST) -> list[str]:
        holder = next(iter(self._pids("mounts")), 0)
        enter = ["nsenter", f"--target={holder}", "--mount", "--"] if holder else []
        command = [str(self.bin / "ctr"), "-a", self._socket(kubelet), "-n", "k8s.io"]
        return [*enter, *command, *arguments]

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """What kubectl prints, as administrator. Raises RuntimeError with its message where it fails."""
        return _call(str(self.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments, check=check)

    # ---- inside

    def _socket(self, kubelet: Kubelet) -> str:
        return str(self.run / f"containerd{kubelet.mark}.sock")

    def _parts(self) -> Iterator[Part]:
        pki, run = self.pki, self.run
        yield Part(
            "etcd",
            (
                f"{self.bin}/etcd", f"--data-dir={run}/etcd", "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
                "--unsafe-no-fsync", "--log-level=warn",
            ),
        )  # fmt: skip
        yield Part(
            "apiserver",
            (
                f"{self.bin}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379",
                f"--advertise-address={FIRST.address}", f"--secure-port={API_PORT}",
                f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
                f"--client-ca-file={pki}/ca.crt",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={pki}/sa.key",
                f"--service-account-key-file={pki}/sa.pub",
                f"--service-cluster-ip-range={SERVICES}",
                "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
                f"--kubelet-client-key={pki}/apiserver-kubelet.key",
                f"--kubelet-certificate-authority={pki}/ca.crt",
                "--kubelet-preferred-address-types=InternalIP",
                f"--requestheader-client-ca-file={pki}/ca.crt",
                "--requestheader-allowed-names=front-proxy",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-username-headers=X-Remote-User",
                f"--proxy-client-cert-file={pki}/front-proxy.crt",
                f"--proxy-client-key-file={pki}/front-proxy.key",
                "--enable-aggregator-routing=true", f"--cert-dir={run}/apiserver",
            ),
        )  # fmt: skip
        yield Part(
            "controller-manager",
            (
                f"{self.bin}/kube-controller-manager",
                *(f"--{kind}kubeconfig={pki}/controller-manager.kubeconfig"
                  for kind in ("", "authentication-", "authorization-")),
                "--bind-address=127.0.0.1", f"--service-account-private-key-file={pki}/sa.key",
                f"--root-ca-file={pki}/ca.crt", "--use-service-account-credentials=true",
               
                "--leader-elect=false", "--allocate-node-cidrs=true", f"--cluster-cidr={PODS}",
                f"--service-cluster-ip-range={SERVICES}",
            ),
        )  # fmt: skip
        yield Part(
            "scheduler",
            (
                f"{self.bin}/kube-scheduler",
                *(f"--{kind}kubeconfig={pki}/scheduler.kubeconfig"
                  for kind in ("", "authentication-", "authorization-")),
                "--bind-address=127.0.0.1", "--leader-elect=false",
            ),
        )  # fmt: skip
        yield Part("proxy", (f"{self.bin}/kube-proxy", f"--config={run}/kube-proxy.yaml"))
        yield Part("mounts", ("unshare", "--mount", "--propagation=slave", "sh", f"{run}/mounts.sh"))
        for kubelet in KUBELETS:
            mark = kubelet.mark
            yield Part(
                f"containerd{mark}",
                (f"{self.bin}/containerd", f"--config={run}/containerd{mark}.toml"),
                mounts=True,
            )
            yield Part(
                f"kubelet{mark}",
                (
                    f"{self.bin}/kubelet", f"--config={run}/kubelet{mark}.yaml",
                    f"--kubeconfig={pki}/kubelet{mark}.kubeconfig", f"--hostname-override={kubelet.name}",
                    f"--node-ip={kubelet.address}", f"--root-dir={run}/kubelet{mark}",
                    f"--cert-dir={run}/kubelet{mark}/pki",
                ),
                mounts=True,
            )  # fmt: skip

    def _prepare(self) -> None:
        """The state folder with certificates and configuration, and empty volumes."""
        self.run.mkdir(mode=0o711, parents=True)
        (self.run / "sysctl").mkdir()
        self.storage().mkdir(exist_ok=True)
        (self.run / "resolv.conf").touch()
        certificates.write(
            self.pki,
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost",
             *(kubelet.name for kubelet in KUBELETS)],
            ["127.0.0.1", "10.96.0.1", *(kubelet.address for kubelet in KUBELETS)],
        )  # fmt: skip
        server = f"https://{FIRST.address}:{API_PORT}"
        for client in (
            "controller-manager",
            "scheduler",
            "kube-proxy",
            *(f"kubelet{k.mark}" for k in KUBELETS),
        ):
            text = certificates.kubeconfig(self.pki, client, server, CONTEXT)
            (self.pki / f"{client}.kubeconfig").write_text(text)
        self._configure("kube-proxy.yaml", self.run / "kube-proxy.yaml")
        for number, kubelet in enumerate(KUBELETS):
            mark = kubelet.mark
            for folder in ("podlogs", "kubelet", "cni"):
                (self.run / f"{folder}{mark}").mkdir()
            for source, target in (
                ("containerd.toml", f"containerd{mark}.toml"),
                ("kubelet.yaml", f"kubelet{mark}.yaml"),
                ("network.conflist", f"cni{mark}/network.conflist"),
            ):
                own = {
                    "MARK": mark,
                    "ADDRESS": kubelet.address,
                    "NUMBER": number,
                    "HEALTH": 10248 - 2 * number,  # 10249 is kube-proxy's
                }
                self._configure(source, self.run / target, **own)
        kuberay = self.folder / "share" / "kuberay"  # kustomize wants it beside what it changes
        shutil.copyfile(HERE / "config" / "kustomization.yaml", kuberay / "kustomization.yaml")
        lines = ["set -e"]
        for entry, value in SYSCTL.items():
            wish = self.run / "sysctl" / entry.replace("/", ".")
            wish.write_text(value + "\n")
            lines.append(f"mount --bind {wish} /proc/sys/{entry}")
        (self.run / "mounts.sh").write_text("\n".join([*lines, f"exec tail -f {self.run}/resolv.conf", ""]))
        shutil.rmtree(self.volumes, ignore_errors=True)
        for number in range(VOLUMES):
            volume = self.volumes / str(number)
            volume.mkdir(parents=True)
            volume.chmod(0o777)  # pods write as whichever user they run as

    def _configure(self, source: str, target: Path, **values: object) -> None:
        text = (HERE / "config" / source).read_text()
        target.write_text(string.Template(text).substitute(NODE=self.folder, **values))

    def _make_network(self) -> None:
        """A namespace with the nodes' addresses on a bridge, and no route but to services and pods."""
        _call("ip", "netns", "add", NETWORK)
        for command in (
            "ip link set lo up",
            "ip link add node0 type bridge",
            *(f"ip address add {kubelet.address}/24 dev node0" for kubelet in KUBELETS),
            "ip link set node0 up",
            f"ip route add {SERVICES} dev node0",
        ):
            _call(*self.in_network(command.split()))

    def _start_all(self, *names: str) -> None:
        for name in names:
            self.start_part(name)
            if name == "mounts":  # the others enter what it holds
                self._until(lambda: any(_mounted_sysctl(pid) for pid in self._pids("mounts")), "mounts")

    def _start_forwarder(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        with listener, (self.run / "forwarder.log").open("ab") as log:
            subprocess.Popen(
                self.in_network(
                    [sys.executable, str(HERE / "forward.py"), str(listener.fileno()), FIRST.address, str(API_PORT),
                     str(self.run)]
                ),
                pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            server = f"https://127.0.0.1:{listener.getsockname()[1]}"
        text = certificates.kubeconfig(self.pki, "admin", server, CONTEXT)
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(text)

    def _start_containerd(self, kubelet: Kubelet) -> None:
        """And forget the containers that an earlier run, or the first kubelet, left in its books; images stay."""
        part = f"containerd{kubelet.mark}"
        self.start_part(part)
        self._until(lambda: bool(self.ctr("version", kubelet=kubelet)), part)
        for container in self.ctr("containers", "list", "-q", kubelet=kubelet).split():
            self.ctr("containers", "rm", container, check=False, kubelet=kubelet)
        for sandbox in self.ctr("sandboxes", "list", check=False, kubelet=kubelet).splitlines()[1:]:
            self.ctr("sandboxes", "rm", "--force", sandbox.split()[0], check=False, kubelet=kubelet)

    def _apply_volumes(self) -> None:
        items = [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"node-{number}"},
                "spec": {
                    "capacity": {"storage": "20Gi"},
                    "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "storageClassName": "node",
                    "hostPath": {"path": str(self.volumes / str(number)), "type": "Directory"},
                },
            }
            for number in range(VOLUMES)
        ]
        path = self.run / "volumes.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        self.kubectl("apply", "--server-side", "-f", str(path))

    def free_volumes(self) -> None:
        """Empty the volumes whose claims are gone, and offer them again: no driver does it for folders."""
        for volume in json.loads(self.kubectl("get", "persistentvolumes", "-o", "json"))["items"]:
            if volume["status"].get("phase") != "Released":
                continue
            folder = Path(volume["spec"]["hostPath"]["path"])
            for inside in folder.iterdir():
                shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
            free = json.dumps({"spec": {"claimRef": None}})
            name = volume["metadata"]["name"]
            self.kubectl("patch", "persistentvolume", name, "--type=merge", f"--patch={free}")

    def _node(self, kubelet: Kubelet, path: str) -> str:
        """A field of its Node object, empty where there is none yet."""
        return self.kubectl("get", "node", kubelet.name, "-o", f"jsonpath={path}", check=False)

    def _until_ready(self, kubelet: Kubelet) -> None:
        ready = '{.status.conditions[?(@.type=="Ready")].status}'
        self._until(lambda: self._node(kubelet, ready) == "True", f"kubelet{kubelet.mark}")

    def _until(self, condition: Callable[[], bool], part: str) -> None:
        """Ask again and again; a condition that raises is one that does not hold yet."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(RuntimeError):
                if condition():
                    return
            time.sleep(0.1)
        log = self.run / f"{part}.log"
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(f"{part} is not ready after {PATIENCE_S:.0f} s; the end of {log}:\n{last}")

    def _pids(self, part: str) -> list[int]:
        """The running processes of a part, found by what they are, so that a crash hides none."""
        for kubelet in KUBELETS:
            if part == f"tasks{kubelet.mark}":
                inside = {pid for group in _cgroups() for pid in _members(group)}
                return sorted(pid for pid in inside if self._is_in_pod(kubelet, pid))
        return [pid for pid, words in _processes() if self._is(part, words)]

    def _is_in_pod(self, kubelet: Kubelet, pid: int) -> bool:
        """Whether its file system is one of this kubelet's: another containerd may use a cgroup of that name."""
        with suppress(OSError):
            return f"{self.storage(kubelet)}/" in Path(f"/proc/{pid}/mountinfo").read_text()
        return False

    def _is(self, part: str, words: list[str]) -> bool:
        if part == "forwarder":
            return words[-1] == str(self.run) and str(HERE / "forward.py") in words
        if part == "mounts":
            return words == ["tail", "-f", f"{self.run}/resolv.conf"]
        for kubelet in KUBELETS:
            if part == f"shims{kubelet.mark}":
                return Path(words[0]).name == "containerd-shim-runc-v2" and self._socket(kubelet) in words
        program = next(each.command[0] for each in self._parts() if each.name == part)
        # Two kubelets, and two containerds, are one program each: the first argument tells them apart.
        twins = [e.command[1] for e in self._parts() if e.command[0] == program and e.name != part]
        return words[0] == program and not (words[1:] and words[1] in twins)

    def _mounts(self) -> list[str]:
        with open("/proc/self/mounts") as table:
            paths = [line.split()[1] for line in table]
        return [path for path in reversed(paths) if path.startswith(f"{self.run}/")]

    def _unmount(self) -> None:
        for path in self._mounts():
            _call("umount", "--lazy", path, check=False)


class _Clock:
    """Says each stage with its seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.stages = say, dict[str, float]()
        self.began = self.last = time.monotonic()

    def stage(self, name: str, since: float | None = None) -> None:
        now = time.monotonic()
        self.stages[name] = round(now - (self.last if since is None else since), 1)
        self.last = now
        self.say(f"{name:15} {self.stages[name]:6.1f} s")


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                if words:
                    yield int(entry.name), words


def _mounted_sysctl(pid: int) -> bool:
    with suppress(OSError):
        return f"/proc/sys/{list(SYSCTL)[-1]} " in Path(f"/proc/{pid}/mounts").read_text()
    return False


def _cgroups() -> list[Path]:
    """The cgroups of pods in every hierarchy, the innermost first."""
    roots = [root / CGROUP for root in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir())]
    # os.walk passes over what is gone before it is looked at: pods end meanwhile.
    found = [Path(folder) for root in roots for folder, _, _ in os.walk(root)]
    return sorted(found, key=lambda path: -len(path.parts))


def _members(group: Path) -> list[int]:
    with suppress(OSError):
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    return []


def _remove_cgroups() -> None:
    """Those that nobody is in; the kernel lets go of one a moment after its last process has ended."""
    deadline = time.monotonic() + 10
    while groups := [group for group in _cgroups() if not _members(group)]:
        for group in groups:
            with suppress(OSError):
                group.rmdir()
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _linked(one: Path, two: Path, tries: int = 5) -> None:
    """Copy a folder that is in use, sharing its files. What is written once may be shared.

    A file may vanish meanwhile, as when containerd clears away after a pod: then all of it is copied again. Raises
    RuntimeError with what `cp` said the last time; there is nothing at ``two`` then.
    """
    for left in reversed(range(tries)):
        try:
            _call("cp", "--archive", "--link", str(one), str(two))
            return
        except RuntimeError:
            shutil.rmtree(two, ignore_errors=True)
            if not left:
                raise


def _call(*command: str, check: bool = True) -> str:
    """Run a command and return what it prints; with ``check`` raise RuntimeError with its last words."""
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} ... failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()
