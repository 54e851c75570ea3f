"""A question to the served model, through the cluster's own service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Answer:
    """What came back. model: who answered; times in seconds from the question on, 0.0 until then."""

    model: str = ""
    text: str = ""
    pieces: int = 0
    first_s: float = 0.0
    whole_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)


def models(url: str) -> list[str]:
    """The names that requests may use. Raises RuntimeError where nothing answers at ``url``."""
    try:
        with _direct(30) as http:
            return [each["id"] for each in _good(http.get(f"{url}/v1/models")).json()["data"]]
    except httpx.HTTPError as error:
        raise RuntimeError(f"the service does not answer: {error}") from error


def ask(url: str, model: str, prompt: str, *, max_tokens: int = 64) -> Iterator[tuple[str, Answer]]:
    """Stream an answer: each piece of text with the answer so far.

    Raises RuntimeError with the server's own message where it refuses, or breaks off.
    """
    answer, start = Answer(), time.monotonic()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        with _direct() as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            for event in _events(_good(response)):
                answer.model = event.get("model") or answer.model
                answer.usage = event.get("usage") or answer.usage
                for choice in event.get("choices") or []:
                    piece = choice.get("delta", {}).get("content") or ""
                    if piece:
                        answer.first_s = answer.first_s or time.monotonic() - start
                        answer.text += piece
                        answer.pieces += 1
                        yield piece, answer
    except httpx.HTTPError as error:
        raise RuntimeError(f"the service broke off after {answer.pieces} pieces: {error}") from error
    answer.whole_s = time.monotonic() - start
    yield "", answer


def one_token(url: str, model: str, timeout: float = 60) -> str:
    """Ask for a single token; who answered. Raises RuntimeError where nobody does."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    try:
        with _direct(timeout) as http:
            return str(_good(http.post(f"{url}/v1/completions", json=body)).json()["model"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RuntimeError(f"no answer from {model!r}: {error}") from error


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(f"the model stopped: {event['error'].get('message', event['error'])}")
            yield event


def _good(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        try:
            said = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = response.text[:300]
        raise RuntimeError(f"the service answers {response.status_code}: {said}")
    return response


def _direct(timeout: float = 300) -> httpx.Client:
    """For 127.0.0.1, never by way of a proxy that the environment names."""
    return httpx.Client(timeout=timeout, trust_env=False)
