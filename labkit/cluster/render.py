"""Kubernetes manifests from plain data: the same ``Deployment`` that runs on local Ray becomes a RayService.

Written for KubeRay 1.6 and a namespace that enforces pod security ``restricted``. Everything here is a dict as
Kubernetes takes it; ``labkit.cluster.annotate`` makes files of it, with a comment at each field that is not obvious.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import yaml

from labkit.cluster.pods import NAME, NAMESPACE, PORT, Manifest, cluster_spec, metadata, submitter
from labkit.cluster.profiles import PROFILES, Profile, profile_named
from labkit.cluster.surroundings import namespace_manifest, redis_manifests, redis_secret, surroundings
from labkit.serving.deployment import APP_NAME, INGRESS, Deployment, distinct_names, serve_name
from labkit.settings import DEFAULT_MODEL

__all__ = [
    "DEFAULT",
    "PROFILES",
    "Manifest",
    "Profile",
    "manifests",
    "namespace_manifest",
    "raycluster",
    "rayjob",
    "rayservice",
    "redis_secret",
    "serve_config",
    "surroundings",
]

DEFAULT = Deployment.model_validate({"checkpoint": DEFAULT_MODEL, "name": "lab@fp32", "threads": 1})
# How long requests that still run on a replica may take before it is ended; nothing waits where none run.
DRAIN_S = 300.0


# What is served


def serve_config(deployments: Sequence[Deployment], *, workers: int = 1) -> Manifest:
    """The content of ``serveConfigV2``: what Ray Serve is to run.

    workers: how many there are; replicas that can each have one of their own do.
    Raises ValueError where there is no deployment, or two share an alias.
    """
    if not deployments:
        raise ValueError("nothing to serve: give at least one Deployment")
    distinct_names(deployment.name for deployment in deployments)
    # As many ways in as the busiest model has replicas: the loss of a worker takes neither all models nor the way in.
    most = max(deployment.replicas for deployment in deployments)
    ingress = {"name": INGRESS, "num_replicas": most, "ray_actor_options": {"num_cpus": 0.1}}
    models = [
        {"name": serve_name(deployment.name), **_rollout(deployment.replicas, workers)}
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
                "args": {
                    "deployments": [
                        deployment.model_dump(exclude_defaults=True) for deployment in deployments
                    ]
                },
                "deployments": [{**ingress, **_rollout(most, workers)}, *models],
            }
        ],
    }


def _rollout(replicas: int, workers: int) -> Manifest:
    """How replicas come and go. The application itself starts new ones first; where each has a worker of its own
    there is no place for that, and they are replaced one at a time while the others answer.
    """
    apart = {"max_replicas_per_node": 1, "max_surge_percent": 0} if 1 < replicas <= workers else {}
    return {"graceful_shutdown_timeout_s": DRAIN_S, **apart}


# Ray on Kubernetes


def rayservice(
    deployments: Sequence[Deployment],
    profile: str | Profile = "base",
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    redis: bool = False,
    most_workers: int | None = None,
) -> Manifest:
    """A RayService that serves the deployments at the service ``<name>-serve-svc``, port 8000.

    redis         keep Ray's state in the Redis of ``redis_manifests``, so that the head may die without the
                  service; two workers then
    most_workers  let Ray's autoscaler add workers up to so many; None = the profile's number, always

    Raises ValueError for names that KubeRay refuses.
    """
    profile = profile_named(profile)
    workers = max(2, profile.workers) if redis else profile.workers
    about = metadata("RayService", name, namespace)
    if redis:
        about["annotations"] = {"ray.io/gcs-ft-deletion-timeout": "120"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": about,
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": profile.retire_s,
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": yaml.safe_dump(serve_config(deployments, workers=workers), sort_keys=False),
            "rayClusterConfig": cluster_spec(
                profile,
                workers=workers,
                serving=True,
                redis=f"{name}-redis" if redis else None,
                most_workers=most_workers,
            ),
        },
    }


def raycluster(
    profile: str | Profile = "base",
    *,
    name: str = NAME,
    namespace: str = NAMESPACE,
    workers: int | None = None,
    most_workers: int | None = None,
) -> Manifest:
    """A Ray cluster that jobs are submitted to.

    workers       None = the profile's
    most_workers  let Ray's autoscaler add some up to so many
    """
    profile = profile_named(profile)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata("RayCluster", name, namespace),
        "spec": cluster_spec(
            profile,
            workers=profile.workers if workers is None else workers,
            most_workers=most_workers,
        ),
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
        spec["submitterPodTemplate"] = submitter(profile)
        spec["submitterConfig"] = {"backoffLimit": 1}
    if cluster is None:
        spec["shutdownAfterJobFinishes"] = True
        spec["ttlSecondsAfterFinished"] = keep_s
        spec["rayClusterSpec"] = cluster_spec(profile, workers=workers)
    else:
        spec["clusterSelector"] = {"ray.io/cluster": cluster}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata("RayJob", name, namespace),
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
