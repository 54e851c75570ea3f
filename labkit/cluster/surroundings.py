"""What stands around Ray in a namespace: account, role, the claim for checkpoints, a Redis where one is wanted."""

from __future__ import annotations

import secrets

from labkit.cluster.pods import (
    ACCOUNT,
    CONTAINER_SECURITY,
    NAME,
    NAMESPACE,
    PART_OF,
    Manifest,
    check_name,
    metadata,
    password,
    pod,
)
from labkit.cluster.profiles import Profile, Size, profile_named

OPERATORS = "bits-to-pods-operators"  # a group of the cluster's own users, by whatever names them
LOOK = ["get", "list", "watch"]
CHANGE = [*LOOK, "create", "update", "patch", "delete"]


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
            "metadata": metadata("ServiceAccount", ACCOUNT, namespace),
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata("Role", "operator", namespace),
            "rules": [
                _rule("ray.io", ["rayservices", "rayclusters", "rayjobs"], CHANGE),
                _rule("", ["pods", "pods/log", "services", "events", "persistentvolumeclaims"], LOOK),
                _rule("batch", ["jobs"], LOOK),
                _rule("", ["pods"], ["delete"]),
                _rule("", ["pods/portforward"], ["get", "create"]),
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata("RoleBinding", "operator", namespace),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": OPERATORS}],
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": metadata("PersistentVolumeClaim", "checkpoints", namespace),
            "spec": claim,
        },
    ]


def namespace_manifest(namespace: str = NAMESPACE) -> Manifest:
    """The namespace, which admits only pods that are ``restricted``."""
    check_name("Namespace", namespace)
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
        "metadata": metadata("Secret", f"{name}-redis", namespace),
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
            'printf "requirepass %s\\ndir /data\\nappendonly yes\\n" "$REDIS_PASSWORD" > /data/redis.conf\n'
            "exec redis-server /data/redis.conf\n"
        ],
        "env": [{"name": "REDIS_PASSWORD", **password(redis)}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 2},
        "resources": Size("50m", "64Mi", "500m", "256Mi").resources(),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata("Deployment", redis, namespace),
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": {**labels, **PART_OF}},
                    "spec": pod(container, {"name": "data", "emptyDir": {}}),
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata("Service", redis, namespace),
            "spec": {"selector": labels, "ports": [{"name": "redis", "port": 6379}]},
        },
    ]


def _rule(group: str, resources: list[str], verbs: list[str]) -> Manifest:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}
