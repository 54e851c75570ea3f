"""Serve configurations that went wrong, made from good ones by a seeded program, and what Ray says of them."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from labkit.cluster import serve_config
from labkit.cluster.documents import Path, show

SEED = 20261125
GOOD: dict[str, Any] = {
    "proxy_location": "EveryNode",
    "http_options": {
        "host": "0.0.0.0",
        "port": 8000,
        "keep_alive_timeout_s": 60,
        "request_timeout_s": 30.0,
    },
    "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
    "logging_config": {"encoding": "JSON", "log_level": "INFO", "enable_access_log": False},
    "applications": [
        {
            "name": "lab",
            "route_prefix": "/",
            "import_path": "labkit.serving.app:build",
            "args": {"deployments": [{"checkpoint": "tiny"}]},
            "runtime_env": {
                "env_vars": {"OMP_NUM_THREADS": "1"},
                "working_dir": "https://example.org/a.zip",
            },
            "deployments": [
                {
                    "name": "scaled",
                    "num_replicas": "auto",
                    "max_ongoing_requests": 8,
                    "max_queued_requests": 64,
                    "autoscaling_config": {
                        "min_replicas": 1,
                        "initial_replicas": 2,
                        "max_replicas": 4,
                        "target_ongoing_requests": 2.0,
                        "upscale_delay_s": 3,
                        "downscale_delay_s": 30.0,
                    },
                    "health_check_period_s": 10,
                    "health_check_timeout_s": 30.0,
                    "graceful_shutdown_timeout_s": 20,
                    "ray_actor_options": {"num_cpus": 0.1, "resources": {"spot": 1}, "memory": 1e9},
                    "user_config": {"anything": ["goes"]},
                },
                {
                    "name": "fixed",
                    "num_replicas": 2,
                    "max_replicas_per_node": 1,
                    "logging_config": {"log_level": "DEBUG"},
                    "request_router_config": {"request_routing_stats_period_s": 5.0},
                    "rolling_update_percentage": 0.5,
                },
            ],
        },
        {
            "name": "sums",
            "route_prefix": "/sums",
            "import_path": "conditional.dag",
            "external_scaler_enabled": True,
            "deployments": [
                {
                    "name": "Adder",
                    "num_replicas": 4,
                    "placement_group_bundles": [{"CPU": 1}, {"CPU": 1}],
                    "placement_group_strategy": "PACK",
                },
                {"name": "Gang", "num_replicas": 4, "gang_scheduling_config": {"gang_size": 2}},
            ],
        },
    ],
}
# Keys whose content is the application's own: nobody knows better there.
_FREE = {"args", "user_config", "env_vars", "resources"}


def mutants(each: int, seed: int = SEED) -> list[tuple[str, str, dict[str, Any]]]:
    """(category, what was done, configuration), all different: ``each`` of a category, or as many as there are."""
    chance = random.Random(seed)
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for category, change in _CHANGES.items():
        full = len(found) + each
        for _ in range(20 * each):
            config = copy.deepcopy(GOOD)
            what = change(config, chance)
            if what and config != GOOD and len(found) < full:
                found.setdefault(repr(config), (category, what, config))
    return list(found.values())


def ray_refuses(config: dict[str, Any]) -> str | None:
    """Why Ray's own model refuses a configuration, or None."""
    from ray.serve.schema import ServeDeploySchema

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ServeDeploySchema.model_validate(copy.deepcopy(config))
        except Exception as error:  # pydantic's, and what Ray's validators let through
            return str(error)
    return None


def table(
    found: list[tuple[str, str, dict[str, Any]]],
) -> tuple[dict[str, Counter[str]], list[dict[str, str]]]:
    """Counts for each category of who refuses, and the mutants that only one of the two refuses."""
    counts: dict[str, Counter[str]] = {category: Counter() for category in _CHANGES}
    differing = []
    for category, what, config in found:
        ours, theirs = list(serve_config.violations(config)), ray_refuses(config)
        who = {
            (1, 1): "both refuse",
            (0, 0): "both accept",
            (1, 0): "only check refuses",
            (0, 1): "only Ray refuses",
        }[bool(ours), bool(theirs)]
        counts[category][who] += 1
        if who.startswith("only"):
            why = "; ".join(f"{show(path)}: {message}" for path, message in ours) or str(theirs)
            differing.append({"category": category, "what": what, "who": who, "why": why})
    return counts, differing


def _places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any, Any]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (*path, key), value, key, inner
        if key not in _FREE:
            yield from _places(inner, (*path, key))


def _misspelt(config: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, value = chance.choice([p for p in _places(config) if isinstance(p[1], dict)])
    if path[-2:-1] == ("placement_group_bundles",) or len(key) < 3:
        return None
    i = chance.randrange(len(key) - 1)
    new = chance.choice(
        [key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:], key.replace("_", "-"), key + "s", key.title()]
    )
    if new in owner:
        return None
    del owner[key]
    owner[new] = value
    return f"{show(path)} becomes {new}"


