"""Kubernetes manifests from plain data: the same ``Deployment`` that runs on local Ray becomes a RayService.

Written for KubeRay 1.6 and a namespace that enforces pod security ``restricted``. Everything here is a dict as
Kubernetes takes it; ``labkit.cluster.annotate`` makes files of it, with a comment at each field that is not obvious.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import yaml

from labkit.serving.deployment import (
    APP_NAME,
    INGRESS,
    Deployment,
    distinct_names,
    serve_name,
)
from labkit.settings import DEFAULT_MODEL

Manifest = dict[str, Any]

NAME, NAMESPACE = "lab", "bits-to-pods"
PART_OF = {"app.kubernetes.io/part-of": "bits-to-pods"}
PORT = 8000
USER = 10001  # the image's; restricted wants to see a number
HOME = "/home/lab"
CHECKPOINTS = "/checkpoints"
OPERATORS = "bits-to-pods-operators"
ACCOUNT = "ray"
SHM_MB, OBJECT_STORE_MB = 256, 100
DRAIN_S = 300.0
DEFAULT = Deployment.model_validate({"checkpoint": DEFAULT_MODEL, "name": "lab@fp32", "threads": 1})

# KubeRay's own limits (ray-operator, controllers/ray/utils/constant.go): it appends to the names it is given, and
# Kubernetes allows 63 characters.
LONGEST = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "Namespace": 63}


@dataclass(frozen=True)
class Size:
    """What a container reserves, and what it may use: Kubernetes quantities."""

    cpu: str
    memory: str
    cpu_limit: str
    memory_limit: str

    def resources(self, gpus: int = 0) -> Manifest:
        gpu = {"nvidia.com/gpu": str(gpus)} if gpus else {}
        return {
            "requests": {"cpu": self.cpu, "memory": self.memory, **gpu},
            "limits": {"cpu": self.cpu_limit, "memory": self.memory_limit, **gpu},
        }


@dataclass(frozen=True)
class Profile:
    """What differs between clusters.

    head, worker, submitter  what each pod's container reserves and may use
    slots          Ray's num-cpus of a worker: what replicas and tasks are counted against, not what they get
    image, pull    the server's image, and when the node fetches it
    redis_image    for ``redis=True``
    workers        worker pods
    gpus           GPUs of each worker
    storage_class  of the claim for checkpoints; None = the cluster's default
    access         its access mode: several nodes want ReadWriteMany
    storage        its size
    retire_s       how long the old Ray cluster stays after an upgrade to a new one, in seconds
    """

    name: str
    head: Size
    worker: Size
    submitter: Size
    slots: int
    image: str = "bits-to-pods/server:dev"
    pull: Literal["IfNotPresent", "Never", "Always"] = "IfNotPresent"
    redis_image: str = "redis:7.4"
    workers: int = 1
    gpus: int = 0
    storage_class: str | None = None
    access: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    storage: str = "5Gi"
    retire_s: int = 120


_SUBMITTER = Size("100m", "256Mi", "1", "1Gi")
_BASE = Profile(
    "base",
    head=Size("1", "2Gi", "2", "4Gi"),
    worker=Size("2", "3Gi", "4", "6Gi"),
    submitter=_SUBMITTER,
    slots=4,
)
PROFILES = {
    profile.name: profile
    for profile in (
        _BASE,
        # Two Ray clusters (an upgrade), the operator, CoreDNS and metrics-server fit 1.8 cores.
        Profile(
            "node",
            head=Size("200m", "768Mi", "2", "3Gi"),
            worker=Size("250m", "768Mi", "2", "5Gi"),
            submitter=Size("50m", "128Mi", "1", "1Gi"),
            slots=4,
            pull="Never",
            redis_image="bits-to-pods/redis:dev",
            storage_class="node",
            storage="1Gi",
            retire_s=30,
        ),
        Profile(
            "kind",
            head=Size("500m", "1Gi", "2", "3Gi"),
            worker=Size("1", "1536Mi", "4", "5Gi"),
            submitter=_SUBMITTER,
            slots=4,
            access="ReadWriteOnce",  # all that kind's own storage class offers, and enough on one node
            retire_s=60,
        ),
        Profile(
            "gpu",
            head=_BASE.head,
            worker=Size("4", "8Gi", "8", "16Gi"),
            submitter=_SUBMITTER,
            slots=8,
            gpus=1,
        ),
    )
}


def profile_named(profile: str | Profile) -> Profile:
    """The profile of that name. Raises ValueError that lists them."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    return PROFILES[profile]


