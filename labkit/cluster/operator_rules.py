"""What the KubeRay operator 1.6.2 refuses although the API server takes it.

The operator reports such an object once, as an event ``InvalidRay...Spec`` or ``...Metadata``, and then leaves it
alone: nothing starts. The rules are those of its ``controllers/ray/utils/validation.go`` with its default
feature gates (deletion policy on, incremental upgrade off). Objects have passed the schema and have its defaults.
A RayCronJob is judged by its job; its schedule is not read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from labkit.cluster import names
from labkit.cluster.documents import Path
from labkit.cluster.structural import Violation

Manifest = dict[str, Any]

LONGEST_CLUSTER_NAME = 53
LONGEST_OWNER_NAME = 47  # RayService and RayJob: the operator adds six characters for their cluster
_RAY_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_DURATION = re.compile(
    r"[-+]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*"
)
_TOKENS_SINCE = (2, 52, 0)


def violations(kind: str, manifest: Manifest) -> Iterator[Violation]:
    """What the operator refuses in a RayCluster, RayService, RayJob or RayCronJob; nothing for other kinds."""
    if kind in _RULES:
        yield from _RULES[kind](manifest)


def _ray_cluster(manifest: Manifest) -> Iterator[Violation]:
    if _managed_elsewhere(manifest["spec"]):
        return
    yield from _name(manifest, LONGEST_CLUSTER_NAME)
    yield from _cluster(manifest["spec"], ("spec",), _annotations(manifest))


def _ray_service(manifest: Manifest) -> Iterator[Violation]:
    spec, path = manifest["spec"], ("spec",)
    if _managed_elsewhere(spec):
        return
    yield from _name(manifest, LONGEST_OWNER_NAME)
    timeout = _annotations(manifest).get("ray.io/initializing-timeout", "")
    if timeout and not _positive_duration(timeout):
        where = ("metadata", "annotations", "ray.io/initializing-timeout")
        yield where, f"expected a positive time such as 5m, or whole seconds; found {timeout!r}"
    cluster = spec.get("rayClusterConfig", {})
    inside = (*path, "rayClusterConfig")
    yield from _no_kubernetes_tokens(cluster, inside, "RayService")
    yield from _cluster(cluster, inside, _annotations(manifest))
    if cluster.get("headGroupSpec", {}).get("headService", {}).get("metadata", {}).get("name"):
        at = (*inside, "headGroupSpec", "headService", "metadata", "name")
        yield at, "the operator names a RayService's head service itself; leave the name out"
    yield from _not_negative(spec, path, "rayClusterDeletionDelaySeconds")


def _ray_job(manifest: Manifest) -> Iterator[Violation]:
    if _managed_elsewhere(manifest["spec"]):
        return
    yield from _name(manifest, LONGEST_OWNER_NAME)
    yield from _job(manifest["spec"], ("spec",), _annotations(manifest))


def _ray_cron_job(manifest: Manifest) -> Iterator[Violation]:
    yield from _job(manifest["spec"].get("jobTemplate", {}), ("spec", "jobTemplate"), {})


_RULES: dict[str, Callable[[Manifest], Iterator[Violation]]] = {
    "RayCluster": _ray_cluster,
    "RayService": _ray_service,
    "RayJob": _ray_job,
    "RayCronJob": _ray_cron_job,
}


def _managed_elsewhere(spec: Manifest) -> bool:
    """Kueue's objects: the operator does not look at them."""
    return spec.get("managedBy", "ray.io/kuberay-operator") != "ray.io/kuberay-operator"


def _annotations(manifest: Manifest) -> dict[str, str]:
    found: dict[str, str] = manifest["metadata"].get("annotations", {})
    return found


def _name(manifest: Manifest, longest: int) -> Iterator[Violation]:
    name = manifest["metadata"].get("name", "")
    if name and (wrong := names.dns_label_1035(name, longest)):
        yield ("metadata", "name"), f"the operator's rule for this kind: {wrong}"


# The cluster, which all four kinds have ---------------------------------------------------------------------------


