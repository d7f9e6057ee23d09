"""Who answers: an OpenAI-compatible vision endpoint. Local models are in `local_model`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pathcore.chat_api import (
    content_of,
    hint_for,
    is_filtered,
    open_client,
    refusal_of,
    shown_endpoint,
)

if TYPE_CHECKING:
    from openai import OpenAI
    from PIL.Image import Image

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


class AgentError(ValueError):
    """The model cannot be used at all: wrong key, wrong name, out of reach."""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        max_tokens: Of one reply.
        temperature: 0 for the most likely words; None leaves it to the endpoint, since some models
            refuse the parameter.
        seed: Where the backend takes one.
    """

    max_tokens: int = 512
    temperature: float | None = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= (self.temperature or 0.0) <= 2:
            raise ValueError("sampling: expected at least one token, a temperature from 0 to 2")

    def parameters(self) -> dict[str, Any]:
        """For provenance."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **seed}


@dataclass(frozen=True)
class Request:
    """What one model is asked once.

    Attributes:
        system: System message; may be empty.
        user: User message.
        image: File to look at.
        image_sha256: Of its bytes.
        schema: JSON schema of the reply, None for text.
        earlier: Replies that could not be used, each with what is wrong with it.
    """

    system: str
    user: str
    image: Path | None = None
    image_sha256: str | None = None
    schema: Mapping[str, Any] | None = None
    earlier: tuple[tuple[str, str], ...] = ()

    def digest(self, model: str, parameters: Mapping[str, Any]) -> str:
        """SHA-256 of all that decides about the reply."""
        content = [model, dict(parameters), self.system, self.user, self.image_sha256, self.schema]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def text_bytes(self) -> int:
        """Length of all text in UTF-8."""
        texts = [self.system, self.user, *(text for pair in self.earlier for text in pair)]
        if self.schema is not None:
            texts.append(json.dumps(self.schema))
        return sum(len(text.encode(errors="replace")) for text in texts)

    def messages(self, image_part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """As chat messages, the image first."""
        parts: list[dict[str, Any]] = [dict(image_part)] if image_part else []
        parts.append({"type": "text", "text": self.user})
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: list[dict[str, Any]] = [*system, {"role": "user", "content": parts}]
        for reply, problem in self.earlier:
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": problem})
        return messages


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: As it came.
        prompt_tokens: As counted by the backend, 0 where nothing was answered; None if it did
            not say.
        reply_tokens: Likewise.
        fault: Why there is no reply at all.
        blame: What to do about a fault. `model`: may do better when asked again. `image`: will not.
            `endpoint`: has been asked often enough. `limit`: the reply was cut off, as it would be
            again. `content`: a verdict about the content, which is final and never asked again.
    """

    text: str = ""
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    fault: str | None = None
    blame: Literal["model", "image", "endpoint", "limit", "content"] = "model"


