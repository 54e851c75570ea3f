"""The OpenAI API over HTTP: routes, server-sent events and error shapes. It knows backends, not engines,
not Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from labkit.serving.backend import (
    MODEL_NOT_FOUND,
    Accepted,
    Backend,
    Event,
    Finished,
    Job,
    Refused,
    Unavailable,
)
from labkit.serving.deployment import distinct_names, is_called
from labkit.serving.schema import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    ErrorBody,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from labkit.serving.stream import Token

HEALTH_TIMEOUT_S = 5.0
logger = logging.getLogger(__name__)


class APIError(Exception):
    """An answer that is an error, in the shape the OpenAI clients turn into their own exceptions."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorResponse(
            error=ErrorBody(message=message, type=type, code=code, param=param)
        ).model_dump()


class ASCIIResponse(Response):
    """JSON in ASCII: whatever a request contained, half a surrogate pair included, can be quoted back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _json(content).encode("ascii")


def build_api(backends: Iterable[Backend]) -> FastAPI:
    """The whole API for these models: an ordinary FastAPI application.

    ``/v1/models``, ``/v1/models/{id}``, ``/v1/completions``, ``/v1/chat/completions`` and ``/healthz``.
    A request asks for a model by its name or its alias; answers carry the name.
    Raises ValueError when that could mean two models.
    """
    backends = list(backends)
    names = distinct_names([backend.name for backend in backends])

    def find(asked: str) -> Backend:
        for backend in backends:
            if is_called(backend.name, asked):
                return backend
        has = ", ".join(map(repr, names)) or "no model"
        raise APIError(
            404,
            f"The model {asked!r} does not exist; this server has {has}",
            code=MODEL_NOT_FOUND,
            param="model",
        )

    api = FastAPI(title="labkit", description="OpenAI-compatible", default_response_class=ASCIIResponse)
    _answer_errors_in_openai_shape(api)

    @api.get("/healthz")
    async def healthz() -> Response:
        """200 and how busy each replica is, or 503 where a model does not answer."""
        found = await asyncio.gather(*(_states(backend) for backend in backends))
        state = dict(zip(names, found, strict=True))
        healthy = all(state.values())
        body = {"status": "ok" if healthy else "unavailable", "models": state}
        return ASCIIResponse(body, status_code=200 if healthy else 503)

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[_card(backend) for backend in backends])

    @api.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelCard:
        return _card(find(model))

    @api.post("/v1/completions", response_model=CompletionResponse)
    async def completions(request: CompletionRequest) -> Response:
        job = Job(request.model, request.prompt, request.sampling(), request.token_limit)
        return await _answer(find(request.model), job, CompletionShape, request)

    @api.post("/v1/chat/completions", response_model=ChatResponse)
    async def chat_completions(request: ChatRequest) -> Response:
        messages = [message.plain() for message in request.messages]
        job = Job(request.model, messages, request.sampling(), request.token_limit)
        return await _answer(find(request.model), job, ChatShape, request)

    return api


class Shape:
    """How one request's answer looks, whole and in chunks."""

    id_prefix = ""
    chunk_object = ""

    def __init__(self, request: CompletionRequest | ChatRequest, model: str) -> None:
        self.request = request
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        body = {**self._head, "object": self.chunk_object, "choices": choices}
        if self.request.include_usage:
            body["usage"] = usage and usage.model_dump()
        return body

    def opening(self) -> list[dict[str, Any]]:
        """Choices of a chunk that comes before the first token, or none."""
        return []

    def piece(self, token: Token) -> list[dict[str, Any]]:
        """Choices of a token's chunk; none when there is nothing to tell yet."""
        raise NotImplementedError

    def closing(self, reason: str) -> list[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, tokens: list[Token], reason: str, usage: Usage) -> BaseModel:
        raise NotImplementedError