def _cluster(spec: Manifest, path: Path, annotations: dict[str, str]) -> Iterator[Violation]:
    head, at_head = spec.get("headGroupSpec", {}), (*path, "headGroupSpec")
    workers = [
        (group, (*path, "workerGroupSpecs", i)) for i, group in enumerate(spec.get("workerGroupSpecs", []))
    ]
    autoscaling = spec.get("enableInTreeAutoscaling", False)
    for group, where in ((head, at_head), *workers):
        yield from _group(group, where)
        if not _containers(group):
            return  # what follows looks at the first container
    for group, where in workers:
        yield from _replicas(group, where)
        if group.get("suspend") and autoscaling:
            yield (*where, "suspend"), "a worker group cannot be suspended while the autoscaler is on"
        yield from _idle_timeout(group, where, spec)
    yield from _fault_tolerance(spec, path, annotations)
    yield from _autoscaler(spec, path, [(head, at_head), *workers])
    yield from _authentication(spec, path)


def _group(group: Manifest, path: Path) -> Iterator[Violation]:
    if not _containers(group):
        yield (*path, "template", "spec", "containers"), "expected at least one container"
    parameters = group.get("rayStartParams", {})
    doubled = [name for name in _RAY_RESOURCES if parameters.get(name)]
    if doubled and group.get("resources"):
        yield (
            (*path, "rayStartParams", doubled[0]),
            "resources are set here and in `resources`; set one of them",
        )
    if "labels" in parameters:
        yield (*path, "rayStartParams", "labels"), "labels go into the group's own `labels`"
    for key, wrong in names.labels(group.get("labels", {})).items():
        yield (*path, "labels", key), wrong


def _replicas(group: Manifest, path: Path) -> Iterator[Violation]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
    if least < 0:
        yield (*path, "minReplicas"), f"expected 0 or more, found {least}"
    if most < 0:
        yield (*path, "maxReplicas"), f"expected 0 or more, found {most}"
    elif least > most:
        yield (*path, "minReplicas"), f"minReplicas {least} is above maxReplicas {most}"


def _idle_timeout(group: Manifest, path: Path, spec: Manifest) -> Iterator[Violation]:
    yield from _not_negative(group, path, "idleTimeoutSeconds")
    if "idleTimeoutSeconds" in group and not (
        _version_2(spec) or _variable(spec, _AUTOSCALER_V2).get("value") in ("1", "true")
    ):
        yield (*path, "idleTimeoutSeconds"), "needs autoscalerOptions.version: v2"


def _fault_tolerance(spec: Manifest, path: Path, annotations: dict[str, str]) -> Iterator[Violation]:
    options = spec.get("gcsFaultToleranceOptions")
    head, parameters = (*path, "headGroupSpec"), spec["headGroupSpec"].get("rayStartParams", {})
    env = (*head, "template", "spec", "containers", 0, "env")
    enabled = annotations.get("ray.io/ft-enabled", "")
    instead = "gcsFaultToleranceOptions is set; say it there"
    if enabled and options is not None:
        yield ("metadata", "annotations", "ray.io/ft-enabled"), instead
    if _variable(spec, "RAY_REDIS_ADDRESS"):
        if options is not None:
            yield env, f"RAY_REDIS_ADDRESS stands here although {instead}, as redisAddress"
        elif enabled.lower() != "true":
            yield env, "RAY_REDIS_ADDRESS switches fault tolerance on; use gcsFaultToleranceOptions"
    if options is not None:
        if parameters.get("redis-password"):
            yield (*head, "rayStartParams", "redis-password"), f"{instead}, as redisPassword"
        if _variable(spec, "REDIS_PASSWORD"):
            yield env, f"REDIS_PASSWORD stands here although {instead}, as redisPassword"
        if annotations.get("ray.io/external-storage-namespace"):
            where = ("metadata", "annotations", "ray.io/external-storage-namespace")
            yield where, f"{instead}, as externalStorageNamespace"
    if parameters.get("redis-username"):
        yield (*head, "rayStartParams", "redis-username"), "use gcsFaultToleranceOptions.redisUsername"
    if _variable(spec, "REDIS_USERNAME"):
        yield env, "REDIS_USERNAME stands here; use gcsFaultToleranceOptions.redisUsername"


