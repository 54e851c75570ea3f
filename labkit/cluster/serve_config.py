"""The ``serveConfigV2`` of a RayService, held against Ray's own model: the schema in ``schemas/serve.json.gz``
and here what Ray checks in Python. Stricter than Ray in this: a key that it does not know is an error, an
autoscaling configuration is read now and not when the application starts, and numbers are not written as text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from labkit.cluster import names, structural
from labkit.cluster.documents import Path
from labkit.cluster.structural import Violation

_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?(in)?\({_LABEL}(, ?{_LABEL})*\)|(!?{_LABEL})?")


def violations(config: Any) -> Iterator[Violation]:
    """What is wrong with a Serve configuration, given as plain data."""
    schema = structural.load("serve")["kinds"]["serveConfigV2"]
    shape = list(structural.violations(schema, config))
    yield from shape
    if shape:
        return  # the rules below rely on the shape
    applications = config["applications"]
    for key in ("name", "route_prefix"):
        default = "default" if key == "name" else "/"
        given = [application.get(key, default) for application in applications]
        yield from _twice(given, ("applications",), key)
    for i, application in enumerate(applications):
        yield from _application(application, ("applications", i))
    http = config.get("http_options", {})
    for key, other in (("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")):
        if http.get(key) and not http.get(other):
            yield ("http_options", key), f"needs {other} beside it"


def _application(application: dict[str, Any], path: Path) -> Iterator[Violation]:
    if application.get("name") == "":
        yield (*path, "name"), "expected a name, found an empty text"
    route = application.get("route_prefix", "/")
    if route is not None and (not route.startswith("/") or (route.endswith("/") and route != "/")):
        yield (
            (*path, "route_prefix"),
            f"expected a path such as /lab, without a slash at its end; found {route!r}",
        )
    if wrong := _import_path(application["import_path"]):
        yield (*path, "import_path"), wrong
    for key in ("host", "port"):
        if key in application:
            yield (*path, key), "is set for all applications together, under http_options"
    deployments = application.get("deployments", [])
    yield from _twice([deployment["name"] for deployment in deployments], (*path, "deployments"), "name")
    for i, deployment in enumerate(deployments):
        at = (*path, "deployments", i)
        yield from _deployment(deployment, at)
        if application.get("external_scaler_enabled") and _autoscales(deployment):
            yield at, "autoscales although the application has external_scaler_enabled; keep one of them"


def _twice(given: list[Any], path: Path, key: str) -> Iterator[Violation]:
    for value, count in Counter(given).items():
        if count > 1 and value is not None:
            last = len(given) - 1 - given[::-1].index(value)
            yield (*path, last, key), f"{value!r} stands {count} times; each needs its own"


def _import_path(path: str) -> str | None:
    mark = ":" if ":" in path else "."
    parts = path.split(mark)
    if len(parts) < 2 or not parts[0] or not parts[-1] or (mark == ":" and len(parts) > 2):
        return f"expected module:name or module.name, found {path!r}"
    return None


def _autoscales(deployment: dict[str, Any]) -> bool:
    return deployment.get("num_replicas") == "auto" or deployment.get("autoscaling_config") is not None


def _deployment(deployment: dict[str, Any], path: Path) -> Iterator[Violation]:
    replicas, scaling = deployment.get("num_replicas"), deployment.get("autoscaling_config")
    if isinstance(replicas, int) and scaling is not None:
        yield (*path, "num_replicas"), "is set beside autoscaling_config; keep one of them, or say auto"
    if scaling is not None:
        yield from _autoscaling(scaling, (*path, "autoscaling_config"))
    queued = deployment.get("max_queued_requests", -1)
    if queued < 1 and queued != -1:
        yield (*path, "max_queued_requests"), f"expected -1 (no limit) or more than 0, found {queued}"
    yield from _placement(deployment, path)
    for key, value in (deployment.get("ray_actor_options", {}).get("label_selector") or {}).items():
        wrong = names.label_key(key) or (None if _SELECTOR.fullmatch(value) else f"no selector: {value!r}")
        if wrong:
            yield (*path, "ray_actor_options", "label_selector", key), wrong


def _autoscaling(config: dict[str, Any], path: Path) -> Iterator[Violation]:
    least, most = config.get("min_replicas", 1), config.get("max_replicas", 1)
    first = config.get("initial_replicas")
    if most < least:
        yield (*path, "max_replicas"), f"max_replicas {most} is below min_replicas {least}"
    elif first is not None and not least <= first <= most:
        yield (*path, "initial_replicas"), f"expected {least} to {most}, found {first}"


def _placement(deployment: dict[str, Any], path: Path) -> Iterator[Violation]:
    bundles, gang = deployment.get("placement_group_bundles"), deployment.get("gang_scheduling_config")
    if "max_replicas_per_node" in deployment and (bundles is not None or gang is not None):
        other = "placement_group_bundles" if bundles is not None else "gang_scheduling_config"
        yield (*path, "max_replicas_per_node"), f"does not go with {other}"
    selectors = deployment.get("placement_group_bundle_label_selector")
    if selectors is not None:
        at = (*path, "placement_group_bundle_label_selector")
        if bundles is None:
            yield at, "needs placement_group_bundles"
        elif len(selectors) not in (1, len(bundles)):
            yield (
                at,
                f"expected one selector or one for each of {len(bundles)} bundles, found {len(selectors)}",
            )
    if gang is None:
        return
    if "placement_group_strategy" in deployment:
        yield (*path, "placement_group_strategy"), "use gang_scheduling_config.gang_placement_strategy"
    scaling = deployment.get("autoscaling_config") or {}
    given: list[tuple[Path, Any]] = [(("num_replicas",), deployment.get("num_replicas"))]
    for key in ("min_replicas", "max_replicas", "initial_replicas"):
        given.append((("autoscaling_config", key), scaling.get(key)))
    for where, count in given:
        if isinstance(count, int) and count % gang["gang_size"]:
            yield (*path, *where), f"expected a multiple of gang_size {gang['gang_size']}, found {count}"
