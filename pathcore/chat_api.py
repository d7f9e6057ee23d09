"""Clients of OpenAI-compatible endpoints: API key, URL, time limits, interpretation of errors."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pathcore.extras import says_extra

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_KEY = 8
"""Endpoints without keys are given any text, such as `x` or `EMPTY`."""

_ADDRESS = re.compile(r"""(https?://)(?:[^\s/?#'"]*@)?([^\s?'"]*)(?:\?[^\s'"]*)?""")

_FILTER_WORDS = (
    *("content_filter", "content filter", "content management policy"),
    *("content_policy_violation", "ResponsibleAIPolicyViolation"),
)


def api_key() -> str:
    """Returns the API key from the environment.

    Raises:
        ValueError: If the variable is not set, or the key is not a valid HTTP header.
    """
    # Keys read from a file by the shell may end in a line break.
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ValueError(
            f"{KEY_VARIABLE} is not set; for an endpoint without keys set it to any text"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{KEY_VARIABLE}: contains spaces, line breaks or characters that are not ASCII; copy "
            "the key again"
        )
    return key


def shown_endpoint(base_url: str) -> str:
    """Returns a URL without user, password and query, for reports and error messages.

    Raises:
        ValueError: If it is not the URL of an endpoint.

    Example:
        >>> shown_endpoint("https://user:secret@host:8000/v1?key=secret")
        'https://host:8000/v1'
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"endpoint {parts.path!r}: expected a URL such as http://host:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(
            f"endpoint {parts.path!r}: give the URL up to /v1; /chat/completions is added to it"
        )
    return urlunsplit((parts.scheme, parts.netloc.split("@")[-1], parts.path, "", ""))


def hide_secrets(text: str) -> str:
    """Returns a text without the API key, and without user, password and query of its URLs.

    Gateways quote the key or the address in their error messages.

    Example:
        >>> hide_secrets("evaluate --endpoint 'https://user:secret@host/v1?key=secret' --model m")
        "evaluate --endpoint 'https://host/v1' --model m"
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if len(key) >= _SHORTEST_KEY:
        text = text.replace(key, "***")
    return _ADDRESS.sub(r"\1\2", text)


@says_extra("a client of an endpoint", "pathgen")
def open_client(base_url: str, *, timeout_s: float, max_retries: int) -> OpenAI:
    """Opens a client that retries connection errors, timeouts, 429 and 5xx with growing pauses.

    A query in the URL is sent with each request. For Azure's classic endpoints
    (`https://R.openai.azure.com/openai/deployments/D?api-version=V`) the key is also sent as
    `api-key`.

    Args:
        base_url: URL of the endpoint up to `/v1`.
        timeout_s: Maximum time in seconds for a reply.
        max_retries: Number of retries per request.

    Raises:
        ValueError: If the URL or the key in the environment cannot be used.
    """
    from openai import DefaultHttpxClient, OpenAI  # takes a second

    shown_endpoint(base_url)
    key, parts = api_key(), urlsplit(base_url)
    query = dict(parse_qsl(parts.query))
    options: dict[str, Any] = {"default_query": query} if query else {}
    if "api-version" in query:
        options["default_headers"] = {"api-key": key}
    address = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    http_client = DefaultHttpxClient(
        timeout=timeout_s, event_hooks={"response": [_limit_body(timeout_s)]}
    )
    return OpenAI(
        base_url=address,
        api_key=key,
        timeout=timeout_s,
        max_retries=max_retries,
        http_client=http_client,
        **options,
    )


def _limit_body(timeout_s: float) -> Callable[[Any], None]:
    """Returns a hook that limits the total time for the body of a response.

    httpx only limits the time between two chunks, so a server that sends a space now and then could
    keep a request open forever.
    """
    from openai import DefaultHttpxClient  # takes a second

    # Versions of openai use httpx or a fork of it; the hook must raise its timeout to be retried.
    httpx: Any = importlib.import_module(DefaultHttpxClient.__mro__[1].__module__.split(".")[0])

    class Limited(httpx.SyncByteStream):  # type: ignore[misc]
        def __init__(self, response: Any) -> None:
            self.stream: Any = response.stream
            self.request = response.request
            self.deadline = time.monotonic() + timeout_s

        def __iter__(self) -> Iterator[bytes]:
            for piece in self.stream:
                if time.monotonic() > self.deadline:
                    raise httpx.ReadTimeout("the reply takes too long", request=self.request)
                yield piece

        def close(self) -> None:
            self.stream.close()

    def limit(response: Any) -> None:
        response.stream = Limited(response)

    return limit


def is_filtered(error: Exception) -> bool:
    """Returns whether an endpoint rejected the content of a request, so that retries are futile."""
    text = f"{getattr(error, 'code', '')} {getattr(error, 'body', '')} {error}".lower()
    return any(word.lower() in text for word in _FILTER_WORDS)


def hint_for(error: Exception, base_url: str) -> str:
    """Returns a hint to append to the message of an endpoint's error, or an empty string."""
    text = str(error).lower()
    if getattr(error, "status_code", None) == 404 and "/v" not in urlsplit(base_url).path:
        return f"; the URL probably lacks /v1: {shown_endpoint(base_url).rstrip('/')}/v1"
    if "max_completion_tokens" in text:
        return "; try --token-field max_completion_tokens"
    if "temperature" in text:
        return "; leave the temperature out by --temperature none, or set the one it takes"
    return ""


def refusal_of(message: Any) -> str | None:
    """Returns the `refusal` of a chat message; None if the model answered."""
    refusal = getattr(message, "refusal", None)
    return refusal if isinstance(refusal, str) and refusal.strip() else None


def content_of(message: Any) -> str:
    """Returns the text of a chat message, which some gateways send as a list of parts."""
    content = getattr(message, "content", None)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