def _autoscaler(spec: Manifest, path: Path, groups: list[tuple[Manifest, Path]]) -> Iterator[Violation]:
    variable = _variable(spec, _AUTOSCALER_V2)
    env = (*path, "headGroupSpec", "template", "spec", "containers", 0, "env")
    options = spec.get("autoscalerOptions", {})
    if not spec.get("enableInTreeAutoscaling"):
        if variable.get("value") in ("1", "true"):
            yield env, f"{_AUTOSCALER_V2} needs enableInTreeAutoscaling: true"
    else:
        if "version" in options and variable:
            yield env, f"{_AUTOSCALER_V2} and autoscalerOptions.version are both set; keep the latter"
        for group, where in groups if _version_2(spec) else ():
            policy = group["template"]["spec"].get("restartPolicy", "")
            if policy not in ("", "Never"):
                at = (*where, "template", "spec", "restartPolicy")
                yield at, f"autoscaler v2 expects Never or nothing, found {policy}"
    yield from _not_negative(options, (*path, "autoscalerOptions"), "idleTimeoutSeconds")


def _authentication(spec: Manifest, path: Path) -> Iterator[Violation]:
    options, version = spec.get("authOptions", {}), spec.get("rayVersion", "")
    of_kubernetes = options.get("enableK8sTokenAuth", False)
    at = (*path, "rayVersion")
    if options.get("mode") != "token":
        if of_kubernetes:
            yield (*path, "authOptions", "enableK8sTokenAuth"), "needs authOptions.mode: token"
        return
    least = (2, 55, 0) if of_kubernetes else _TOKENS_SINCE
    found = _version(version)
    if found is None:
        yield at, f"token authentication needs a Ray version such as 2.60.0, found {version or 'none'!r}"
    elif found < least:
        yield (
            at,
            f"token authentication as set needs Ray {'.'.join(map(str, least))} or later, found {version}",
        )
    if of_kubernetes and options.get("secretName"):
        yield (*path, "authOptions", "secretName"), "has no place beside enableK8sTokenAuth"


# Jobs -------------------------------------------------------------------------------------------------------------


