"""No body, however odd, makes the server fail: every answer is 200 or an OpenAI-shaped 4xx."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake import FakeBackend
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.serving.api import build_api

HTTP = TestClient(build_api([FakeBackend()]), raise_server_exceptions=False)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])
BOUNDED = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])

# Half surrogate pairs are legal JSON (as \\ud800), so text is drawn from all code points.
text = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | anything,
        "content": text | anything,
    },
    optional={"name": anything},
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("fake") | anything,
    "prompt": text | st.lists(st.integers(0, 40), max_size=40) | anything,
    "messages": st.lists(message, max_size=3) | anything,
    "max_tokens": st.integers(-2, 40) | anything,
    "max_completion_tokens": st.integers(-2, 40) | anything,
    "temperature": st.floats(-1, 3) | anything,
    "top_p": st.floats(-1, 2) | anything,
    "seed": st.integers() | anything,
    "stop": text | st.lists(text, max_size=6) | anything,
    "stream": st.booleans() | anything,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | anything,
    "logprobs": st.booleans() | st.integers(-1, 7) | anything,
    "top_logprobs": st.integers(-1, 22) | anything,
    "n": st.integers(-1, 3) | anything,
    "echo": st.booleans(),
    "user": text,
}
# A likely body has the fields that are required; then a few more, each likely to be nearly right.
likely = st.fixed_dictionaries(
    {"model": FIELDS["model"]}, optional={k: v for k, v in FIELDS.items() if k != "model"}
)


def check(path: str, body: bytes) -> None:
    response = HTTP.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["type"] == "invalid_request_error"
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["usage"]["total_tokens"] >= 1


@BOUNDED
@given(PATHS, likely)
def test_nearly_right_requests(path: str, body: dict[str, Any]) -> None:
    check(path, json.dumps(body).encode())


@BOUNDED
@given(PATHS, anything)
def test_any_json(path: str, body: Any) -> None:
    check(path, json.dumps(body).encode())


@BOUNDED
@given(PATHS, st.binary(max_size=64))
def test_any_bytes(path: str, body: bytes) -> None:
    check(path, body)


@pytest.mark.parametrize("stream", [False, True])
@BOUNDED
@given(
    body=st.fixed_dictionaries(
        {}, optional={k: FIELDS[k] for k in ("max_tokens", "temperature", "seed", "stop")}
    )
)
def test_fields_of_an_otherwise_good_request(stream: bool, body: dict[str, Any]) -> None:
    check(
        "/v1/completions", json.dumps({"model": "fake", "prompt": "a b", "stream": stream, **body}).encode()
    )
