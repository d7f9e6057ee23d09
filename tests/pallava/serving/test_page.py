"""The page releases the model when its visitor leaves, and deletes old files."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pallava.inference.assistant import Assistant
from pallava.serving.app import create_app, delete_older
from pallava.serving.page import Page, Session, _start_over
from pallava.serving.service import ModelService
from pallava.serving.slides import SlideInfo
from pathcore.images import load_image
from tests.pallava.browser import chromium
from tests.pallava.serving.conftest import NAME, picture, serving
from tests.pallava.serving.slow_assistant import SlowAssistant


@pytest.mark.slow
def test_stopping_and_leaving_end_the_answer(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "restored in the end")
    monkeypatch.setattr(tempfile, "tempdir", None)
    service = ModelService(SlowAssistant.like(assistant, 0.2), NAME)  # a minute for an answer
    with serving(create_app(service, upload_folder=tmp_path)) as port, chromium() as browser:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#picture input[type=file]", str(picture("sq_big.png")))
        page.wait_for_selector("#cut img")
        page.fill("#question textarea", "What?")
        page.click("#ask")
        page.locator("#chat [data-testid=bot]").first.wait_for()
        assert service.num_jobs == 1
        assert page.locator("#chat [data-testid=user] img").count() == 1
        page.click("#stop")
        wait_until_free(service)
        page.fill("#question textarea", "Why?")
        page.click("#ask")
        page.locator("#chat [data-testid=bot]").nth(1).wait_for()
        assert service.num_jobs == 1
        page.close()
        wait_until_free(service)


def test_a_new_conversation_stays_new_when_the_old_answer_ends_late(assistant: Assistant) -> None:
    service = ModelService(SlowAssistant.like(assistant, 0.01), NAME)
    page, session = Page(service, None, 10_000), with_image(assistant)

    async def begin_and_start_over() -> list[Any]:
        answering = page.answer("What?", [], session, 400, 0, 0)
        async for history, _ in answering:
            if history[-1]["role"] == "assistant":
                break
        _start_over(session)
        return [history async for history, _ in answering]

    # The last word of the old answer clears the page: a piece of it may arrive after the reply.
    assert asyncio.run(begin_and_start_over()) == [[]]
    assert (session.turns, session.answering) == ([], [])
    wait_until_free(service)


def with_image(assistant: Assistant) -> Session:
    image = load_image(picture("sq_big.png"))
    return Session(pixels=assistant.pixel_values(image), shown=image, is_new=True)


def last_of(answers: AsyncIterator[Any]) -> Any:
    async def read() -> Any:
        *_, last = [item async for item in answers]
        return last

    return asyncio.run(read())


def test_a_question_without_an_image_is_not_asked(assistant: Assistant) -> None:
    service = ModelService(assistant, NAME)
    history, session = last_of(Page(service, None, 10_000).answer("What?", [], None, 4, 0, 0))
    assert [message["role"] for message in history] == ["user", "assistant"]
    assert "No image is chosen" in history[1]["content"]
    assert session.turns == []


def test_every_question_shows_the_image_that_it_is_about(
    assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page, session = Page(ModelService(assistant, NAME), None, 10_000), with_image(assistant)
    history: list[Any] = []
    for number in range(2):
        history, session = last_of(page.answer("What?", history, session, 4, 0, 0))
        asked, text = history[2 * number]["content"]
        assert text == "What?"
        assert load_image(asked["path"]).tobytes() == session.shown.tobytes()
        assert asked["alt_text"]
    assert [len(turn.images) for turn in session.turns] == [1, 0, 0, 0]


class Glass:
    """Two slides of one known resolution, and one without."""

    def names(self) -> list[str]:
        return ["a", "b", "unknown"]

    def info(self, name: str) -> SlideInfo:
        return SlideInfo(name, 4000, 2000, None if name == "unknown" else 0.5)

    def thumbnail(self, name: str, max_side_px: int) -> Image.Image:
        return Image.new("RGB", (400, 200), "white")

    def region(self, name: str, left: int, top: int, side: int, max_side_px: int) -> Image.Image:
        return Image.new("RGB", (64, 64), (left % 255, 80, 90))


def test_a_slide_puts_the_old_image_away_until_a_region_is_chosen(assistant: Assistant) -> None:
    page = Page(ModelService(assistant, NAME), Glass(), 10_000)
    session = with_image(assistant)
    shown = asyncio.run(page.take_slide("a", session))
    thumbnail, text, _size, uploaded, kept, *pictures, _ = shown
    assert thumbnail.size == (400, 200)
    assert "0.5" in text
    assert (uploaded, kept.pixels, kept.shown, *pictures) == (None,) * 6
    history, kept = last_of(page.answer("What is shown in this slide?", [], kept, 4, 0, 0))
    assert "No image is chosen" in history[1]["content"]
    asyncio.run(page.take_region("a", 100, kept))
    assert kept.shown is not None
    history, kept = last_of(page.answer("And now?", history, kept, 4, 0, 0))
    assert len(history[2]["content"]) == 2
    assert len(kept.turns) == 2


def test_the_size_of_a_region_stays_while_its_unit_does(assistant: Assistant) -> None:
    page, session = Page(ModelService(assistant, NAME), Glass(), 10_000), Session()
    sizes = [asyncio.run(page.take_slide(name, session))[2] for name in ("a", "b", "unknown", "a")]
    assert [isinstance(size, dict) for size in sizes] == [True, True, False, False]  # dict: skip()
    assert (sizes[2].value, sizes[3].value) == (500, 500)
    assert "px" in sizes[2].label
    assert "µm" in sizes[3].label


def wait_until_free(service: ModelService) -> None:
    deadline = time.monotonic() + 15
    while service.num_jobs and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.num_jobs == 0


def test_old_files_are_deleted_and_new_ones_kept(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "old.png", tmp_path / "a" / "new.png"
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    delete_older(tmp_path, 3600)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["new.png"]