def _job(spec: Manifest, path: Path, annotations: dict[str, str]) -> Iterator[Violation]:
    mode, cluster = spec.get("submissionMode", "K8sJobMode"), spec.get("rayClusterSpec")
    selector, shutdown = spec.get("clusterSelector", {}), spec.get("shutdownAfterJobFinishes", False)
    retries = spec.get("backoffLimit", 0)
    if spec.get("suspend") and not shutdown:
        yield (*path, "suspend"), "needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and selector:
        yield (*path, "suspend"), "a job on an existing cluster (clusterSelector) cannot be suspended"
    yield from _not_negative(spec, path, "ttlSecondsAfterFinished")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield (*path, "ttlSecondsAfterFinished"), "needs shutdownAfterJobFinishes: true"
    yield from _deletion(spec, path)
    if cluster is None and not selector:
        yield path, "expected rayClusterSpec or clusterSelector, found neither"
    if selector and not selector.get("ray.io/cluster"):
        yield (*path, "clusterSelector"), "expected the key ray.io/cluster with the cluster's name"
    if selector and mode == "SidecarMode":
        yield (*path, "submissionMode"), "SidecarMode does not go with clusterSelector"
    if retries > 0 and (selector or mode == "InteractiveMode"):
        yield (*path, "backoffLimit"), f"does not go with {'clusterSelector' if selector else mode}"
    if retries < 0:
        yield (*path, "backoffLimit"), f"expected 0 or more, found {retries}"
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in spec:
                yield (*path, key), "SidecarMode has no submitter of its own"
        policy = ((cluster or {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})).get(
            "restartPolicy"
        )
        if policy not in (None, "", "Never"):
            where = (*path, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
            yield where, f"SidecarMode expects Never or nothing, found {policy}"
    if cluster is not None:
        yield from _no_kubernetes_tokens(cluster, (*path, "rayClusterSpec"), "RayJob")
        yield from _cluster(cluster, (*path, "rayClusterSpec"), annotations)
    yield from _runtime_env(spec, path)
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield (*path, key), f"expected more than 0, found {spec[key]}"


def _runtime_env(spec: Manifest, path: Path) -> Iterator[Violation]:
    try:
        found = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError as error:
        yield (*path, "runtimeEnvYAML"), f"is no YAML: {' '.join(str(error).split())}"
        return
    if found is not None and not isinstance(found, dict):
        yield (*path, "runtimeEnvYAML"), f"expected a mapping in YAML, found {type(found).__name__}"


_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def _deletion(spec: Manifest, path: Path) -> Iterator[Violation]:
    strategy, at = spec.get("deletionStrategy"), (*path, "deletionStrategy")
    if strategy is None:
        return
    old = [key for key in ("onSuccess", "onFailure") if key in strategy]
    rules = strategy.get("deletionRules", [])
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if rules and shutdown:
        yield (*at, "deletionRules"), "does not go with shutdownAfterJobFinishes: true; set one of them"
    if rules and old:
        yield (*at, "deletionRules"), f"does not go with {old[0]}; keep deletionRules"
    elif rules:
        yield from _deletion_rules(rules, (*at, "deletionRules"), spec)
    elif len(old) < 2:
        yield at, "expected deletionRules, or both onSuccess and onFailure"
    for key in old if not rules else ():
        policy = strategy[key].get("policy")
        if policy is None:
            yield (*at, key, "policy"), "is missing, and is required here"
        elif policy == "DeleteNone" and shutdown:
            yield (*at, key, "policy"), "DeleteNone contradicts shutdownAfterJobFinishes: true"
        elif wrong := _policy(policy, spec):
            yield (*at, key, "policy"), wrong


def _policy(policy: str, spec: Manifest) -> str | None:
    if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
        return f"{policy} does not go with clusterSelector: the cluster is not this job's"
    if policy == "DeleteWorkers" and spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling"):
        return "DeleteWorkers does not go with the autoscaler"
    return None


def _deletion_rules(rules: list[Manifest], path: Path, spec: Manifest) -> Iterator[Violation]:
    seconds: dict[tuple[str, str], dict[str, int]] = {}
    for i, rule in enumerate(rules):
        condition, policy = rule["condition"], rule["policy"]
        state = next(
            (key, condition[key]) for key in ("jobStatus", "jobDeploymentStatus") if key in condition
        )
        after = condition.get("ttlSeconds", 0)
        if after < 0:
            yield (*path, i, "condition", "ttlSeconds"), f"expected 0 or more, found {after}"
        elif wrong := _policy(policy, spec):
            yield (*path, i, "policy"), wrong
        elif policy in seconds.setdefault(state, {}):
            yield (*path, i), f"{policy} for {state[0]} {state[1]} stands in this list already"
        else:
            seconds[state][policy] = after
    for (_, state_name), times in seconds.items():
        given = [(policy, times[policy]) for policy in _ORDER if policy in times]
        for (earlier, first), (later, then) in itertools.pairwise(given):
            if then < first:
                yield (
                    path,
                    f"for {state_name}, {later} after {then} s would come before {earlier} after {first} s",
                )


# What the rules above share ---------------------------------------------------------------------------------------


def _containers(group: Manifest) -> list[Manifest]:
    found: list[Manifest] = group.get("template", {}).get("spec", {}).get("containers", [])
    return found


def _variable(spec: Manifest, name: str) -> Manifest:
    """An environment variable of the head's first container, or {}."""
    variables = _containers(spec["headGroupSpec"])[0].get("env", [])
    return next((variable for variable in variables if variable.get("name") == name), {})


def _version_2(spec: Manifest) -> bool:
    return bool(spec.get("autoscalerOptions", {}).get("version") == "v2")


def _version(text: str) -> tuple[int, ...] | None:
    match = re.match(r"\s*v?(\d+(?:\.\d+)+)", text)
    if not match or any(len(part) > 1 and part[0] == "0" for part in match[1].split(".")):
        return None
    parts = tuple(int(part) for part in match[1].split("."))
    return (*parts, 0, 0)[: max(3, len(parts))]


def _positive_duration(text: str) -> bool:
    if _DURATION.fullmatch(text):
        return not text.startswith("-") and bool(re.search(r"[1-9]", text))
    return bool(re.fullmatch(r"[-+]?\d+", text)) and int(text) > 0


def _not_negative(owner: Manifest, path: Path, key: str) -> Iterator[Violation]:
    if owner.get(key, 0) < 0:
        yield (*path, key), f"expected 0 or more, found {owner[key]}"


def _no_kubernetes_tokens(cluster: Manifest, path: Path, kind: str) -> Iterator[Violation]:
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield (*path, "authOptions", "enableK8sTokenAuth"), f"is not supported in a {kind}"