class ChatShape(Shape):
    id_prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [_choice(delta={"role": "assistant", "content": ""})]

    def piece(self, token: Token) -> list[dict[str, Any]]:
        logprobs = self._logprobs([token])
        if not token.text and not (logprobs and logprobs.content):
            return []
        return [_choice(delta={"content": token.text}, logprobs=logprobs and logprobs.model_dump())]

    def closing(self, reason: str) -> list[dict[str, Any]]:
        return [_choice(delta={}, finish_reason=reason)]

    def whole(self, tokens: list[Token], reason: str, usage: Usage) -> ChatResponse:
        message = AssistantMessage(content="".join(token.text for token in tokens))
        choice = ChatChoice(message=message, logprobs=self._logprobs(tokens), finish_reason=reason)
        return ChatResponse(**self._head, choices=[choice], usage=usage)

    def _logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if self.request.alternatives is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **_token_logprob(token.piece, token.logprob),
                    top_logprobs=[
                        TopLogprob(**_token_logprob(t.text, t.logprob)) for t in token.top_logprobs or ()
                    ],
                )
                for token in tokens
                if token.logprob is not None
            ]
        )


class CompletionShape(Shape):
    id_prefix, chunk_object = "cmpl", "text_completion"

    def __init__(self, request: CompletionRequest | ChatRequest, model: str) -> None:
        super().__init__(request, model)
        self._offset = 0  # characters before the next token

    def piece(self, token: Token) -> list[dict[str, Any]]:
        logprobs = self._logprobs([token])
        if not token.text and not (logprobs and logprobs.tokens):
            return []
        return [_choice(text=token.text, logprobs=logprobs and logprobs.model_dump())]

    def closing(self, reason: str) -> list[dict[str, Any]]:
        return [_choice(text="", finish_reason=reason)]

    def whole(self, tokens: list[Token], reason: str, usage: Usage) -> CompletionResponse:
        text = "".join(token.text for token in tokens)
        choice = CompletionChoice(text=text, logprobs=self._logprobs(tokens), finish_reason=reason)
        return CompletionResponse(**self._head, choices=[choice], usage=usage)

    def _logprobs(self, tokens: list[Token]) -> CompletionLogprobs | None:
        if self.request.alternatives is None:
            return None
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            if token.logprob is not None:
                found.tokens.append(token.piece)
                found.token_logprobs.append(token.logprob)
                found.top_logprobs.append({t.text: t.logprob for t in token.top_logprobs or ()})
                found.text_offset.append(self._offset)
                self._offset += len(token.piece)
        return found


async def _answer(
    backend: Backend, job: Job, kind: type[Shape], request: CompletionRequest | ChatRequest
) -> Response:
    """Do the job and answer whole or in chunks. Whether it can be done is known before the first byte is
    sent.
    """
    events = backend.generate(job)
    try:
        accepted = await _first(events)
    except BaseException:
        await events.aclose()
        raise
    # The name of the model that answers, which is not the one that was listed while a checkpoint is replaced.
    shape = kind(request, accepted.model)
    if request.stream:
        return StreamingResponse(_chunks(events, accepted, shape), media_type="text/event-stream")
    async with aclosing(events):
        tokens: list[Token] = []
        async for event in events:
            if isinstance(event, Finished):
                return ASCIIResponse(
                    shape.whole(tokens, event.reason, _usage(accepted, event)).model_dump()
                )
            assert isinstance(event, Token)
            tokens.append(event)
    raise Unavailable("the model stopped before the answer was complete; send the request again")


async def _first(events: AsyncGenerator[Event, None]) -> Accepted:
    event = await anext(events)
    if isinstance(event, Refused):
        status = 404 if event.code == MODEL_NOT_FOUND else 400
        raise APIError(status, event.message, code=event.code, param=event.param)
    assert isinstance(event, Accepted)
    return event


