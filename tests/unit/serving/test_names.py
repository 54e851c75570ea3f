"""The name of a model and its alias: what a request may say, and what Ray Serve calls it."""

from __future__ import annotations

import pytest

from labkit.serving import Deployment
from labkit.serving.deployment import alias, distinct_names, is_called, serve_name


@pytest.mark.parametrize(
    ("name", "expected"), [("lab@int4", "lab"), ("lab", "lab"), ("org/lab@a@b", "org/lab"), ("a@", "a")]
)
def test_the_alias_is_what_stands_before_the_at(name: str, expected: str) -> None:
    assert alias(name) == expected


def test_a_request_may_say_the_alias_or_the_whole_name() -> None:
    assert is_called("lab@int4", "lab") and is_called("lab@int4", "lab@int4") and is_called("lab", "lab")
    for other in ("lab@fp32", "la", "lab@", "int4", "", "LAB", "lab@int4 "):
        assert not is_called("lab@int4", other)
    assert not is_called("lab", "lab@int4")


def test_one_alias_is_one_serve_deployment() -> None:
    assert serve_name("lab@fp32") == serve_name("lab@int4") == serve_name("lab") == "model-lab"
    assert serve_name("org/my.lab@1") == "model-org-my-lab"


def test_names_must_differ_in_their_aliases() -> None:
    assert distinct_names(["lab@int4", "tiny", "labs@int4"]) == ["lab@int4", "tiny", "labs@int4"]
    for names in (["lab", "lab"], ["lab@fp32", "lab@int4"], ["lab", "lab@int4"], ["a.b", "a-b"]):
        with pytest.raises(ValueError, match="its own name"):
            distinct_names(names)


def test_a_name_has_an_alias() -> None:
    with pytest.raises(ValueError, match="name"):
        Deployment(checkpoint="tiny", name="@int4")