class Backend(Protocol):
    """A model that looks and writes.

    Attributes:
        kind: For provenance.
        model: Its name.
        endpoint: Where it is; no secrets.
        sampling: How it draws.
        batch_size: Requests it takes at once.
        concurrency: Batches at a time.
    """

    kind: str
    model: str
    endpoint: str
    sampling: Sampling
    batch_size: int
    concurrency: int

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers each request.

        Raises:
            AgentError: The backend cannot be used at all.
        """
        ...

    def close(self) -> None:
        """Lets go of connections and memory."""
        ...


@dataclass
class OpenAIBackend:
    """Any endpoint with OpenAI's chat completions: vLLM, GPT-4V, `xtuner-add serve`.

    The openai client retries failures, timeouts, 429 and 5xx with growing pauses.

    Attributes:
        base_url: Its address, up to and including `/v1`.
        model: Its name there.
        sampling: See `Sampling`.
        concurrency: Requests at a time.
        timeout_s: Longest wait for one reply.
        max_retries: Of one request.
        structured: Send the reply's JSON schema as `response_format`; not all endpoints take it.
        token_field: What the endpoint calls the most tokens of a reply.

    Raises:
        ValueError: No key in OPENAI_API_KEY, or numbers that make no sense.
    """

    base_url: str
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int = 8
    timeout_s: float = 120.0
    max_retries: int = 5
    structured: bool = False
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    kind: str = field(default="openai", init=False)
    batch_size: int = field(default=1, init=False)
    endpoint: str = field(default="", init=False)
    _client: OpenAI = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout_s <= 0 or self.max_retries < 0:
            raise ValueError("endpoint: concurrency of at least 1, a timeout and retries expected")
        self.endpoint = shown_endpoint(self.base_url)
        self._client = open_client(
            self.base_url, timeout_s=self.timeout_s, max_retries=self.max_retries
        )

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """See `Backend.ask`."""
        return [self._ask(request) for request in requests]

    def close(self) -> None:
        """See `Backend.close`."""
        self._client.close()

    def _ask(self, request: Request) -> Reply:
        import openai

        fatal = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        try:
            image = data_url(request.image) if request.image else None
        except ValueError as error:
            return Reply("", 0, 0, fault=str(error), blame="image")
        options: dict[str, Any] = {} if self.sampling.seed is None else {"seed": self.sampling.seed}
        if self.sampling.temperature is not None:
            options["temperature"] = self.sampling.temperature
        if self.structured and request.schema is not None:
            schema = {"name": "reply", "schema": request.schema}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        part = {"type": "image_url", "image_url": {"url": image}} if image else None
        messages: Any = request.messages(part)
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                **{self.token_field: self.sampling.max_tokens, **options},
            )
        except fatal as error:
            hint = hint_for(error, self.base_url)
            raise AgentError(f"{self.model} at {self.endpoint}: {error}{hint}") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            blame: Literal["content", "endpoint"] = "content" if is_filtered(error) else "endpoint"
            fault = f"refused: {error}{hint_for(error, self.base_url)}"
            return Reply("", 0, 0, fault=fault, blame=blame)
        except openai.APIResponseValidationError as error:
            return Reply(fault=f"no completion: {error}")
        except openai.OpenAIError as error:
            return Reply("", 0, 0, fault=f"{type(error).__name__}: {error}", blame="endpoint")
        except ValueError as error:  # a body that is no JSON
            return Reply(fault=f"no completion: {error}")
        return _read_completion(completion)


def _read_completion(completion: Any) -> Reply:
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    known = all(type(count) is int and count >= 0 for count in counts)
    prompt_tokens, reply_tokens = counts if known else (None, None)
    try:
        choice = completion.choices[0]
        message, reason = choice.message, choice.finish_reason
    except (AttributeError, IndexError, TypeError, KeyError):
        shown = f"no completion: {completion!r:.200}"
        return Reply("", prompt_tokens, reply_tokens, fault=shown)
    text = content_of(message)
    if reason == "content_filter":
        fault = "the endpoint's content filter withheld the reply"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="content")
    if (refusal := refusal_of(message)) is not None:
        fault = f"the model refuses: {refusal:.200}"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="content")
    if reason == "length":
        fault = "the reply was cut off at the largest number of tokens; allow more of them"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="limit")
    return Reply(text, prompt_tokens, reply_tokens)


def open_image(path: Path) -> Image:
    """Opens and decodes an image.

    Raises:
        ValueError: It is none, is cut off, or is too large to be one patch.
    """
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path.name}: cannot be read: {error}") from error
    return image


def data_url(path: Path) -> str:
    """An image file as a data URL; what endpoints may not know is sent as PNG.

    Raises:
        ValueError: It is no whole image.
    """
    image = open_image(path)
    mime = _SENT_AS_THEY_ARE.get(image.format or "")
    content = path.read_bytes()
    if mime is None:
        stream, mime = io.BytesIO(), "image/png"
        image.convert("RGB").save(stream, "PNG")
        content = stream.getvalue()
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
