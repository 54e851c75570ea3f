"""The Serve configuration against Ray's own model as the referee: `check` refuses all that Ray refuses, and more."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from serve_mutants import GOOD, mutants, ray_refuses, table

from labkit.cluster import serve_config, structural
from labkit.cluster.documents import show

TOOL = Path(__file__).resolve().parents[3] / "tools" / "schemas.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schemas", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_that_of_the_installed_ray(tool: ModuleType) -> None:
    assert structural.load("serve") == tool.serve(), "run tools/schemas.py"


def test_every_schema_says_where_it_comes_from(tool: ModuleType) -> None:
    for name, module in (("kuberay", tool.KUBERAY), ("kubernetes", tool.KUBERNETES)):
        content = structural.load(name)
        assert (content["source"], content["version"]) == (f"Go module {module}", tool.VERSIONS[module])
        assert content["sum"].startswith("h1:")
        assert content["licence"] == "Apache-2.0"


def test_a_good_configuration_is_good_to_both() -> None:
    assert ray_refuses(GOOD) is None
    assert list(serve_config.violations(GOOD)) == []


def test_check_refuses_all_that_ray_refuses_and_what_ray_passes_over() -> None:
    counts, differing = table(mutants(each=40))
    for category, who in counts.items():
        print(f"{category:14}", dict(who))
    assert sum(sum(who.values()) for who in counts.values()) > 180
    assert [row for row in differing if row["who"] == "only Ray refuses"] == []
    passed_over = counts["misspelt"]["only check refuses"]
    assert passed_over > 20  # Ray took these, and would have run with its defaults instead
    assert counts["misspelt"]["both accept"] <= 2  # the name of a resource or an argument is anybody's


def one(deployment: dict[str, object]) -> dict[str, object]:
    return {"applications": [{"import_path": "a.b", "deployments": [{"name": "x", **deployment}]}]}


DEPLOYMENT = "applications[0].deployments[0]"
REFUSED_BY_CHECK_ALONE = [
    (one({"num_replica": 2}), f"{DEPLOYMENT}.num_replica"),
    (one({"autoscaling_config": {"max_replica": 2}}), f"{DEPLOYMENT}.autoscaling_config.max_replica"),
    (one({"ray_actor_options": {"num_cpu": 1}}), f"{DEPLOYMENT}.ray_actor_options.num_cpu"),
    (one({"max_ongoing_requests": "8"}), f"{DEPLOYMENT}.max_ongoing_requests"),
    ({"applications": [{"import_path": "a.b", "runtime_env": {"env_var": {}}}]}, "applications[0].runtime_env.env_var"),
    ({"application": [], "applications": []}, "application"),
    ({"http_options": {"prot": 8000}, "applications": []}, "http_options.prot"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "path"), REFUSED_BY_CHECK_ALONE)
def test_what_ray_would_have_passed_over(config: dict[str, object], path: str) -> None:
    assert ray_refuses(config) is None
    assert [show(where) for where, _ in serve_config.violations(config)] == [path]