# What is served


def serve_config(deployments: Sequence[Deployment]) -> Manifest:
    """The content of ``serveConfigV2``: what Ray Serve is to run.

    Raises ValueError where there is none, or two share an alias.
    """
    if not deployments:
        raise ValueError("nothing to serve: give at least one Deployment")
    distinct_names(deployment.name for deployment in deployments)
    args = [deployment.model_dump(exclude_defaults=True) for deployment in deployments]
    ingress = {
        "name": INGRESS,
        # As many as the busiest model has, so that the loss of one worker takes neither all models nor the way in.
        "num_replicas": max(deployment.replicas for deployment in deployments),
        "graceful_shutdown_timeout_s": DRAIN_S,
        "ray_actor_options": {"num_cpus": 0.1},
    }
    models = [
        {"name": serve_name(deployment.name), "graceful_shutdown_timeout_s": DRAIN_S}
        for deployment in deployments
    ]
    return {
        # Pods answer at their own address, so loopback, Serve's default, would be of no use.
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "proxy_location": "EveryNode",
        "logging_config": {"log_level": "INFO", "enable_access_log": False},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "labkit.serving.app:build",
                "args": {"deployments": args},
                "deployments": [ingress, *models],
            }
        ],
    }


# Ray on Kubernetes


def rayservice(
    deployments: Sequence[Deployment],
    profile: str | Profile = "base",
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    redis: bool = False,
) -> Manifest:
    """A RayService that serves the deployments at the service ``<name>-serve-svc``, port 8000.

    redis: keep Ray's state in the Redis of ``redis_manifests``, so that the head may die without the service; two
    workers then. Raises ValueError for names that KubeRay refuses.
    """
    profile = profile_named(profile)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": _metadata("RayService", name, namespace),
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": profile.retire_s,
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(serve_config(deployments), sort_keys=False),
            "rayClusterConfig": _cluster_spec(
                profile,
                workers=max(2, profile.workers) if redis else profile.workers,
                serving=True,
                redis=f"{name}-redis" if redis else None,
            ),
        },
    }


def raycluster(
    profile: str | Profile = "base",
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    workers: int | None = None,
) -> Manifest:
    """A Ray cluster that jobs are submitted to. workers: None = the profile's."""
    profile = profile_named(profile)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata("RayCluster", name, namespace),
        "spec": _cluster_spec(profile, workers=profile.workers if workers is None else workers),
    }


def rayjob(
    entrypoint: str,
    profile: str | Profile = "base",
    *,
    name: str = "job",
    namespace: str = NAMESPACE,
    mode: Literal["HTTPMode", "K8sJobMode"] = "HTTPMode",
    cluster: str | None = None,
    workers: int = 2,
    keep_s: int = 60,
    deadline_s: int = 3600,
) -> Manifest:
    """A command to run on Ray once.

    mode        HTTPMode: the operator submits it; K8sJobMode: a small pod does, and shows the output as its log
    cluster     an existing RayCluster's name; None = a cluster of its own with so many ``workers``
    keep_s      how long that cluster stays after the job's end, in seconds: its log is read from there
    deadline_s  after so many seconds the job is ended and counts as failed
    """
    profile = profile_named(profile)
    spec: Manifest = {"entrypoint": entrypoint, "submissionMode": mode, "activeDeadlineSeconds": deadline_s}
    if mode == "K8sJobMode":
        spec["submitterPodTemplate"] = _submitter(profile)
        spec["submitterConfig"] = {"backoffLimit": 1}
    if cluster is None:
        spec["shutdownAfterJobFinishes"] = True
        spec["ttlSecondsAfterFinished"] = keep_s
        spec["rayClusterSpec"] = _cluster_spec(profile, workers=workers)
    else:
        spec["clusterSelector"] = {"ray.io/cluster": cluster}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata("RayJob", name, namespace),
        "spec": spec,
    }


