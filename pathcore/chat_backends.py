"""Models that reply to text and images: the protocol, and OpenAI-compatible vision endpoints.

Local models are in `chat_local`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pathcore.chat_api import (
    content_of,
    hide_secrets,
    hint_for,
    is_filtered,
    open_client,
    refusal_of,
    shown_endpoint,
)
from pathcore.images import data_url, is_plain, to_rgb

if TYPE_CHECKING:
    from openai import OpenAI
    from PIL.Image import Image

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}

# Finish reasons beside OpenAI's `stop`, `length` and `content_filter`. Gateways pass on Gemini's.
_CUT = ("length", "max_tokens")
_WITHHELD = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii")
_BROKEN_OFF = ("error", "abort", "cancelled", "insufficient_system_resource")
"""Of OpenRouter, vLLM, `xtuner-add serve` and DeepSeek: the server failed during the reply."""


class AgentError(ValueError):
    """Raised if a model cannot be used at all: wrong key, unknown name, unreachable endpoint."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        max_tokens: Maximum number of tokens of a reply.
        temperature: Temperature; 0 decodes greedily. With None the parameter is not sent, since
            some models reject it.
        seed: Seed, if the backend supports one.
        cut_is_fault: Whether a reply that is cut off at `max_tokens` cannot be used. An empty one,
            whose tokens all went into hidden reasoning, never can.
    """

    max_tokens: int = 512
    temperature: float | None = 0.0
    seed: int | None = None
    cut_is_fault: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= (self.temperature or 0.0) <= 2:
            raise ValueError("sampling: expected at least one token, a temperature from 0 to 2")

    def parameters(self) -> dict[str, Any]:
        """Returns the parameters as recorded in the provenance."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **seed}


@dataclass(frozen=True)
class Request:
    """One request to a model.

    Attributes:
        system: System message; may be empty.
        user: User message.
        image: Path of the image, or the decoded image.
        image_sha256: SHA-256 of the image file, or another text that identifies its content.
        schema: JSON schema of the reply; None for plain text.
        earlier: Unusable replies to this request, each with the correction that was sent.
    """

    system: str
    user: str
    image: Path | Image | None = None
    image_sha256: str | None = None
    schema: Mapping[str, Any] | None = None
    earlier: tuple[tuple[str, str], ...] = ()

    def digest(self, model: str, parameters: Mapping[str, Any]) -> str:
        """Returns the SHA-256 of everything that the reply depends on."""
        content = [model, dict(parameters), self.system, self.user, self.image_sha256, self.schema]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def text_bytes(self) -> int:
        """Length of all texts in UTF-8 bytes."""
        texts = [self.system, self.user, *(text for pair in self.earlier for text in pair)]
        if self.schema is not None:
            texts.append(json.dumps(self.schema))
        return sum(len(text.encode(errors="replace")) for text in texts)

    def messages(self, image_part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Returns the request as chat messages, with the image before the text."""
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
    """A reply, or the reason why there is none.

    Attributes:
        text: Text of the reply, unmodified.
        prompt_tokens: Number of prompt tokens that the backend counted; 0 if the request was not
            answered, None if the backend reports no usage.
        reply_tokens: Number of reply tokens, likewise.
        fault: Why there is no reply.
        blame: Cause of a fault, or of a reply that cannot be used. `model`: the request is
            repeated. `image`: the image is unreadable. `endpoint`: the client has already retried.
            `limit`: the reply was cut off, as it would be again. `content`: the content was
            refused; this is final, and not even a later run asks again.
    """

    text: str = ""
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    fault: str | None = None
    blame: Literal["model", "image", "endpoint", "limit", "content"] = "model"


class Backend(Protocol):
    """A model that replies to requests with text and images.

    Attributes:
        kind: Kind of backend, for the provenance.
        model: Name of the model.
        endpoint: Address of the model, without secrets.
        sampling: Sampling parameters.
        batch_size: Number of requests per batch.
        concurrency: Number of batches in flight.
    """

    kind: str
    model: str
    endpoint: str
    sampling: Sampling
    batch_size: int
    concurrency: int

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns one reply per request.

        Raises:
            AgentError: If the backend cannot be used at all.
        """
        ...

    def close(self) -> None:
        """Releases connections and memory."""
        ...


@dataclass
class OpenAIBackend:
    """Any endpoint with OpenAI's chat completions: vLLM, GPT-4V, `xtuner-add serve`.

    The openai client retries lost connections, timeouts, 429 and 5xx with exponential backoff.

    Attributes:
        base_url: Address of the endpoint, up to and including `/v1`.
        model: Name of the model at the endpoint.
        sampling: Sampling parameters.
        concurrency: Number of concurrent requests.
        timeout_s: Timeout of one request in seconds.
        max_retries: Maximum number of retries of a request.
        structured: Whether to send the JSON schema of the reply as `response_format`, which not all
            endpoints accept.
        token_field: Name under which the endpoint expects the maximum number of tokens.

    Raises:
        ValueError: If OPENAI_API_KEY is not set, or a number is out of range.
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
            raise ValueError("endpoint: expected concurrency of at least 1, a timeout and retries")
        self.endpoint = shown_endpoint(self.base_url)
        self._client = open_client(
            self.base_url, timeout_s=self.timeout_s, max_retries=self.max_retries
        )

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns one reply per request."""
        return [self._ask(request) for request in requests]

    def close(self) -> None:
        """Closes the HTTP client."""
        self._client.close()

    def _ask(self, request: Request) -> Reply:
        import openai

        fatal = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        try:
            image = image_url(request.image) if request.image else None
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
        if part is None:  # some endpoints of text-only models reject lists of parts
            next(m for m in messages if m["role"] == "user")["content"] = request.user
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                **{self.token_field: self.sampling.max_tokens, **options},
            )
        except fatal as error:
            hint = hint_for(error, self.base_url)
            said = hide_secrets(str(error))
            raise AgentError(f"{self.model} at {self.endpoint}: {said}{hint}") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            blame: Literal["content", "endpoint"] = "content" if is_filtered(error) else "endpoint"
            fault = f"refused: {hide_secrets(str(error))}{hint_for(error, self.base_url)}"
            return Reply("", 0, 0, fault=fault, blame=blame)
        except openai.APIResponseValidationError as error:
            return Reply(fault=f"no completion: {error}")
        except openai.OpenAIError as error:
            fault = f"{type(error).__name__}: {hide_secrets(str(error))}"
            return Reply("", 0, 0, fault=fault, blame="endpoint")
        except ValueError as error:  # the body is not JSON
            return Reply(fault=f"no completion: {error}")
        return _read_completion(completion, self.sampling.cut_is_fault)


