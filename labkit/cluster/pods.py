"""The pods of a Ray cluster, as a namespace with pod security ``restricted`` admits them."""

from __future__ import annotations

import re
from copy import deepcopy
from importlib.metadata import version
from typing import Any

from labkit.cluster.profiles import Profile, Size

Manifest = dict[str, Any]

NAME, NAMESPACE = "lab", "bits-to-pods"
PART_OF = {"app.kubernetes.io/part-of": "bits-to-pods"}
PORT = 8000
USER = 10001  # the image's; restricted wants to see a number
HOME = "/home/lab"
CHECKPOINTS = "/checkpoints"
ACCOUNT = "ray"
SHM_MB, OBJECT_STORE_MB = 256, 100
# A worker that is to go leaves its Service first; then Ray is told, whose Serve actors do not end by themselves.
LEAVE_S, GRACE_S = 5, 10

# KubeRay's own limits (ray-operator, controllers/ray/utils/constant.go): it appends to the names it is given, and
# Kubernetes allows 63 characters.
LONGEST = {"RayCluster": 53, "RayService": 47, "RayJob": 47}

POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
# What may be written: Ray's logs and sockets, HOME, and shared memory for the object store.
TMP: Manifest = {"name": "tmp", "emptyDir": {}}
HOME_FOLDER: Manifest = {"name": "home", "emptyDir": {}}
SHM: Manifest = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_MB}Mi"}}
CLAIM: Manifest = {"name": "checkpoints", "persistentVolumeClaim": {"claimName": "checkpoints"}}
RAY_VOLUMES = (TMP, HOME_FOLDER, SHM, CLAIM)
MOUNTS = {"tmp": "/tmp", "home": HOME, "shm": "/dev/shm", "checkpoints": CHECKPOINTS}


def cluster_spec(
    profile: Profile,
    *,
    workers: int,
    serving: bool = False,
    redis: str | None = None,
    most_workers: int | None = None,
) -> Manifest:
    """The specification of a Ray cluster: a head that runs no replica, and workers that do.

    serving       its workers pass requests on, and are ready when they can
    redis         a Service and a Secret of this name: a Redis that keeps the head's state
    most_workers  let Ray's autoscaler have up to so many; None = always ``workers``
    """
    head, worker = _head(profile, serving), _worker(profile, serving)
    store = str(OBJECT_STORE_MB * 10**6)
    spec: Manifest = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "object-store-memory": store},
            "template": _template(head),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": most_workers or workers,
                "rayStartParams": {"num-cpus": str(profile.slots), "object-store-memory": store},
                "template": _template(worker),
            }
        ],
    }
    if redis is not None:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": f"{redis}:6379",
            "redisPassword": password(redis),
        }
    if most_workers is not None:
        # The operator makes an account for the autoscaler, which alone of all talks to the API server.
        del head["serviceAccountName"]
        head["automountServiceAccountToken"] = True
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "resources": profile.sidecar.resources(),
            "securityContext": deepcopy(CONTAINER_SECURITY),
            "volumeMounts": _mounts(TMP, HOME_FOLDER),
        }
    return spec


def submitter(profile: Profile) -> Manifest:
    """The template of the pod that hands a job to Ray and shows its output."""
    spec = pod(
        _container("ray-job-submitter", profile, profile.sidecar, TMP, HOME_FOLDER), TMP, HOME_FOLDER
    )
    return _template({"restartPolicy": "Never", **spec})


def pod(container: Manifest, *volumes: Manifest) -> Manifest:
    """The specification of a pod with this one container: a copy, so that who changes it changes nothing else."""
    spec: Manifest = {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": list(volumes),
    }
    return deepcopy(spec)


def password(secret: str) -> Manifest:
    """Where an environment variable takes it from."""
    return {"valueFrom": {"secretKeyRef": {"name": secret, "key": "password"}}}


def metadata(kind: str, name: str, namespace: str) -> Manifest:
    """Raises ValueError for a name that Kubernetes or KubeRay refuses."""
    check_name(kind, name)
    check_name("Namespace", namespace)
    return {"name": name, "namespace": namespace, "labels": dict(PART_OF)}


def check_name(kind: str, name: str) -> None:
    """Raises ValueError that says what is wrong with it."""
    longest = LONGEST.get(kind, 63)
    if len(name) > longest:
        raise ValueError(f"{kind} name {name!r} has {len(name)} characters; expected at most {longest}")
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(
            f"{kind} name {name!r}: expected small letters, digits and '-', a letter first and no '-' last"
        )


def _head(profile: Profile, serving: bool) -> Manifest:
    container = _container("ray-head", profile, profile.head, *RAY_VOLUMES)
    container["ports"] = _ports(serving, {"gcs-server": 6379, "dashboard": 8265})
    container["env"] = _env(serving)
    return {**pod(container, *RAY_VOLUMES), "terminationGracePeriodSeconds": GRACE_S}


def _worker(profile: Profile, serving: bool) -> Manifest:
    container = _container("ray-worker", profile, profile.worker, *RAY_VOLUMES)
    container["ports"] = _ports(serving, {})
    container["env"] = _env(serving)
    if serving:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": LEAVE_S}}}
        container["readinessProbe"] = {
            "httpGet": {"path": "/-/healthz", "port": "serve"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        }
    spec = {**pod(container, *RAY_VOLUMES), "terminationGracePeriodSeconds": LEAVE_S + GRACE_S}
    spec["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"ray.io/node-type": "worker"}},
            "matchLabelKeys": ["ray.io/cluster"],
        }
    ]
    if profile.worker.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return spec


def _container(name: str, profile: Profile, size: Size, *volumes: Manifest) -> Manifest:
    return {
        "name": name,
        "image": profile.image,
        "imagePullPolicy": profile.pull,
        "resources": size.resources(),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": _mounts(*volumes),
    }


def _env(serving: bool) -> list[Manifest]:
    values = {"RAY_USAGE_STATS_ENABLED": "0"}
    if serving:
        values["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    return [{"name": name, "value": value} for name, value in values.items()]


def _mounts(*volumes: Manifest) -> list[Manifest]:
    return [{"name": volume["name"], "mountPath": MOUNTS[volume["name"]]} for volume in volumes]


def _ports(serving: bool, others: dict[str, int]) -> list[Manifest]:
    ports = {**others, "metrics": 8080, **({"serve": PORT} if serving else {})}
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _template(spec: Manifest) -> Manifest:
    return {"metadata": {"labels": dict(PART_OF)}, "spec": spec}