def manifests(
    deployments: Sequence[Deployment] = (DEFAULT,),
    profile: str | Profile = "base",
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    redis: bool = False,
) -> list[Manifest]:
    """Everything that serves the deployments, in the order in which it is applied.

    With ``redis`` the Secret that it names must exist first: ``redis_secret``.
    """
    profile = profile_named(profile)
    return [
        *surroundings(profile, namespace=namespace),
        *(redis_manifests(profile, name=name, namespace=namespace) if redis else ()),
        rayservice(deployments, profile, name=name, namespace=namespace, redis=redis),
    ]


# What stands around it


def surroundings(profile: str | Profile = "base", *, namespace: str = NAMESPACE) -> list[Manifest]:
    """Namespace, service account, the role of the person who operates, and the claim for checkpoints."""
    profile = profile_named(profile)
    claim: Manifest = {
        "accessModes": [profile.access],
        "resources": {"requests": {"storage": profile.storage}},
    }
    if profile.storage_class is not None:
        claim["storageClassName"] = profile.storage_class
    return [
        namespace_manifest(namespace),
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": _metadata("ServiceAccount", ACCOUNT, namespace),
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": _metadata("Role", "operator", namespace),
            "rules": [
                _rule("ray.io", ["rayservices", "rayclusters", "rayjobs"], _ALL),
                _rule("", ["pods", "pods/log", "services", "events", "persistentvolumeclaims"], _LOOK),
                _rule("batch", ["jobs"], _LOOK),
                _rule("", ["pods"], ["delete"]),
                _rule("", ["pods/portforward"], ["create"]),
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": _metadata("RoleBinding", "operator", namespace),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": OPERATORS}],
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": _metadata("PersistentVolumeClaim", "checkpoints", namespace),
            "spec": claim,
        },
    ]


def namespace_manifest(namespace: str = NAMESPACE) -> Manifest:
    """The namespace, which admits only pods that are ``restricted``."""
    _check_name("Namespace", namespace)
    restricted = {f"pod-security.kubernetes.io/{what}": "restricted" for what in ("enforce", "warn")}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": namespace, "labels": {**PART_OF, **restricted}},
    }


