"""`/v1/models` and `/v1/chat/completions` for OpenAI clients."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from pallava.inference.streaming import Completion, ContextError
from pallava.serving.openai_messages import (
    MAX_PIXELS,
    ChatRequest,
    ReadSlide,
    RequestError,
    read_request,
)
from pallava.serving.service import Answers, BusyError, ModelService
from pallava.text.encoding import ConversationError
from pathcore.images import ImageError

_logger = logging.getLogger(__name__)

_POLL_S = 0.2
_FAILED = RuntimeError("the model failed; the server's log says why")


def make_router(
    service: ModelService, max_pixels: int = MAX_PIXELS, read_slide: ReadSlide | None = None
) -> APIRouter:
    """Creates the routes of the endpoint.

    Args:
        service: Model to serve.
        max_pixels: Maximum number of pixels of all images in a request.
        read_slide: See `read_request`.
    """
    router = APIRouter()
    decoding = asyncio.Semaphore(2)  # a decoded image can be a hundred times larger than its file
    card = {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "xtuner-add",
    }

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.name, "waiting": service.waiting}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name == service.name:
            return JSONResponse(card)
        message = f"model {name!r:.80}: this server has {service.name!r}"
        return error_response(RequestError(message, "model", "model_not_found", 404))

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        read = functools.partial(
            read_request, model=service.name, max_pixels=max_pixels, read_slide=read_slide
        )
        return await _complete(service, request, decoding, read)

    return router


async def _complete(
    service: ModelService,
    request: Request,
    decoding: asyncio.Semaphore,
    read: Callable[[Any], ChatRequest],
) -> Response:
    answers: Answers | None = None
    try:
        service.check_free()
        body = parse_body(await request.body())
        async with decoding:
            chat = await run_in_threadpool(read, body)
        answers = service.ask(chat.turns, chat.sampling, chat.num_answers)
        events = answers.__aiter__()
        if chat.stream:
            # Waiting for the first token lets errors still set the HTTP status.
            first = await _unless_gone(request, anext(events, None))
            chunks = _stream(service.name, chat, first, events, answers)
            answers = None  # the stream cancels it
            return StreamingResponse(chunks, media_type="text/event-stream")
        completions = await _unless_gone(request, _collect(events))
        return JSONResponse(_whole(service.name, completions))
    except (RequestError, BusyError, ConversationError, ImageError) as error:
        return error_response(error)
    except _ClientGone:
        return Response(status_code=499)  # the client has disconnected
    except Exception:
        return failure_response()
    finally:
        if answers is not None:
            answers.cancel()


def error_response(error: Exception, status: int = 400) -> JSONResponse:
    """Builds an error response in OpenAI's format."""
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(_error(error, "server_error", "busy"), 503, headers)
    if isinstance(error, ContextError):
        content = _error(error, "invalid_request_error", "context_length_exceeded", "messages")
        return JSONResponse(content, 400)
    code = getattr(error, "code", None)
    status = getattr(error, "status", status)
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    content = _error(error, kind, code, getattr(error, "param", None))
    return JSONResponse(content, status)


def failure_response() -> JSONResponse:
    """Logs the current exception, and builds the response to a failure of the server."""
    _logger.exception("no answer")
    return JSONResponse(_error(_FAILED, "server_error"), 500)


def _error(
    error: Exception, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def parse_body(body: bytes) -> Any:
    """Parses the JSON of a request.

    Raises:
        RequestError: If it is no JSON.
    """
    try:
        content = json.loads(body)
        if b"\\ud" in body.lower():
            # JSON can escape a lone surrogate, which can be neither tokenized nor encoded again.
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is no JSON: {error}") from error
    return content


class _ClientGone(Exception):
    """Raised if the client closed the connection."""


async def _unless_gone(request: Request, work: Any) -> Any:
    """Awaits `work`, but stops if the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_S))[0]:
            if await request.is_disconnected():
                raise _ClientGone
        return task.result()
    finally:
        task.cancel()


async def _collect(events: AsyncIterator[tuple[int, Any]]) -> list[Completion]:
    found = {index: item async for index, item in events if isinstance(item, Completion)}
    return [found[index] for index in sorted(found)]


def _response_identity(model: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _usage(completions: list[Completion]) -> dict[str, int]:
    prompt = completions[0].prompt_tokens if completions else 0  # counted once, as by OpenAI
    written = sum(completion.completion_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


def _whole(model: str, completions: list[Completion]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    identity = _response_identity(model, "chat.completion")
    return {**identity, "choices": choices, "usage": _usage(completions)}


async def _stream(
    model: str, chat: ChatRequest, first: Any, events: Any, answers: Answers
) -> AsyncIterator[str]:
    identity = _response_identity(model, "chat.completion.chunk")
    usage = {"usage": None} if chat.include_usage else {}

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**identity, "choices": [choice], **usage})

    completions: list[Completion] = []
    try:
        for index in range(chat.num_answers):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, item in _with_first(first, events):
            if isinstance(item, Completion):
                completions.append(item)
                yield chunk(index, {}, item.finish_reason)
            else:
                yield chunk(index, {"content": item})
        if chat.include_usage:
            yield _event({**identity, "choices": [], "usage": _usage(completions)})
        yield "data: [DONE]\n\n"
    except Exception:  # the status has already been sent
        _logger.exception("answer broken off")
        yield _event(_error(_FAILED, "server_error"))
    finally:
        answers.cancel()
        with contextlib.suppress(RuntimeError):  # the iterator may be awaited by another task
            await events.aclose()


async def _with_first(first: Any, events: Any) -> AsyncIterator[Any]:
    if first is not None:
        yield first
        async for event in events:
            yield event


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