async def _chunks(
    events: AsyncGenerator[Event, None], accepted: Accepted, shape: Shape
) -> AsyncIterator[str]:
    """Server-sent events. An error after the first byte becomes an event of its own, and no [DONE]
    follows it.
    """
    async with aclosing(events):
        try:
            if opening := shape.opening():
                yield _sse(shape.chunk(opening))
            async for event in events:
                if isinstance(event, Finished):
                    yield _sse(shape.chunk(shape.closing(event.reason)))
                    if shape.request.include_usage:
                        yield _sse(shape.chunk([], _usage(accepted, event)))
                    yield "data: [DONE]\n\n"
                    return
                assert isinstance(event, Token)
                if choices := shape.piece(event):
                    yield _sse(shape.chunk(choices))
            raise Unavailable("the model stopped before the answer was complete; send the request again")
        except Exception as error:
            yield _sse(_as_api_error(error).body)


def _answer_errors_in_openai_shape(api: FastAPI) -> None:
    def respond(error: APIError) -> Response:
        return ASCIIResponse(error.body, status_code=error.status)

    @api.exception_handler(APIError)
    async def _(request: Request, error: APIError) -> Response:
        return respond(error)

    @api.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return respond(_invalid(error, request.url.path))

    @api.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            what = f"{request.method} {request.url.path}"
            code = "unknown_url" if error.status_code == 404 else "method_not_supported"
            return respond(
                APIError(error.status_code, f"Invalid URL or method ({what}); see /docs", code=code)
            )
        return respond(APIError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return respond(_as_api_error(error))

    # Told apart from other exceptions so that Starlette answers without raising it again.
    @api.exception_handler(Unavailable)
    async def _(request: Request, error: Unavailable) -> Response:
        return respond(_as_api_error(error))


def _as_api_error(error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, Unavailable):
        return APIError(503, str(error), type="server_error", code="unavailable")
    logger.error("a request failed", exc_info=error)
    message = "The server failed on this request. Its log says why; the same request may succeed again."
    return APIError(500, message, type="server_error", code="internal_error")


def _invalid(error: RequestValidationError, path: str) -> APIError:
    """The most telling of the things that are wrong with a body, in words."""
    # Where a value may be one thing or another, pydantic tells what each would have needed. What is wrong
    # inside the one that was meant says more than that it is not the other.
    first = min(error.errors(), key=lambda e: (e["type"].endswith("_type"), -len(e["loc"])))
    where = ".".join(str(step) for step in first["loc"] if step != "body" and not _is_union_branch(step))
    message, code = first["msg"].removeprefix("Value error, "), None
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', message)}")
    if not where and first["type"] in ("missing", "model_attributes_type"):
        return APIError(400, "The body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        message, code = f"Unknown field {where!r}: {path} does not take it", "unknown_parameter"
    elif first["type"] == "missing":
        message, code = f"Missing required field: {where}", "missing_required_parameter"
    elif where:
        message = f"{where}: {message}"
    return APIError(400, message, param=where or None, code=code)


def _is_union_branch(step: Any) -> bool:
    # pydantic names the branch of a union it tried: "str", "constrained-str", "list[...]".
    return isinstance(step, str) and (step in ("str", "constrained-str", "int") or "[" in step)


def _choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": None, **fields}


def _token_logprob(text: str, logprob: float | None) -> dict[str, Any]:
    # U+FFFD stands for part of a character: its bytes are not known here.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _usage(accepted: Accepted, finished: Finished) -> Usage:
    return Usage(
        prompt_tokens=accepted.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        total_tokens=accepted.prompt_tokens + finished.completion_tokens,
    )


def _card(backend: Backend) -> ModelCard:
    return ModelCard(id=backend.name, created=backend.created)


async def _states(backend: Backend) -> list[dict[str, int]]:
    try:
        return [asdict(state) for state in await asyncio.wait_for(backend.states(), HEALTH_TIMEOUT_S)]
    except Exception as error:
        logger.warning("model %s does not answer: %s", backend.name, error)
        return []


def _sse(body: dict[str, Any]) -> str:
    return f"data: {_json(body)}\n\n"


def _json(body: Any) -> str:
    if isinstance(body, BaseModel):
        body = body.model_dump()
    return json.dumps(body, separators=(",", ":"), allow_nan=False)
