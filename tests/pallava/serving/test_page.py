"""The page lets go of the model when its visitor does; its files go with time."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import pytest

from pallava.inference.assistant import Assistant
from pallava.serving.app import create_app, delete_older
from pallava.serving.page import Page, Session, _start_over
from pallava.serving.service import ModelService
from tests.pallava.browser import chromium
from tests.pallava.serving.conftest import NAME, serving
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
        page.fill("#question textarea", "What?")
        page.click("#ask")
        page.locator("#chat [data-testid=bot]").first.wait_for()
        assert service._jobs == 1
        page.click("#stop")
        wait_until_free(service)
        page.fill("#question textarea", "Why?")
        page.click("#ask")
        page.locator("#chat [data-testid=bot]").nth(1).wait_for()
        assert service._jobs == 1
        page.close()
        wait_until_free(service)


def test_a_new_conversation_stays_new_when_the_old_answer_ends_late(assistant: Assistant) -> None:
    service = ModelService(SlowAssistant.like(assistant, 0.01), NAME)
    page, session = Page(service, None, 10_000), Session()

    async def begin_and_start_over() -> None:
        answering = page.answer("What?", [], session, 400, 0, 0)
        async for history, _ in answering:
            if history[-1]["role"] == "assistant":
                break
        _start_over(session)
        await answering.aclose()  # what Gradio does, some time after the click

    asyncio.run(begin_and_start_over())
    assert session.turns == []


def wait_until_free(service: ModelService) -> None:
    deadline = time.monotonic() + 15
    while service._jobs and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service._jobs == 0


def test_old_files_are_deleted_and_new_ones_kept(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "old.png", tmp_path / "a" / "new.png"
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    delete_older(tmp_path, 3600)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["new.png"]
