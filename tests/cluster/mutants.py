"""Manifests that went wrong, made from good ones by a seeded program: what `labkit cluster check` and a real
cluster are both asked about. The serveConfigV2 inside them stays whole; tests/unit/cluster has its own mutants.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from labkit.cluster.documents import Path, documents, show
from labkit.cluster.structural import schema_of

CATEGORIES = ("misspelt", "wrong type", "out of range", "missing", "contradictory")
SEED = 20261125


@dataclass(frozen=True)
class Sample:
    """One object of the operator's samples that there is a schema for."""

    source: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Mutant:
    source: str
    category: str
    what: str
    manifest: dict[str, Any]


def samples(folder: File) -> list[Sample]:
    """The objects in a folder of samples, without their namespace, each with a name."""
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        for i, document in enumerate(documents(file.read_text(encoding="utf-8"))):
            manifest = document.data
            if schema_of(f"{manifest.get('apiVersion')}/{manifest.get('kind')}") is None:
                continue
            manifest["metadata"].pop("namespace", None)
            if prefix := manifest["metadata"].pop("generateName", None):
                manifest["metadata"]["name"] = f"{prefix}1"
            found.append(Sample(f"{file.relative_to(folder)}#{i}", manifest))
    return found


def mutants(originals: list[Sample], count: int, seed: int = SEED) -> list[Mutant]:
    """``count`` mutants, all different, as many of each category."""
    chance = random.Random(seed)
    of_ray = [sample for sample in originals if sample.manifest["apiVersion"].startswith("ray.io/")]
    found: dict[str, Mutant] = {}
    while len(found) < count:
        category = CATEGORIES[len(found) % len(CATEGORIES)]
        sample = chance.choice(of_ray if category == "contradictory" else originals)
        manifest = copy.deepcopy(sample.manifest)
        what = _CHANGES[category](manifest, chance)
        if what is not None and manifest != sample.manifest:
            found.setdefault(repr(manifest), Mutant(sample.source, category, what, manifest))
    return list(found.values())


