"""The HTTP layer alone, over a backend without a model: shapes and statuses as the openai client and its
docs have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake import CONTEXT, WORDS, FakeBackend
from fastapi.testclient import TestClient

from labkit.serving.api import build_api

TEXT = "Call me Ishmael. Some years ago"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "who are you"}]}
PLAIN = {"model": "fake", "prompt": "who are you"}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def http(backend: FakeBackend) -> Iterator[TestClient]:
    broken = FakeBackend("broken", fail_after=2)
    with TestClient(build_api([backend, broken]), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


def error(response: httpx.Response) -> dict[str, Any]:
    """The error, once its shape is what OpenAI documents."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return dict(body["error"])


# Answers


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    [choice] = answer.choices
    assert (
        answer.object == "chat.completion" and answer.model == "fake" and answer.id.startswith("chatcmpl-")
    )
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        TEXT,
        "stop",
    )
    assert choice.logprobs is None
    assert answer.usage is not None and answer.usage.model_dump(
        include={"prompt_tokens", "completion_tokens"}
    ) == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
    }
    assert answer.usage.total_tokens == 11


def test_a_completion_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(**PLAIN, max_tokens=3)
    [choice] = answer.choices
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert (choice.text, choice.finish_reason) == ("Call me Ish", "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_a_chat_stream_has_role_pieces_reason_and_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert pieces == WORDS
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 9 + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 11
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_usage_does_not_mention_it(http: TestClient) -> None:
    lines = http.post("/v1/completions", json={**PLAIN, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == TEXT
    assert all("usage" not in event for event in events)


def test_chat_logprobs_streamed_and_whole_are_the_same(client: openai.OpenAI) -> None:
    ask = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = client.chat.completions.create(**ask).choices[0].logprobs
    assert whole is not None and whole.content is not None
    assert [entry.token for entry in whole.content] == WORDS[:3]
    assert [entry.logprob for entry in whole.content] == [0.0, -0.25, -0.5]
    assert whole.content[1].bytes == [32, 109, 101]  # " me"
    assert [(top.token, top.logprob) for top in whole.content[0].top_logprobs] == [
        ("w0", -0.5),
        ("w1", -1.5),
    ]
    streamed = [
        entry
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in whole.content]


def test_completion_logprobs_carry_offsets(client: openai.OpenAI) -> None:
    ask = {**PLAIN, "logprobs": 1, "max_tokens": 4}
    whole = client.completions.create(**ask).choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["Call", " me", " Ish", "mael"]
    assert whole.text_offset == [0, 4, 7, 11]
    assert whole.top_logprobs == [{"w0": -0.5}] * 4
    streamed = [c.choices[0].logprobs for c in client.completions.create(**ask, stream=True)]
    assert [offset for part in streamed if part for offset in part.text_offset or []] == [0, 4, 7, 11]


def test_models(client: openai.OpenAI, http: TestClient) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "broken"]
    assert client.models.retrieve("fake").created == FakeBackend.created
    assert http.get("/healthz").json()["models"]["fake"] == [
        {"running": 0, "waiting": 0, "finished": 0, "cancelled": 0}
    ]


# What reaches the engine


def test_openai_defaults(http: TestClient, backend: FakeBackend) -> None:
    http.post("/v1/chat/completions", json=CHAT)
    http.post("/v1/completions", json=PLAIN)
    chat, plain = backend.jobs
    sampling = {"temperature": 1.0, "top_p": 1.0, "seed": None, "stop": (), "logprobs": None}
    assert chat.sampling == plain.sampling == sampling
    assert (chat.max_tokens, plain.max_tokens) == (None, 16)
    assert chat.prompt == [{"role": "user", "content": "who are you"}] and plain.prompt == "who are you"


def test_every_option_reaches_the_engine(http: TestClient, backend: FakeBackend) -> None:
    options = {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": "x", "max_completion_tokens": 2}
    assert http.post("/v1/chat/completions", json={**CHAT, **options, "logprobs": True}).status_code == 200
    [job] = backend.jobs
    assert job.sampling == {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": ("x",), "logprobs": 0}
    assert job.max_tokens == 2


def test_content_parts_are_joined_and_developer_is_system(http: TestClient, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    http.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "developer", "content": parts}]})
    assert backend.jobs[0].prompt == [{"role": "system", "content": "be brief"}]


def test_token_ids_as_prompt(http: TestClient, backend: FakeBackend) -> None:
    assert (
        http.post("/v1/completions", json={**PLAIN, "prompt": [5, 6]}).json()["usage"]["prompt_tokens"] == 2
    )
    assert backend.jobs[0].prompt == [5, 6]


# Errors


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"max_token": 5}, "max_token", "Unknown field"),
        ({"tools": []}, "tools", "Unknown field"),
        ({"n": 2}, "n", "n must be 1"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None, "not both"),
        ({"top_logprobs": 2}, None, "logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stream_options": {"include_usage": True}}, None, "stream is true"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "no penalties"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages.0.role", "'system'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"model": None}, "model", "valid string"),
    ],
)
def test_bad_chat_requests_say_what_is_wrong(
    http: TestClient, change: dict[str, Any], param: str | None, says: str
) -> None:
    response = http.post("/v1/chat/completions", json={**CHAT, **change})
    found = error(response)
    assert (response.status_code, found["type"], found["param"]) == (400, "invalid_request_error", param)
    assert says in found["message"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ["a", "b"]}, "one prompt"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"echo": True}, "does not repeat"),
        ({"logprobs": 6}, "less than or equal to 5"),
        ({"messages": []}, "Unknown field"),
    ],
)
def test_bad_completion_requests_say_what_is_wrong(
    http: TestClient, change: dict[str, Any], says: str
) -> None:
    response = http.post("/v1/completions", json={**PLAIN, **change})
    assert response.status_code == 400 and says in error(response)["message"]


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(http: TestClient, missing: str) -> None:
    response = http.post("/v1/chat/completions", json={k: v for k, v in CHAT.items() if k != missing})
    assert response.status_code == 400
    assert (error(response)["code"], error(response)["param"]) == ("missing_required_parameter", missing)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"1", b"\xff\xfe", b"[" * 100_000, b'{"model":"fake","prompt":"\\ud800"}']
)
def test_bodies_that_are_no_request(http: TestClient, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_over_long_prompt_is_refused_before_the_stream(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake", prompt="a " * CONTEXT, max_tokens=1, stream=stream)
    assert refused.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "model_not_found" and "'fake'" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_unknown_urls_and_methods(http: TestClient) -> None:
    assert (http.get("/v1/nothing").status_code, error(http.get("/v1/nothing"))["code"]) == (
        404,
        "unknown_url",
    )
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, error(wrong)["code"]) == (405, "method_not_supported")


def test_a_failure_is_a_500_that_does_not_leak(http: TestClient) -> None:
    response = http.post("/v1/completions", json={**PLAIN, "model": "broken"})
    assert response.status_code == 500 and error(response)["type"] == "server_error"
    assert "secret" not in response.text


def test_a_failure_in_a_stream_is_an_error_for_the_client(client: openai.OpenAI) -> None:
    read = []
    with pytest.raises(openai.APIError, match="failed"):
        for chunk in client.completions.create(model="broken", prompt="a", stream=True):
            read.append(chunk.choices[0].text)
    assert read == WORDS[:2]


def test_equal_names_are_refused() -> None:
    with pytest.raises(ValueError, match="needs its own name"):
        build_api([FakeBackend(), FakeBackend()])


def test_the_alias_is_asked_for_and_the_name_answers() -> None:
    with TestClient(build_api([FakeBackend("lab@int4"), FakeBackend("other")])) as http:
        for asked in ("lab", "lab@int4"):
            for path, ask in [("completions", PLAIN), ("chat/completions", CHAT)]:
                answer = http.post(f"/v1/{path}", json={**ask, "model": asked})
                assert answer.status_code == 200 and answer.json()["model"] == "lab@int4"
            assert http.get(f"/v1/models/{asked}").json()["id"] == "lab@int4"
        missing = http.post("/v1/completions", json={**PLAIN, "model": "lab@fp32"})
        assert (
            missing.status_code == 404
            and "this server has 'lab@int4', 'other'" in error(missing)["message"]
        )
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["lab@int4", "other"]
        assert set(http.get("/healthz").json()["models"]) == {"lab@int4", "other"}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_name_the_model_that_gave_them_while_it_is_replaced(stream: bool) -> None:
    with TestClient(build_api([FakeBackend("lab@fp32", behind="lab@int4")])) as http:
        answer = http.post("/v1/completions", json={**PLAIN, "model": "lab", "stream": stream})
        assert answer.status_code == 200 and answer.text.count('"model":"lab@int4"') >= 1
        assert "fp32" not in answer.text
        gone = http.post("/v1/completions", json={**PLAIN, "model": "lab@fp32", "stream": stream})
        assert gone.status_code == 404 and error(gone)["code"] == "model_not_found"


def test_every_job_is_left(http: TestClient, backend: FakeBackend) -> None:
    for body in (PLAIN, {**PLAIN, "stream": True}, {**PLAIN, "max_tokens": 1}):
        http.post("/v1/completions", json=body)
    assert len(backend.jobs) == 3 and backend.open == 0
