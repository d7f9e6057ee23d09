"""The endpoint through OpenAI's own client and over bare HTTP."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import threading
import time
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
from PIL import Image

from pallava.inference.assistant import Assistant
from pallava.inference.streaming import Completion, Sampling, converse
from pallava.serving.app import create_app
from pallava.serving.service import BusyError, ModelService
from pallava.text.turns import Turn
from tests.pallava.serving.conftest import NAME, picture, serving
from tests.pallava.serving.slow_assistant import SlowAssistant

IMAGES = ["sq_big.png", "tall_3.png", "strip_8.png"]


def data_url(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture(name).read_bytes()).decode()}"


def user(text: str, *images: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(name)}} for name in images
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    fields = {"model": NAME, "max_tokens": 16, **options}
    return client.chat.completions.create(messages=messages, **fields)


def post(port: int, **body: Any) -> httpx.Response:
    content = {"model": NAME, "messages": [{"role": "user", "content": "What?"}], **body}
    content = {name: value for name, value in content.items() if value != "absent"}
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=content, timeout=60)


@pytest.mark.parametrize("name", IMAGES)
def test_streamed_whole_and_local_answers_are_one(
    client: openai.OpenAI, assistant: Assistant, name: str
) -> None:
    expected = assistant.answer(picture(name), "Is fibrosis shown?", max_new_tokens=16)
    messages = [user("Is fibrosis shown?", name)]
    whole = ask(client, messages)
    assert whole.choices[0].message.content == expected
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == expected
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert 0 < whole.usage.completion_tokens <= 16


def test_several_turns_and_images_are_one_conversation(
    client: openai.OpenAI, assistant: Assistant
) -> None:
    messages = [
        {"role": "system", "content": "You are a pathologist."},
        user("What?", "sq_big.png", "tall_3.png"),
        {"role": "assistant", "content": "A gland."},
        user("Why?", "strip_8.png"),
    ]
    turns = [
        Turn("system", "You are a pathologist."),
        Turn("user", "What?", (picture("sq_big.png"), picture("tall_3.png"))),
        Turn("assistant", "A gland."),
        Turn("user", "Why?", (picture("strip_8.png"),)),
    ]
    expected = converse(assistant, turns, Sampling(max_new_tokens=16))
    found = ask(client, messages)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_several_answers_seeds_and_stop_texts(client: openai.OpenAI) -> None:
    messages = [user("What?", "sq_big.png")]
    sampled = {"temperature": 1.5, "seed": 5, "n": 3}
    first, second = ask(client, messages, **sampled), ask(client, messages, **sampled)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    alone = ask(client, messages, temperature=1.5, seed=6)
    assert alone.choices[0].message.content == texts[1]
    streamed: dict[int, str] = {}
    for chunk in ask(client, messages, stream=True, **sampled):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts
    whole = ask(client, messages).choices[0].message.content
    stop = whole[6:10]
    cut = ask(client, messages, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_models_and_health(client: openai.OpenAI, port: int) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "xtuner-add"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4o")
    health = httpx.get(f"http://127.0.0.1:{port}/health")
    assert health.json() == {"status": "ok", "model": NAME, "waiting": 0}
    unknown = httpx.post(f"http://127.0.0.1:{port}/v1/embeddings", json={})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "invalid_request_error"


def image_message(url: str, **more: Any) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url, **more}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]


def bomb() -> str:
    stream = io.BytesIO()
    Image.new("1", (2000, 2000)).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


POSTSCRIPT = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt-4o"}, 404, "model", "this server has 'tiny'"),
        ({"model": "absent"}, 404, "model", "model None"),
        ({"messages": []}, 400, "messages", "a list of messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0]", "role"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0]", "content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "starting and"),
        ({"messages": [{"role": "system", "content": "<image>"}]}, 400, "messages[0]", "1 <image>"),
        ({"messages": image_message("https://example.org/a.png")}, 400, "messages[0]", "data: URL"),
        ({"messages": image_message("file:///etc/passwd")}, 400, "messages[0]", "fetches nothing"),
        ({"messages": image_message("/etc/passwd")}, 400, "messages[0]", "fetches nothing"),
        ({"messages": image_message("data:image/png;base64,####")}, 400, "messages[0]", "base64"),
        ({"messages": image_message("data:image/png;base64,é")}, 400, "messages[0]", "base64"),
        ({"messages": image_message("data:image/png;base64,aGVsbG8=")}, 400, "messages[0]", "PNG"),
        ({"messages": image_message("data:image/png,abc")}, 400, "messages[0]", "in base64"),
        (
            {"messages": image_message(f"data:application/eps;base64,{POSTSCRIPT}")},
            400, "messages[0]", "none of PNG",
        ),
        ({"messages": image_message(bomb())}, 400, "messages[0]", "1,000,000 pixels"),
        (
            {"messages": image_message(data_url("sq_big.png"), detail="high")},
            400, "messages[0].content[0].image_url.detail", "not supported",
        ),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"n": 99}, 400, "n", "1 to 8"),
        ({"n": True}, 400, "n", "expected int"),
        ({"temperature": 3}, 400, "temperature", "0 to 2"),
        ({"top_p": "high"}, 400, "top_p", "expected float"),
        ({"seed": -1}, 400, "seed", "seed"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_completion_tokens", "differ"),
        ({"stop": ["a"] * 5}, 400, "stop", "up to 4"),
        ({"stop": ""}, 400, "stop", "empty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "only with stream"),
        ({"messages": [{"role": "user", "content": "a " * 9999}]}, 400, "messages", "tokens long"),
        (
            {"messages": [{"role": "user", "content": "a " * 9999}], "stream": True},
            400, "messages", "tokens long",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_openais_shape(
    port: int, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = post(port, **body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]


def test_tokens_without_an_embedding_are_refused(assistant: Assistant) -> None:
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.add_tokens(["[ADDED]"])  # and the embeddings are not resized
    added = Assistant(assistant.model, tokenizer, assistant.anyres)
    with serving(create_app(ModelService(added, NAME))) as port:
        for stream in (False, True):
            texts = [{"role": "user", "content": "What is [ADDED]?"}]
            response = post(port, messages=texts, stream=stream)
            assert response.status_code == 400, response.text
            assert "the text contains '[ADDED]', token" in response.json()["error"]["message"]
        assert post(port, max_tokens=2).status_code == 200
    with pytest.raises(ValueError, match="leave it out of the text"):
        added.answer(picture("sq_big.png"), "What is [ADDED]?")


def test_a_conversation_goes_on_after_the_model_wrote_an_image_mark(port: int) -> None:
    written = {"role": "assistant", "content": "an <image>"}
    assert post(port, messages=[user("a"), written, user("b")], max_tokens=2).status_code == 200


def test_options_that_ask_for_nothing_are_taken(port: int) -> None:
    neutral = {"frequency_penalty": 0.0, "tools": [], "logprobs": False, "user": "me", "seed": None}
    assert post(port, **neutral, max_tokens=2).status_code == 200


def test_what_is_no_json_is_refused(port: int) -> None:
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    for content in (b"{", b"[" * 100_000, b"[]", b"\xff"):
        response = httpx.post(address, content=content)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture
def slow(assistant: Assistant) -> SlowAssistant:
    return SlowAssistant.like(assistant)


@pytest.mark.parametrize("body", [b'{"\\ud800": 1}', b'{"messages": [{"content": "a\\uDC00"}]}'])
def test_half_a_surrogate_pair_is_refused(port: int, body: bytes) -> None:
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", content=body, timeout=60)
    assert answer.status_code == 400
    assert "no JSON" in answer.json()["error"]["message"]


def test_emoji_and_temperatures_close_to_zero_are_no_faults(port: int) -> None:
    plain = post(port, max_tokens=8).json()["choices"]
    cold = post(port, max_tokens=8, temperature=1e-320)
    assert cold.status_code == 200 and cold.json()["choices"] == plain
    emoji = {"role": "user", "content": "\U0001f52c?"}
    assert post(port, messages=[emoji], max_tokens=4).status_code == 200


def test_a_full_queue_is_refused_with_the_time_to_come_back(slow: SlowAssistant) -> None:
    service = ModelService(slow, NAME, max_waiting=1, max_running=1)
    with serving(create_app(service)) as port:
        answers: list[httpx.Response] = []

        def one() -> None:
            answers.append(post(port, max_tokens=20))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            while service.num_jobs <= number:
                time.sleep(0.01)
        refused = post(port)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "busy"
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        assert service.waiting == 0
        assert post(port, max_tokens=2).status_code == 200


def test_many_clients_get_at_once_what_each_would_get_alone(slow: SlowAssistant) -> None:
    slow.brake_s = 0.002
    service = ModelService(slow, NAME, max_waiting=6, max_running=6)
    questions = [(f"What is {number}?", IMAGES[number % 3]) for number in range(12)]
    found: dict[int, Any] = {}
    most_running = [0]

    def ask_one(port: int, number: int) -> None:
        text, image = questions[number]
        answer = post(port, messages=[user(text, image)], max_tokens=6 + number)
        most_running[0] = max(most_running[0], service.num_jobs - service.waiting)
        found[number] = answer.json()

    with serving(create_app(service)) as port:
        threads = [threading.Thread(target=ask_one, args=(port, index)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, (text, image) in enumerate(questions):
        turns = [Turn("user", text, (picture(image),))]
        expected = converse(slow, turns, Sampling(max_new_tokens=6 + number))
        assert found[number]["choices"][0]["message"]["content"] == expected.text
        assert found[number]["usage"]["completion_tokens"] == expected.completion_tokens
    assert 1 < most_running[0] <= 6


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_the_client_goes_away(slow: SlowAssistant, stream: bool) -> None:
    slow.brake_s = 0.4
    service = ModelService(slow, NAME)
    body = {"model": NAME, "messages": [user("What?", "sq_big.png")], "max_tokens": 900}
    with serving(create_app(service)) as port:
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        with (
            httpx.Client(timeout=1.0) as client,
            pytest.raises(httpx.ReadTimeout),
            client.stream("POST", address, json={**body, "stream": stream}) as response,
        ):
            for _ in response.iter_lines():
                assert stream
                assert service.num_jobs == 1
                raise httpx.ReadTimeout("enough")
        assert service.num_jobs == 1
        deadline = time.monotonic() + 10  # hundreds of tokens take minutes
        while service.num_jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert service.num_jobs == 0


def test_a_failing_model_is_an_error_and_not_the_end(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ModelService(assistant, NAME)
    with serving(create_app(service)) as port:
        for fault in (ZeroDivisionError("inner"), ValueError("inner")):
            with monkeypatch.context() as patch:
                patch.setattr(assistant.model.llm, "forward", Mock(side_effect=fault))
                for stream in (False, True):
                    response = post(port, stream=stream)
                    assert response.status_code == 500
                    assert response.json()["error"]["type"] == "server_error"
                    assert "inner" not in response.text
        # The same where the batch expects no error, and would leave clients without an answer.
        with monkeypatch.context() as patch:
            patch.setattr("pallava.inference.batching.BatchedAnswers.step", lambda _: 1 / 0)
            assert post(port, max_tokens=2).status_code == 500
        assert post(port, max_tokens=2).status_code == 200


def test_a_withdrawn_question_frees_its_place(slow: SlowAssistant) -> None:
    async def run() -> list[str]:
        service = ModelService(slow, NAME, max_waiting=1, max_running=1)
        sampling = Sampling(max_new_tokens=10)
        first = service.ask([Turn("user", "What?")], sampling)
        second = service.ask([Turn("user", "Why?")], sampling)
        with pytest.raises(BusyError):
            service.ask([Turn("user", "No?")], sampling)
        second.cancel()
        third = service.ask([Turn("user", "Red?")], sampling)
        found = []
        for answers in (first, third):
            async for _, item in answers:
                if isinstance(item, Completion):
                    found.append(item.text)
        assert await service.call(lambda left, right: left + right, 1, 2) == 3
        service.close()
        return found

    found = asyncio.run(run())
    assert found == [
        slow.answer(None, question, max_new_tokens=10) for question in ("What?", "Red?")
    ]


def test_events_are_single_lines_of_json(port: int) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "What?"}], "stream": True}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    with httpx.stream("POST", address, json={**body, "max_tokens": 5}) as response:
        lines = [line for line in response.iter_lines() if line]
        assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"