def _places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any, Any]]:
    """(path, owner, key, value) of all that may be changed: all but the kind, and the contents of files."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        if (*path, key) in (("apiVersion",), ("kind",)) or path in (("data",), ("stringData",)):
            continue
        yield (*path, key), value, key, inner
        yield from _places(inner, (*path, key))


def _rename(owner: dict[str, Any], key: str, new: str) -> None:
    items = [(new if name == key else name, value) for name, value in owner.items()]
    owner.clear()
    owner.update(items)


def _misspelt(manifest: dict[str, Any], chance: random.Random) -> str | None:
    places = [place for place in _places(manifest) if isinstance(place[1], dict) and len(str(place[2])) > 2]
    path, owner, key, _ = chance.choice(places)
    i = chance.randrange(len(key) - 1)
    new = chance.choice(
        [
            key[:i] + key[i + 1 :],
            key[:i] + key[i] + key[i:],
            key[:i] + key[i + 1] + key[i] + key[i + 2 :],
            key[:i] + key[i].swapcase() + key[i + 1 :],
            key + "s",
        ]
    )
    if new in owner:
        return None
    _rename(owner, key, new)
    return f"{show(path)} becomes {new}"


def _wrong_type(manifest: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, value = chance.choice(list(_places(manifest)))
    others: list[Any] = [7, 0.5, True, "several", [], {}, ["several"], {"several": "values"}, None]
    if isinstance(value, int) and not isinstance(value, bool):
        others.append(str(value))
    if isinstance(value, list | dict) and value:
        others.append(next(iter(value)))
    owner[key] = chance.choice([other for other in others if type(other) is not type(value)])
    return f"{show(path)}: {value if not isinstance(value, list | dict) else '...'} becomes {owner[key]!r}"


def _out_of_range(manifest: dict[str, Any], chance: random.Random) -> str | None:
    scalars = [place for place in _places(manifest) if isinstance(place[3], int | str)]
    numbers = [place for place in scalars if not isinstance(place[3], str | bool)]
    path, owner, key, value = chance.choice(numbers if numbers and chance.random() < 0.6 else scalars)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        owner[key] = chance.choice([-1, 0, 65536, 2**31, -(2**31) - 1, 2**63, 1.5])
    else:
        owner[key] = chance.choice(["", "Not Valid!", "x" * 300, value.upper(), "-1", "1e99x"])
    return f"{show(path)}: {str(value)[:40]!r} becomes {str(owner[key])[:40]!r}"


def _missing(manifest: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, _ = chance.choice(list(_places(manifest)))
    del owner[key]
    return f"{show(path)} is gone"


# Contradictions: each gets the cluster's spec, its head's first container, the job's or service's spec ---------------


def _contradictory(manifest: dict[str, Any], chance: random.Random) -> str | None:
    spec = manifest["spec"]
    job = spec.get("jobTemplate", spec)
    cluster = (
        job if manifest["kind"] == "RayCluster" else job.get("rayClusterConfig", job.get("rayClusterSpec"))
    )
    choices: list[Callable[..., None]] = []
    if cluster is not None:
        choices += _OF_A_CLUSTER
    choices += {"RayJob": _OF_A_JOB, "RayService": _OF_A_SERVICE}.get(manifest["kind"], [])
    if not choices:
        return None
    change = chance.choice(choices)
    try:
        change(manifest=manifest, spec=spec, cluster=cluster, chance=chance)
    except (KeyError, IndexError):
        return None  # the sample has no such part
    return change.__name__.strip("_").replace("_", " ")


def _head(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["headGroupSpec"]


def _container(cluster: dict[str, Any]) -> dict[str, Any]:
    return _head(cluster)["template"]["spec"]["containers"][0]


def _env(cluster: dict[str, Any], name: str, value: str) -> None:
    _container(cluster).setdefault("env", []).append({"name": name, "value": value})


def _fewest_above_most(cluster: dict[str, Any], **_: Any) -> None:
    cluster["workerGroupSpecs"][0] |= {"minReplicas": 5, "maxReplicas": 2}


def _negative_replicas(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["workerGroupSpecs"][-1][chance.choice(["minReplicas", "maxReplicas", "replicas"])] = -2


def _resources_twice(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    group = chance.choice([_head(cluster), *cluster.get("workerGroupSpecs", [])])
    group["rayStartParams"] = {**group.get("rayStartParams", {}), "num-cpus": "1"}
    group["resources"] = {"CPU": "1"}


def _labels_as_start_parameter(cluster: dict[str, Any], **_: Any) -> None:
    _head(cluster)["rayStartParams"] = {"labels": "zone=a"}


def _a_label_that_is_none(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    _head(cluster)["labels"] = chance.choice([{"zone": "a b"}, {"-zone": "a"}, {"ray.io/zone": "a"}])


def _no_container(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    group = chance.choice([_head(cluster), *cluster.get("workerGroupSpecs", [])])
    group["template"]["spec"]["containers"] = []


def _redis_by_variable(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    _env(cluster, chance.choice(["RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"]), "redis")


def _redis_twice(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    chance.choice(
        [
            lambda: _env(cluster, "RAY_REDIS_ADDRESS", "redis:6379"),
            lambda: _env(cluster, "REDIS_PASSWORD", "secret"),
            lambda: _head(cluster).update(rayStartParams={"redis-password": "secret"}),
            lambda: _head(cluster).update(rayStartParams={"redis-username": "ray"}),
        ]
    )()


def _fault_tolerance_by_annotation_too(manifest: dict[str, Any], cluster: dict[str, Any], **_: Any) -> None:
    manifest["metadata"].setdefault("annotations", {})["ray.io/ft-enabled"] = "true"
    cluster["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}


def _autoscaler_by_variable(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["enableInTreeAutoscaling"] = chance.choice([True, False])
    _env(cluster, "RAY_enable_autoscaler_v2", chance.choice(["1", "true", "0"]))


def _autoscaler_version_twice(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["enableInTreeAutoscaling"] = chance.choice([True, False])
    cluster["autoscalerOptions"] = {"version": chance.choice(["v1", "v2"])}
    _env(cluster, "RAY_enable_autoscaler_v2", "1")


def _restarts_under_autoscaler_v2(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster |= {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": chance.choice(["v1", "v2"])},
    }
    _head(cluster)["template"]["spec"]["restartPolicy"] = chance.choice(["Always", "OnFailure", "Never"])


def _idle_timeout_of_a_group(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["workerGroupSpecs"][0]["idleTimeoutSeconds"] = chance.choice([30, -30])
    cluster["enableInTreeAutoscaling"] = True
    cluster["autoscalerOptions"] = {"version": chance.choice(["v1", "v2"])}


def _negative_idle_timeout(cluster: dict[str, Any], **_: Any) -> None:
    cluster["autoscalerOptions"] = {**cluster.get("autoscalerOptions", {}), "idleTimeoutSeconds": -1}


def _suspended_group(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["enableInTreeAutoscaling"] = chance.choice([True, False])
    cluster["workerGroupSpecs"][0]["suspend"] = True


def _token_for_an_old_ray(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["authOptions"] = {"mode": chance.choice(["token", "disabled"])}
    cluster["rayVersion"] = chance.choice(
        ["2.51.1", "2.52.0", "2.9.0", "latest", "2", "v2.60.0", "2.060.0"]
    )


def _tokens_of_kubernetes(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    cluster["authOptions"] = {"enableK8sTokenAuth": True, "mode": chance.choice(["token", "disabled"])}
    if chance.random() < 0.5:
        cluster["authOptions"]["secretName"] = "token"
    cluster["rayVersion"] = chance.choice(["2.54.0", "2.55.0", "2.60.0"])


def _variable_twice(cluster: dict[str, Any], **_: Any) -> None:
    _container(cluster)["env"] = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]


def _port_twice(cluster: dict[str, Any], chance: random.Random, **_: Any) -> None:
    port = {"containerPort": 8265, "name": "dashboard"}
    _container(cluster)["ports"] = [
        port,
        {**port, "protocol": chance.choice(["TCP", "UDP"]), "name": "other"},
    ]


def _a_name_for_something_else(manifest: dict[str, Any], chance: random.Random, **_: Any) -> None:
    names = ["x" * 48, "x" * 54, "1-cluster", "my.cluster", "cluster-", "x" * 47, "x" * 64]
    manifest["metadata"]["name"] = chance.choice(names)


def _managed_by(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec["managedBy"] = chance.choice(["me", "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"])


def _upgrade(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    kinds = ["NewCluster", "None", "Recreate", "Rolling", "NewClusterWithIncrementalUpgrade"]
    spec["upgradeStrategy"] = {"type": chance.choice(kinds)}


def _suspended_job(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec |= {"suspend": True, "shutdownAfterJobFinishes": chance.choice([True, False])}


def _job_kept_and_timed(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec |= {
        "ttlSecondsAfterFinished": chance.choice([10, -10]),
        "shutdownAfterJobFinishes": chance.choice([True, False]),
    }


def _no_cluster_at_all(spec: dict[str, Any], **_: Any) -> None:
    spec.pop("rayClusterSpec")
    spec.pop("clusterSelector", None)


def _another_cluster(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec["clusterSelector"] = chance.choice(
        [{"ray.io/cluster": "there"}, {"ray.io/cluster": ""}, {"cluster": "there"}]
    )
    spec |= chance.choice([{"backoffLimit": 2}, {"submissionMode": "SidecarMode"}, {"suspend": True}, {}])


def _retries(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    modes = ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode", "OtherMode"]
    spec |= {"backoffLimit": chance.choice([2, -1, 0]), "submissionMode": chance.choice(modes)}


def _sidecar_and_submitter(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec["submissionMode"] = chance.choice(["SidecarMode", "K8sJobMode"])
    spec["submitterConfig"] = {"backoffLimit": 1}


def _a_deadline_in_the_past(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec[chance.choice(["activeDeadlineSeconds", "preRunningDeadlineSeconds"])] = chance.choice(
        [0, -1, 100]
    )


def _an_environment_that_is_none(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec["runtimeEnvYAML"] = chance.choice(
        ["pip: [", "- a\n- b\n", "pip", "env_vars:\n  A: b\n", "a: b\n c: d\n"]
    )


def _deleted_how(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    policy = {"policy": chance.choice(["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"])}
    rule = {**policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": chance.choice([0, 10, -1])}}
    later = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 5}}
    both = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}
    spec["shutdownAfterJobFinishes"] = chance.choice([True, False])
    spec.pop("ttlSecondsAfterFinished", None)
    spec["deletionStrategy"] = chance.choice(
        [
            {"onSuccess": policy, "onFailure": policy},
            {"onSuccess": policy},
            {"onSuccess": {}, "onFailure": policy},
            {"deletionRules": [rule, later]},
            {"deletionRules": [rule, rule]},
            {"deletionRules": [both]},
            {"deletionRules": [{**policy, "condition": {"ttlSeconds": 5}}]},
            {"deletionRules": [rule], "onFailure": policy},
            {},
        ]
    )


def _initializing_timeout(manifest: dict[str, Any], chance: random.Random, **_: Any) -> None:
    times = ["5m", "soon", "0", "-5m", "300", "1h30m", "5 m", "1.5h", "0s"]
    manifest["metadata"].setdefault("annotations", {})["ray.io/initializing-timeout"] = chance.choice(times)


def _head_service_of_its_own(cluster: dict[str, Any], **_: Any) -> None:
    _head(cluster)["headService"] = {"metadata": {"name": "mine"}}


def _negative_delay(spec: dict[str, Any], chance: random.Random, **_: Any) -> None:
    spec["rayClusterDeletionDelaySeconds"] = chance.choice([-1, 0, 30])


_OF_A_CLUSTER: list[Callable[..., None]] = [
    _fewest_above_most,
    _negative_replicas,
    _resources_twice,
    _labels_as_start_parameter,
    _a_label_that_is_none,
    _no_container,
    _redis_by_variable,
    _redis_twice,
    _fault_tolerance_by_annotation_too,
    _autoscaler_by_variable,
    _autoscaler_version_twice,
    _restarts_under_autoscaler_v2,
    _idle_timeout_of_a_group,
    _negative_idle_timeout,
    _suspended_group,
    _token_for_an_old_ray,
    _tokens_of_kubernetes,
    _variable_twice,
    _port_twice,
    _a_name_for_something_else,
    _managed_by,
    _upgrade,
]
_OF_A_JOB: list[Callable[..., None]] = [
    _suspended_job,
    _job_kept_and_timed,
    _no_cluster_at_all,
    _another_cluster,
    _retries,
    _sidecar_and_submitter,
    _a_deadline_in_the_past,
    _an_environment_that_is_none,
    _deleted_how,
    _deleted_how,
]
_OF_A_SERVICE: list[Callable[..., None]] = [
    _initializing_timeout,
    _head_service_of_its_own,
    _negative_delay,
]
_CHANGES: dict[str, Callable[[dict[str, Any], random.Random], str | None]] = {
    "misspelt": _misspelt,
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "missing": _missing,
    "contradictory": _contradictory,
}
