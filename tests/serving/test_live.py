"""A live server on local Ray with the tiny model, called with the openai client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from server import until

from labkit.cluster.local import Endpoint, serve
from labkit.models import load
from labkit.serving import Deployment

LONG = 1500  # tokens: seconds of work, so that whatever is cancelled was not about to end anyway
PROMPTS = [
    "Call me",
    "The whale",
    "It was",
    "A ship",
    "In the sea",
    "Captain Ahab",
    "The harpoon",
    "Some years ago",
]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    twice = Deployment(checkpoint="tiny", replicas=2, threads=1)
    short = Deployment(checkpoint="tiny", name="short", threads=1, max_len=64)
    with serve(twice, short) as served:
        yield served


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the replicas need the cores
    yield load("tiny")
    torch.set_num_threads(threads)


def greedy(model: Any, prompt: str, count: int) -> str:
    """The likeliest continuation, by running the whole text again for each token: no engine, no cache."""
    ids = model.tokenizer.encode(prompt)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token in model.config.eos_ids:
                break
            ids.append(token)
    return str(model.tokenizer.decode(ids[start:]))


def total(endpoint: Endpoint, name: str, what: str) -> int:
    return sum(replica[what] for replica in endpoint.health()["models"][name])


def test_it_serves_what_was_asked_for(endpoint: Endpoint, client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", "short"] == endpoint.models
    replicas = {name: len(found) for name, found in endpoint.health()["models"].items()}
    assert replicas == {"tiny": 2, "short": 1}


def test_eight_streams_at_once_each_get_their_own_answer(endpoint: Endpoint, model: Any) -> None:
    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=32, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))

    before = [replica["finished"] for replica in endpoint.health()["models"]["tiny"]]
    assert asyncio.run(all_of_them()) == [greedy(model, prompt, 32) for prompt in PROMPTS]
    after = [replica["finished"] for replica in endpoint.health()["models"]["tiny"]]
    assert sum(after) - sum(before) == 8 and sorted(after) != sorted(before)
    assert all(count > 0 for count in after)


def test_chat_counts_the_template_and_streams_the_same_text(client: openai.OpenAI, model: Any) -> None:
    messages: Any = [{"role": "user", "content": "Who is Ahab?"}]
    ask: Any = {"model": "tiny", "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    answer = client.chat.completions.create(**ask)
    prompt = model.tokenizer.chat(messages)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(model.tokenizer.encode(prompt))
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)
    ]
    assert "".join(pieces) == answer.choices[0].message.content and sum(map(bool, pieces)) > 1


def test_seed_temperature_and_stop(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> openai.types.CompletionChoice:
        return client.completions.create(
            model="tiny", prompt="The whale", max_tokens=40, **options
        ).choices[0]

    assert (
        ask(seed=1).text == ask(seed=1).text != ask(seed=2).text
    )  # temperature is 1 where nothing is said
    greedy_text = ask(temperature=0).text
    assert ask(temperature=0).text == greedy_text
    word = greedy_text.split()[3]
    stopped = ask(temperature=0, stop=[word])
    assert (stopped.text, stopped.finish_reason) == (greedy_text[: greedy_text.index(word)], "stop")


def test_logprobs_are_the_models(client: openai.OpenAI, model: Any) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Call me", max_tokens=1, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.top_logprobs
    expected = model(torch.tensor([model.tokenizer.encode("Call me")]))[0, -1].log_softmax(-1).topk(3)
    assert list(found.top_logprobs[0].values()) == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert found.token_logprobs[0] == pytest.approx(float(expected.values[0]), abs=1e-4)


def test_errors_come_through_ray(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="large", prompt="a")
    assert missing.value.code == "model_not_found"
    for options in ({"prompt": [7] * 64}, {"prompt": [7] * 50, "max_tokens": 15}):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64") as long:
            client.completions.create(model="short", stream=True, **options)  # type: ignore[call-overload]
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model="tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="99999"):
        client.completions.create(model="tiny", prompt=[99999])
    with pytest.raises(openai.BadRequestError, match="Unknown field"):
        client.completions.create(model="tiny", prompt="a", extra_body={"best_of": 2})


def test_an_answer_ends_where_the_context_is_full(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="short", messages=[{"role": "user", "content": "Tell me all"}], temperature=0
    )
    assert chat.usage is not None and chat.usage.total_tokens <= 64
    assert chat.choices[0].finish_reason == ("length" if chat.usage.total_tokens == 64 else "stop")


def test_a_client_that_leaves_a_stream_frees_the_slot(endpoint: Endpoint, client: openai.OpenAI) -> None:
    before = total(endpoint, "tiny", "cancelled")
    stream = client.completions.create(
        model="tiny", prompt="Call me", max_tokens=LONG, temperature=0, stream=True
    )
    next(iter(stream))
    assert total(endpoint, "tiny", "running") == 1
    stream.close()
    until(lambda: total(endpoint, "tiny", "running") == 0, 20)
    assert total(endpoint, "tiny", "cancelled") == before + 1


def test_a_client_that_leaves_a_plain_request_frees_the_slot(endpoint: Endpoint) -> None:
    before = total(endpoint, "tiny", "cancelled")
    body = {"model": "tiny", "prompt": "Call me", "max_tokens": LONG, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endpoint.url}/completions", json=body, timeout=0.3)
    until(lambda: total(endpoint, "tiny", "cancelled") == before + 1, 20)
    assert total(endpoint, "tiny", "running") == 0


def test_one_ray_serves_one_endpoint(endpoint: Endpoint) -> None:
    with pytest.raises(RuntimeError, match="serves already"):
        serve(Deployment(checkpoint="tiny", name="another"))
    assert endpoint.health()["status"] == "ok"


def test_a_model_whose_replicas_die_says_so_and_comes_back(endpoint: Endpoint) -> None:
    body = {"model": "tiny", "prompt": "Call me", "max_tokens": LONG, "temperature": 0}
    caught: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: caught.append(httpx.post(f"{endpoint.url}/completions", json=body, timeout=120))
    )
    asking.start()
    until(lambda: total(endpoint, "tiny", "running") == 1, 20)
    replicas = [
        process
        for process in psutil.Process().children(recursive=True)
        if "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:labkit:model-tiny")
    ]
    assert len(replicas) == 2
    for replica in replicas:
        replica.kill()
    asking.join()
    assert caught[0].status_code == 503
    assert caught[0].json()["error"]["type"] == "server_error"

    def comes_back() -> bool:
        ask = {**body, "max_tokens": 1}
        again = httpx.post(f"{endpoint.url}/completions", json=ask, timeout=120).status_code
        assert again in (200, 503)
        return again == 200

    until(comes_back, 120)
    ask = {**body, "model": "short", "max_tokens": 1}
    assert httpx.post(f"{endpoint.url}/completions", json=ask, timeout=60).status_code == 200


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="its own name"):
        serve(Deployment(checkpoint="tiny"), Deployment(checkpoint="tiny"))