def _read_completion(completion: Any, cut_is_fault: bool) -> Reply:
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
    text, reason = content_of(message), str(reason).lower()
    if reason.startswith(_WITHHELD):
        fault = "the endpoint's content filter withheld the reply"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="content")
    if (refusal := refusal_of(message)) is not None:
        fault = f"the model refuses: {refusal:.200}"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="content")
    if reason in _BROKEN_OFF:
        fault = f"the endpoint broke the reply off ({reason})"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="endpoint")
    if reason in _CUT and (cut_is_fault or not text.strip()):
        fault = "the reply was cut off at the maximum number of tokens; allow more of them"
        return Reply(text, prompt_tokens, reply_tokens, fault=fault, blame="limit")
    return Reply(text, prompt_tokens, reply_tokens)


def open_image(path: Path | Image) -> Image:
    """Opens and fully decodes an image, as 8-bit RGB; see `pathcore.images.to_rgb`.

    Raises:
        ValueError: If the file is no image, is truncated, or is too large for a patch.
    """
    return _as_rgb(_decoded(path), path)


def _as_rgb(image: Image, path: Path | Image) -> Image:
    return to_rgb(image, name=f"image {path.name}" if isinstance(path, Path) else "image")


def _decoded(path: Path | Image) -> Image:
    from PIL import Image

    if isinstance(path, Image.Image):
        return path
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path.name}: cannot be read: {error}") from error
    return image


def image_url(path: Path | Image) -> str:
    """Returns an image as a data URL.

    Files in PNG, JPEG and WebP with 8-bit RGB or grey pixels are sent unchanged; other pixels and
    formats, which endpoints may not support, and decoded images as PNG in RGB.

    Raises:
        ValueError: If the image cannot be decoded completely.
    """
    image = _decoded(path)
    mime = _SENT_AS_THEY_ARE.get(image.format or "")
    if mime is None or not is_plain(image) or not isinstance(path, Path):
        return data_url(_as_rgb(image, path))
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
