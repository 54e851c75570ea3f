"""What Kubernetes checks in code and its schemas do not say, as far as the lab's own kinds of manifest need it:
names and labels of every kind, pods and what holds a template of one, services, roles, ingresses, claims.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from labkit.cluster import names
from labkit.cluster.documents import Path
from labkit.cluster.structural import Violation

Manifest = dict[str, Any]
MISSING = "is missing, and is required here"


def metadata(manifest: Manifest) -> Iterator[Violation]:
    """Names, labels and annotations, which every kind has. ``manifest`` may be of any shape."""
    found = manifest.get("metadata", {})
    if not isinstance(found, dict):
        return  # has been complained of as no mapping
    if not found.get("name") and not found.get("generateName"):
        yield ("metadata", "name"), MISSING
    yield from _labels(found, ("metadata",))


def _labels(found: Manifest, path: Path) -> Iterator[Violation]:
    for key in ("labels", "annotations"):
        entries = found.get(key)
        for entry, value in entries.items() if isinstance(entries, dict) else ():
            wrong = names.label_key(entry if key == "labels" else entry.lower())
            if key == "labels" and isinstance(value, str):
                wrong = wrong or names.label_value(value)
            if wrong:
                yield (*path, key, entry), wrong


def violations(api_version: str, kind: str, manifest: Manifest) -> Iterator[Violation]:
    """What else the API server refuses in an object. ``manifest`` has passed its schema and ``metadata``."""
    group = api_version.rpartition("/")[0]
    name = manifest["metadata"].get("name")
    if name and (wrong := _name(group, kind, name)):
        yield ("metadata", "name"), wrong
    if (group, kind) in _RULES:
        yield from _RULES[group, kind](manifest)


def _name(group: str, kind: str, name: str) -> str | None:
    if group == "rbac.authorization.k8s.io":  # system:node is a good name there
        return (
            f"expected a name without / and %, found {name!r}" if re.search(r"[/%]|^\.\.?$", name) else None
        )
    if (group, kind) == ("", "Namespace"):
        return names.dns_label(name)
    if (group, kind) == ("", "Service"):
        return names.dns_label_1035(name)
    return names.dns_subdomain(name)


# Pods, and what holds a template of one -----------------------------------------------------------------------------


def _pod(manifest: Manifest) -> Iterator[Violation]:
    if "spec" not in manifest:
        yield ("spec",), MISSING
    else:
        yield from _pod_spec(manifest["spec"], ("spec",), ("Always", "OnFailure", "Never"))


def _workload(manifest: Manifest) -> Iterator[Violation]:
    """A Deployment, StatefulSet, DaemonSet or Job."""
    spec, path = manifest.get("spec"), ("spec", "template")
    if spec is None:
        yield ("spec",), MISSING
        return
    for key in (
        "replicas",
        "minReadySeconds",
        "revisionHistoryLimit",
        "backoffLimit",
        "parallelism",
        "completions",
    ):
        if spec.get(key, 0) < 0:
            yield ("spec", key), f"expected 0 or more, found {spec[key]}"
    template = spec.get("template", {})
    if manifest["kind"] != "Job":
        found = template.get("metadata", {}).get("labels", {})
        wanted = spec.get("selector", {}).get("matchLabels", {})
        if not wanted and not spec.get("selector", {}).get("matchExpressions"):
            yield ("spec", "selector"), "expected labels to select by, found none"
        for key, value in wanted.items():
            if found.get(key) != value:
                at = ("spec", "selector", "matchLabels", key)
                yield (
                    at,
                    f"the pods of the template have {key}: {found.get(key, 'nothing')!r}, not {value!r}",
                )
    yield from _labels(template.get("metadata", {}), (*path, "metadata"))
    if "spec" not in template:
        yield (*path, "spec"), MISSING
        return
    policies = ("OnFailure", "Never") if manifest["kind"] == "Job" else ("Always",)
    yield from _pod_spec(template["spec"], (*path, "spec"), policies)


def _pod_spec(spec: Manifest, path: Path, policies: tuple[str, ...]) -> Iterator[Violation]:
    policy = spec.get("restartPolicy") or "Always"
    if policy not in policies:
        yield (*path, "restartPolicy"), f"expected {' or '.join(policies)}, found {policy!r}"
    if not spec.get("containers"):
        yield (*path, "containers"), "expected at least one container"
    volumes = [volume.get("name", "") for volume in spec.get("volumes", [])]
    for i, volume in enumerate(spec.get("volumes", [])):
        if wrong := names.dns_label(volumes[i]):
            yield (*path, "volumes", i, "name"), wrong
        for kind, key in (("secret", "secretName"), ("configMap", "name"), ("hostPath", "path")):
            if kind in volume and not volume[kind].get(key):
                yield (*path, "volumes", i, kind, key), MISSING
    for kind in ("initContainers", "containers"):
        for i, container in enumerate(spec.get(kind, [])):
            yield from _container(container, (*path, kind, i), volumes)


def _container(container: Manifest, path: Path, volumes: list[str]) -> Iterator[Violation]:
    if wrong := names.dns_label(container["name"]):
        yield (*path, "name"), wrong
    if not container.get("image", "").strip():
        yield (*path, "image"), MISSING
    yield from _one_of(container, path, "imagePullPolicy", ("Always", "IfNotPresent", "Never"))
    for i, port in enumerate(container.get("ports", [])):
        at = (*path, "ports", i)
        yield from _port(port["containerPort"], (*at, "containerPort"))
        yield from _one_of(port, at, "protocol", ("TCP", "UDP", "SCTP"))
        if port.get("name") and (wrong := _port_name(port["name"])):
            yield (*at, "name"), wrong
    for i, mount in enumerate(container.get("volumeMounts", [])):
        if mount["name"] not in volumes:
            listed = ", ".join(volumes) or "none"
            yield (*path, "volumeMounts", i, "name"), f"no volume {mount['name']!r}; the pod has {listed}"
        if not mount["mountPath"]:
            yield (*path, "volumeMounts", i, "mountPath"), MISSING
    for i, variable in enumerate(container.get("env", [])):
        if not re.fullmatch(r"[ -<>-~]+", variable["name"]):
            yield (
                (*path, "env", i, "name"),
                f"expected printable characters without `=`, found {variable['name']!r}",
            )
    yield from _resources(container.get("resources", {}), (*path, "resources"))


def _resources(found: Manifest, path: Path) -> Iterator[Violation]:
    limits, requests = found.get("limits", {}), found.get("requests", {})
    for kind, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            if "/" not in name and not re.fullmatch(r"cpu|memory|ephemeral-storage|hugepages-.+", name):
                at = (*path, kind, name)
                yield at, f"expected cpu, memory, ephemeral-storage or vendor/name, found {name!r}"
            if quantity(amount) < 0:
                yield (*path, kind, name), f"expected 0 or more, found {amount}"
    for name in limits.keys() & requests.keys():
        if quantity(requests[name]) > quantity(limits[name]):
            yield (*path, "requests", name), f"{requests[name]} is above the limit {limits[name]}"


def quantity(text: str | int | float) -> float:
    """What a quantity such as ``500m`` or ``2Gi`` says, as a number: 0.5, 2147483648."""
    match = re.fullmatch(r"([+-]?[0-9.]+)(?:([numkMGTPE])(i?)|[eE]([+-]?[0-9]+))?", str(text))
    if not match:
        raise ValueError(f"expected a quantity such as 500m or 2Gi, found {text!r}")
    number, prefix, binary, exponent = match.groups()
    if exponent:
        return float(f"{number}e{exponent}")
    power = {"n": -3, "u": -2, "m": -1, None: 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}[
        prefix
    ]
    return float(number) * (1024 if binary else 1000) ** power


# Services, roles, ingresses, claims -----------------------------------------------------------------------------------


def _service(manifest: Manifest) -> Iterator[Violation]:
    spec = manifest.get("spec", {})
    yield from _one_of(spec, ("spec",), "type", ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"))
    ports = spec.get("ports", [])
    if not ports and spec.get("type") != "ExternalName" and spec.get("clusterIP") != "None":
        yield ("spec", "ports"), MISSING
    for i, port in enumerate(ports):
        at = ("spec", "ports", i)
        yield from _port(port["port"], (*at, "port"))
        yield from _one_of(port, at, "protocol", ("TCP", "UDP", "SCTP"))
        target = port.get("targetPort", port["port"])
        if isinstance(target, int):
            yield from _port(target, (*at, "targetPort")) if "targetPort" in port else ()
        elif wrong := _port_name(target):
            yield (*at, "targetPort"), wrong
        if "name" in port or len(ports) > 1:
            if not port.get("name"):
                if len(ports) > 1:
                    yield (*at, "name"), f"{MISSING}, since there are {len(ports)} ports"
            elif wrong := names.dns_label(port["name"]):
                yield (*at, "name"), wrong
    for key, value in spec.get("selector", {}).items():
        if wrong := names.label_key(key) or names.label_value(value):
            yield ("spec", "selector", key), wrong


def _role(manifest: Manifest) -> Iterator[Violation]:
    for i, rule in enumerate(manifest.get("rules", [])):
        if not rule.get("verbs"):
            yield ("rules", i, "verbs"), "expected at least one verb"
        for key in () if rule.get("nonResourceURLs") else ("apiGroups", "resources"):
            if not rule.get(key):
                yield (
                    ("rules", i, key),
                    "expected at least one" + (', "" for the core' if key == "apiGroups" else ""),
                )


def _role_binding(manifest: Manifest) -> Iterator[Violation]:
    role = manifest["roleRef"]
    if role.get("apiGroup", "") not in ("", "rbac.authorization.k8s.io"):
        yield ("roleRef", "apiGroup"), f"expected rbac.authorization.k8s.io, found {role['apiGroup']!r}"
    kinds = ("Role", "ClusterRole") if manifest["kind"] == "RoleBinding" else ("ClusterRole",)
    if role["kind"] not in kinds:
        yield ("roleRef", "kind"), f"expected {' or '.join(kinds)}, found {role['kind']!r}"
    if not role["name"]:
        yield ("roleRef", "name"), MISSING
    for i, subject in enumerate(manifest.get("subjects", [])):
        at = ("subjects", i)
        if subject["kind"] not in ("ServiceAccount", "User", "Group"):
            yield (*at, "kind"), f"expected ServiceAccount, User or Group, found {subject['kind']!r}"
        if not subject["name"]:
            yield (*at, "name"), MISSING
        elif subject["kind"] == "ServiceAccount":
            if wrong := names.dns_subdomain(subject["name"]):
                yield (*at, "name"), wrong
            if not subject.get("namespace") and manifest["kind"] == "ClusterRoleBinding":
                yield (*at, "namespace"), MISSING


def _ingress(manifest: Manifest) -> Iterator[Violation]:
    spec = manifest.get("spec", {})
    if not spec.get("rules") and not spec.get("defaultBackend"):
        yield ("spec",), "expected rules or defaultBackend, found neither"
    if "ingressClassName" in spec and (wrong := names.dns_subdomain(spec["ingressClassName"])):
        yield ("spec", "ingressClassName"), wrong
    for i, rule in enumerate(spec.get("rules", [])):
        if "http" in rule and not rule["http"]["paths"]:
            yield ("spec", "rules", i, "http", "paths"), "expected at least one path"
        for j, found in enumerate(rule.get("http", {}).get("paths", [])):
            at = ("spec", "rules", i, "http", "paths", j)
            kind, route = found["pathType"], found.get("path", "")
            if kind not in ("Exact", "Prefix", "ImplementationSpecific"):
                yield (*at, "pathType"), f"expected Exact, Prefix or ImplementationSpecific, found {kind!r}"
            if not route.startswith("/") and (route or kind != "ImplementationSpecific"):
                yield (*at, "path"), f"expected a path that begins with /, found {route!r}"
            yield from _backend(found["backend"], (*at, "backend"))


def _backend(backend: Manifest, path: Path) -> Iterator[Violation]:
    service = backend.get("service")
    if service is None:
        if "resource" not in backend:
            yield path, "expected a service or a resource, found neither"
        return
    if wrong := names.dns_label_1035(service["name"]):
        yield (*path, "service", "name"), wrong
    port = service.get("port", {})
    if ("name" in port) == (port.get("number", 0) != 0):
        yield (*path, "service", "port"), "expected a name or a number"
    elif "number" in port:
        yield from _port(port["number"], (*path, "service", "port", "number"))
    elif wrong := _port_name(port["name"]):
        yield (*path, "service", "port", "name"), wrong


def _claim(manifest: Manifest) -> Iterator[Violation]:
    spec = manifest.get("spec", {})
    modes = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
    if not spec.get("accessModes"):
        yield ("spec", "accessModes"), "expected at least one access mode"
    for i, mode in enumerate(spec.get("accessModes", [])):
        if mode not in modes:
            yield ("spec", "accessModes", i), f"expected one of {', '.join(modes)}; found {mode!r}"
    amount = spec.get("resources", {}).get("requests", {}).get("storage")
    at = ("spec", "resources", "requests", "storage")
    if amount is None:
        yield at, MISSING
    elif quantity(amount) <= 0:
        yield at, f"expected more than 0, found {amount}"


def _config(manifest: Manifest) -> Iterator[Violation]:
    """A ConfigMap or Secret."""
    for field in ("data", "binaryData", "stringData"):
        for key in manifest.get(field, {}):
            if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key) or key in (".", ".."):
                yield (
                    (field, key),
                    f"expected a file name of letters, digits, `-`, `_` and `.`; found {key!r}",
                )


_RULES: dict[tuple[str, str], Callable[[Manifest], Iterator[Violation]]] = {
    ("", "Pod"): _pod,
    ("apps", "Deployment"): _workload,
    ("apps", "StatefulSet"): _workload,
    ("apps", "DaemonSet"): _workload,
    ("batch", "Job"): _workload,
    ("", "Service"): _service,
    ("", "ConfigMap"): _config,
    ("", "Secret"): _config,
    ("", "PersistentVolumeClaim"): _claim,
    ("networking.k8s.io", "Ingress"): _ingress,
    ("rbac.authorization.k8s.io", "Role"): _role,
    ("rbac.authorization.k8s.io", "ClusterRole"): _role,
    ("rbac.authorization.k8s.io", "RoleBinding"): _role_binding,
    ("rbac.authorization.k8s.io", "ClusterRoleBinding"): _role_binding,
}


# What the rules above share -------------------------------------------------------------------------------------------


def _one_of(owner: Manifest, path: Path, key: str, values: tuple[str, ...]) -> Iterator[Violation]:
    if owner.get(key) and owner[key] not in values:
        yield (*path, key), f"expected one of {', '.join(values)}; found {owner[key]!r}"


def _port(number: int, path: Path) -> Iterator[Violation]:
    if not 1 <= number <= 65535:
        yield path, f"expected a port from 1 to 65535, found {number}"


def _port_name(name: str) -> str | None:
    good = re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and re.search(r"[a-z]", name) and len(name) <= 15
    return None if good else f"expected at most 15 small letters, digits and `-`, found {name!r}"
