"""Keys, addresses and refusals of OpenAI-compatible endpoints, through a real HTTP server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from pathcore.chat_api import (
    api_key,
    content_of,
    hide_secrets,
    hint_for,
    is_filtered,
    open_client,
    shown_endpoint,
)
from pathcore.chat_backends import AgentError, OpenAIBackend, Request
from tests.pathgen.describer_server import DescriberServer, running_server


def send(server: DescriberServer, base_url: str) -> Any:
    client = open_client(base_url, timeout_s=10, max_retries=0)
    try:
        message = {"role": "user", "content": "case 1"}
        return client.chat.completions.create(model="m", messages=[message])  # type: ignore[list-item]
    finally:
        client.close()


def test_keys_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert api_key() == "secret"
    for bad in ("se cret", "se\ncret", "schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(ValueError, match="OPENAI_API_KEY: contains"):
            api_key()
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    with pytest.raises(ValueError, match="is not set"):
        api_key()


def test_addresses_of_azure_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    with running_server() as server:
        root = server.url.removesuffix("/v1")
        send(server, f"{root}/openai/deployments/D?api-version=2024-10-21")
        assert server.paths == {"/openai/deployments/D/chat/completions?api-version=2024-10-21"}
        assert server.api_keys == {"secret"}
        send(server, server.url)
        assert server.paths >= {"/v1/chat/completions"} and None in server.api_keys
        assert server.keys == {"Bearer secret"}
        server.refuse = 404
        with pytest.raises(openai.NotFoundError) as raised:
            send(server, root)
        assert hint_for(raised.value, root) == f"; the URL probably lacks /v1: {root}/v1"
        assert hint_for(raised.value, server.url) == ""
        private = root.replace("//", "//user:password@") + "?key=hidden"
        assert hint_for(raised.value, private) == f"; the URL probably lacks /v1: {root}/v1"
    assert shown_endpoint("http://user:pass@host:8000/v1?key=x") == "http://host:8000/v1"
    for bad in ("host:8000/v1", "ftp://host/v1", "http://host/v1/chat/completions"):
        with pytest.raises(ValueError, match="endpoint"):
            shown_endpoint(bad)


def test_error_messages_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some gateways quote the key, or the address with its query."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    quoted = "Incorrect API key provided: sk-0123456789 at http://u:word@host/v1?key=hidden"
    for status in (400, 401, 409):
        with running_server() as server:
            server.refuse, server.refusal = status, quoted
            backend = OpenAIBackend(server.url, "m", max_retries=0)
            try:
                found = str(backend.ask([Request("", "case 1")])[0].fault)
            except AgentError as error:
                found = str(error)
        assert "API key provided: *** at http://host/v1" in found
        assert not any(word in found for word in ("0123", "word@", "hidden"))
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert hide_secrets("an extra 'https://a:b@c?d' and text") == "an extra 'https://c' and text"


def test_a_reply_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running_server() as server:
        client = open_client(server.url, timeout_s=0.5, max_retries=0)
        message: Any = {"role": "user", "content": "[drip] case 1"}
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=[message])
        client.close()


def test_what_refusals_mean() -> None:
    assert is_filtered(ValueError("The response was filtered: content_filter"))
    assert not is_filtered(ValueError("Unsupported parameter: 'temperature'"))
    hint = hint_for(ValueError("Unsupported parameter: 'temperature'"), "http://host/v1")
    assert "--temperature none" in hint
    use = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    assert "--token-field max_completion_tokens" in hint_for(ValueError(use), "http://host/v1")


def test_content_as_a_list_of_parts() -> None:
    class Message:
        content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, 7]

    assert content_of(Message()) == "one two"
    assert content_of(None) == ""