def redis_secret(*, name: str = NAME, namespace: str = NAMESPACE) -> Manifest:
    """A new password for ``redis_manifests``: to be created once and never applied again, since Redis and the head
    read it when they start.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata("Secret", f"{name}-redis", namespace),
        "stringData": {"password": secrets.token_urlsafe(32)},
    }


def redis_manifests(
    profile: str | Profile = "base", *, name: str = NAME, namespace: str = NAMESPACE
) -> list[Manifest]:
    """A Redis that outlives the head. It keeps its data for as long as its pod lives."""
    profile, redis = profile_named(profile), f"{name}-redis"
    labels = {"app.kubernetes.io/name": redis}
    container = {
        "name": "redis",
        "image": profile.redis_image,
        "imagePullPolicy": profile.pull,
        "command": ["sh", "-c"],
        "args": [
            'printf "requirepass %s\\ndir /data\\nappendonly yes\\n" "$REDIS_PASSWORD" | exec redis-server -'
        ],
        "env": [{"name": "REDIS_PASSWORD", **_password(redis)}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 2},
        "resources": Size("50m", "64Mi", "500m", "256Mi").resources(),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": _metadata("Deployment", redis, namespace),
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": {**labels, **PART_OF}},
                    "spec": _pod(container, [{"name": "data", "emptyDir": {}}]),
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata("Service", redis, namespace),
            "spec": {"selector": labels, "ports": [{"name": "redis", "port": 6379}]},
        },
    ]


# Parts

_LOOK = ["get", "list", "watch"]
_ALL = [*_LOOK, "create", "update", "patch", "delete"]
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def _cluster_spec(
    profile: Profile, *, workers: int, serving: bool = False, redis: str | None = None
) -> Manifest:
    head = _container("ray-head", profile, profile.head.resources())
    head["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "metrics", "containerPort": 8080},
        *([{"name": "serve", "containerPort": PORT}] if serving else ()),
    ]
    worker = _container("ray-worker", profile, profile.worker.resources(profile.gpus))
    worker["lifecycle"] = {"preStop": {"sleep": {"seconds": 5}}}
    worker["ports"] = [{"name": "metrics", "containerPort": 8080}]
    if serving:
        worker["ports"].append({"name": "serve", "containerPort": PORT})
        worker["readinessProbe"] = {
            "httpGet": {"path": "/-/healthz", "port": "serve"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        }
    worker_pod = _pod(worker, _volumes())
    worker_pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"ray.io/node-type": "worker"}},
            "matchLabelKeys": ["ray.io/cluster"],
        }
    ]
    if profile.gpus:
        worker_pod["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    store = str(OBJECT_STORE_MB * 10**6)
    spec: Manifest = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "object-store-memory": store},
            "template": {"metadata": {"labels": dict(PART_OF)}, "spec": _pod(head, _volumes())},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": workers,
                "rayStartParams": {"num-cpus": str(profile.slots), "object-store-memory": store},
                "template": {"metadata": {"labels": dict(PART_OF)}, "spec": worker_pod},
            }
        ],
    }
    if redis is not None:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": f"{redis}:6379",
            "redisPassword": _password(redis),
        }
    return spec


def _container(name: str, profile: Profile, resources: Manifest) -> Manifest:
    return {
        "name": name,
        "image": profile.image,
        "imagePullPolicy": profile.pull,
        "env": [
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "value": "60"},
        ],
        "resources": resources,
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": HOME},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "checkpoints", "mountPath": CHECKPOINTS},
        ],
    }


def _volumes() -> list[Manifest]:
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_MB}Mi"}},
        {"name": "checkpoints", "persistentVolumeClaim": {"claimName": "checkpoints"}},
    ]


def _submitter(profile: Profile) -> Manifest:
    container = {
        "name": "ray-job-submitter",
        "image": profile.image,
        "imagePullPolicy": profile.pull,
        "resources": profile.submitter.resources(),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}],
    }
    pod = _pod(container, [{"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}])
    return {"metadata": {"labels": dict(PART_OF)}, "spec": {"restartPolicy": "Never", **pod}}


def _pod(container: Manifest, volumes: list[Manifest]) -> Manifest:
    return {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": volumes,
    }


def _password(secret: str) -> Manifest:
    return {"valueFrom": {"secretKeyRef": {"name": secret, "key": "password"}}}


def _rule(group: str, resources: list[str], verbs: list[str]) -> Manifest:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


def _metadata(kind: str, name: str, namespace: str) -> Manifest:
    _check_name(kind, name)
    return {"name": name, "namespace": namespace, "labels": dict(PART_OF)}


def _check_name(kind: str, name: str) -> None:
    longest = LONGEST.get(kind, 63)
    if len(name) > longest:
        raise ValueError(f"{kind} name {name!r} has {len(name)} characters; expected at most {longest}")
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(
            f"{kind} name {name!r}: expected small letters, digits and '-', a letter first and no '-' last"
        )