def _wrong_type(config: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, value = chance.choice(list(_places(config)))
    others: list[Any] = [
        7,
        0.5,
        True,
        "several",
        [],
        {},
        ["several"],
        {"several": "values"},
        None,
        str(value),
    ]
    owner[key] = chance.choice([other for other in others if type(other) is not type(value)])
    return f"{show(path)} becomes {owner[key]!r}"


def _out_of_range(config: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, value = chance.choice(
        [p for p in _places(config) if isinstance(p[3], int | float | str)]
    )
    if isinstance(value, bool):
        return None
    owner[key] = chance.choice(
        [-1, 0, -0.5, 1000] if not isinstance(value, str) else ["", "No Such", "/", "a:b:c"]
    )
    return f"{show(path)}: {value!r} becomes {owner[key]!r}"


def _missing(config: dict[str, Any], chance: random.Random) -> str | None:
    path, owner, key, _ = chance.choice(list(_places(config)))
    del owner[key]
    return f"{show(path)} is gone"


def _contradictory(config: dict[str, Any], chance: random.Random) -> str | None:
    lab, sums = config["applications"]
    scaled, fixed = lab["deployments"]
    adder, gang = sums["deployments"]
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("fixed and scaled", lambda: scaled.update(num_replicas=chance.choice([1, 3]))),
        ("max below min", lambda: scaled["autoscaling_config"].update(max_replicas=1, min_replicas=3)),
        ("initial above max", lambda: scaled["autoscaling_config"].update(initial_replicas=chance.choice([5, 9]))),
        ("initial below min", lambda: scaled["autoscaling_config"].update(initial_replicas=0)),
        ("two of a name", lambda: sums.update(name="lab")),
        ("two of a route", lambda: sums.update(route_prefix="/")),
        ("two deployments of a name", lambda: fixed.update(name="scaled")),
        ("a port of its own", lambda: lab.update(port=chance.choice([8000, 9000]))),
        ("a host of its own", lambda: lab.update(host="127.0.0.1")),
        ("bundles and a limit per node", lambda: adder.update(max_replicas_per_node=chance.choice([1, 2]))),
        ("bundles and a limit elsewhere", lambda: fixed.update(placement_group_bundles=[{"CPU": 1}])),
        ("a selector without bundles", lambda: fixed.update(placement_group_bundle_label_selector=[{"a": "b"}])),
        ("three selectors for two", lambda: adder.update(placement_group_bundle_label_selector=[{"a": "b"}] * 3)),
        ("a gang and a strategy", lambda: gang.update(placement_group_strategy="SPREAD")),
        ("a gang and a limit per node", lambda: gang.update(max_replicas_per_node=1)),
        ("no multiple of the gang", lambda: gang["gang_scheduling_config"].update(gang_size=chance.choice([3, 5]))),
        ("an outer scaler and our own", lambda: lab.update(external_scaler_enabled=True)),
        ("a queue of none", lambda: scaled.update(max_queued_requests=chance.choice([0, -2]))),
        ("half a certificate", lambda: config["http_options"].update(ssl_certfile="/tls/cert.pem")),
        ("the other half", lambda: config["http_options"].update(ssl_keyfile="/tls/key.pem")),
        ("a folder of this machine", lambda: lab["runtime_env"].update(working_dir=chance.choice([".", "/srv"]))),
        ("a module of this machine", lambda: lab["runtime_env"].update(py_modules=["./lab"])),
        ("a controller with packages", lambda: config.update(controller_options={"runtime_env": {"pip": ["x"]}})),
        ("a label that is none", lambda: scaled["ray_actor_options"].update(label_selector={"zone": "-a"})),
        ("a selector that is one", lambda: scaled["ray_actor_options"].update(label_selector={"zone": "!in(a, b)"})),
        ("all traces and more", lambda: config.update(tracing_config={"sampling_ratio": 1.5})),
        ("a level that is none", lambda: lab.update(logging_config={"log_level": "LOUD"})),
        ("a level by number", lambda: lab.update(logging_config={"log_level": chance.choice([10, 11])})),
        ("a capacity above all", lambda: config.update(target_capacity=chance.choice([101, 50]))),
        ("a policy not built yet",
         lambda: gang["gang_scheduling_config"].update(runtime_failure_policy="RESTART_REPLICA")),
    ]  # fmt: skip
    what, change = chance.choice(changes)
    change()
    return what


_CHANGES: dict[str, Callable[[dict[str, Any], random.Random], str | None]] = {
    "misspelt": _misspelt,
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "missing": _missing,
    "contradictory": _contradictory,
}
