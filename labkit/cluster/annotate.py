"""Manifests as files of a kustomize folder, with comments that say why a field is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from labkit.cluster.pods import Manifest

FILES = {
    "Namespace": "namespace.yaml",
    "ServiceAccount": "rbac.yaml",
    "Role": "rbac.yaml",
    "RoleBinding": "rbac.yaml",
    "PersistentVolumeClaim": "checkpoints.yaml",
    "Deployment": "redis.yaml",
    "Service": "redis.yaml",
    "RayService": "rayservice.yaml",
    "RayCluster": "raycluster.yaml",
    "RayJob": "rayjob.yaml",
}

# What a line of the files begins with, and why it is there. It stands above the first such line of a file.
WHY = {
    "pod-security.kubernetes.io/enforce:": "Pods that could become root or leave their container are not admitted.",
    "kind: ServiceAccount": "The account of all Ray pods. It may do nothing.",
    "kind: Role": "For a person: see what runs and why, change what Ray runs, forward a port (by WebSocket: get).",
    "automountServiceAccountToken:": "Nothing in these pods has to talk to the API server.",
    "accessModes:": "Pods of several nodes read it, and a job writes it.",
    "ray.io/gcs-ft-deletion-timeout:": "Seconds in which the operator tries to clear a deleted Ray cluster's keys in\n"
    "Redis; 300 without this. Where namespace, Redis and all go at once, it cannot.",
    "upgradeStrategy:": "A change below rayClusterConfig makes a second Ray cluster and moves the service there\n"
    "when it is ready; a change of serveConfigV2 happens in place, replica by replica.",
    "rayClusterDeletionDelaySeconds:": "Streams that the old cluster still has may end after the move.",
    "excludeHeadPodFromServeSvc:": "The head passes no requests on, so that its death cuts none.",
    "rayVersion:": "The image's; the operator chooses probes and commands by it.",
    "authOptions:": "The operator makes a token for each Ray cluster: a Secret of the cluster's name, key\n"
    "auth_token. Without it, whoever reaches the dashboard's port could run code here.",
    "num-cpus: '0'": "No replica on the head: it may restart without one being lost.",
    "num-cpus: '4'": "What replicas and tasks are counted against. Twice what the replicas take: an update in\n"
    "place starts the new ones before it ends the old.",
    "num-cpus: '8'": "As in the other profiles: room for the new replicas beside the old.",
    "object-store-memory:": "Must fit /dev/shm, below; Ray would take 30 % of the memory.",
    "enableServiceLinks:": "Kubernetes would set a variable for each service, and Ray reads some (REDIS_…) as its own.",
    "readOnlyRootFilesystem:": "What must be written goes to the volumes.",
    "fsGroup:": "So that the volumes can be written.",
    "- name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "Serve gives its HTTP proxy 5 s, too few on a small CPU share.",
    "- name: serve": "The port of this name is what the operator's Service <name>-serve-svc leads to.",
    "lifecycle:": "The pod leaves the Service at once and goes on answering while that becomes known.",
    "path: /-/healthz": "The operator's own probe calls bash and wget each time; this asks Serve's proxy.\n"
    "A worker without a replica has no proxy and is not ready, which is right.",
    "terminationGracePeriodSeconds:": "Serve's actors do not end when Ray is told to: all of it would be waited for.",
    "topologySpreadConstraints:": "Workers of one Ray cluster on different nodes, where there are several.",
    "gcsFaultToleranceOptions:": "Ray's state outlives the head: workers go on answering and join the new one.",
    "submitterPodTemplate:": "The operator's own submitter would be refused in this namespace, and the job hang.",
    "strategy:": "Two Redis at once would each have half of the state.",
    "command:": "The password in a file: among the arguments, whoever lists the node's processes could read it.",
}


class _Dumper(yaml.SafeDumper):
    """Lists indented, texts of several lines as blocks, no references to what stood before."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def to_yaml(documents: Iterable[Manifest]) -> str:
    """The documents as one YAML text, each field of ``WHY`` with its comment where it first stands."""
    said: set[str] = set()
    return "---\n".join(_commented(document, said) for document in documents)


def _commented(document: Manifest, said: set[str]) -> str:
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    lines: list[str] = []
    block = None  # indentation of the key whose text of several lines this is
    for line in text.splitlines():
        bare = line.lstrip()
        indent = len(line) - len(bare)
        if block is not None and indent <= block and bare:
            block = None
        if block is None:
            for start, why in WHY.items():
                if start not in said and bare.startswith(start):
                    said.add(start)
                    lines += [f"{' ' * indent}# {part}" for part in why.splitlines()]
            if bare.endswith(": |"):
                block = indent
        lines.append(line)
    return "\n".join(lines) + "\n"


def files(documents: Iterable[Manifest]) -> dict[str, str]:
    """File names and texts of a kustomize folder with these documents."""
    grouped: dict[str, list[Manifest]] = {}
    for document in documents:
        grouped.setdefault(FILES[document["kind"]], []).append(document)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(grouped),
    }
    made = "# Written by `labkit cluster render`; change labkit/cluster/render.py, or patch it in an overlay.\n"
    texts = {name: made + to_yaml(documents) for name, documents in grouped.items()}
    return {"kustomization.yaml": made + to_yaml([kustomization]), **texts}


def write(folder: Path, documents: Iterable[Manifest]) -> list[Path]:
    """Write ``files`` into the folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files(documents).items():
        (folder / name).write_text(text)
        paths.append(folder / name)
    return paths
