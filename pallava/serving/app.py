"""Web application: endpoint and page behind one guard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from pallava.serving.file_guard import FileGuard
from pallava.serving.guard import Guard, GuardSettings
from pallava.serving.openai_api import make_router
from pallava.serving.openai_messages import MAX_PIXELS
from pallava.serving.service import ModelService
from pallava.serving.slide_folder import SlideFolder
from pallava.serving.slides import SlideSource

MAX_FOLDER_BYTES = 1 << 30
"""Maximum total size of uploads on disk."""

KEPT_S = 3600
"""Age in seconds after which uploads and pictures are deleted."""


def create_app(
    service: ModelService,
    settings: GuardSettings | None = None,
    *,
    upload_folder: Path | None = None,
    slides: SlideSource | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Guard:
    """Creates the ASGI application.

    Args:
        service: Model to serve.
        settings: Access rules and request limits.
        upload_folder: Folder for uploads to the page, which `xtuner-add serve` deletes on exit;
            None serves the endpoint without a page.
        slides: Slides from which regions can be chosen; for a model of slides, those that it can be
            asked about.
        max_pixels: Maximum number of pixels of all images in a request.
    """
    page: FastAPI | None = None
    bags = None
    if service.assistant.reads_slides:
        from pallava.serving.slide_page import SlideBags, mount_slide_page

        if isinstance(slides, SlideFolder):
            bags = SlideBags(service, slides)
            page = mount_slide_page(service, bags)
    elif upload_folder is not None:
        page = _make_page(service, upload_folder, slides, max_pixels)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(service.close)
            if page is not None and upload_folder is not None:
                # FastAPI does not run the lifespan of mounted applications.
                await stack.enter_async_context(page.router.lifespan_context(page))
                sweeping = asyncio.create_task(_sweep(upload_folder))
                stack.callback(sweeping.cancel)
            yield

    # FastAPI's documentation pages are disabled, because they load scripts from a CDN.
    app = FastAPI(title="xtuner-add", docs_url=None, redoc_url=None, openapi_url=None,
                  lifespan=lifespan)  # fmt: skip

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(request: Request, error: Any) -> JSONResponse:
        message = f"{request.method} {request.url.path!r:.80}: {error.detail}"
        content = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, error.status_code)

    app.include_router(make_router(service, max_pixels, bags.read if bags else None))
    if page is not None and bags is not None:
        app.mount("/", page)
    elif page is not None and upload_folder is not None:
        app.mount("/", FileGuard(page, upload_folder, MAX_FOLDER_BYTES))
    return Guard(app, settings or GuardSettings())


def _make_page(
    service: ModelService, upload_folder: Path, slides: SlideSource | None, max_pixels: int
) -> FastAPI:
    # Gradio reads these on import, or whenever it writes a file.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(upload_folder / "gradio")
    tempfile.tempdir = str(upload_folder)  # folder of incomplete uploads
    from pallava.serving.page import mount_page

    return mount_page(service, slides, max_pixels)


async def _sweep(folder: Path) -> None:
    """Periodically deletes old pictures and uploads, including aborted ones."""
    while True:
        await asyncio.to_thread(delete_older, folder, KEPT_S)
        await asyncio.sleep(KEPT_S / 6)


def delete_older(folder: Path, age_s: float) -> None:
    """Deletes files that have not been modified for a given time."""
    oldest = time.time() - age_s
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if file.lstat().st_mtime < oldest:
                    file.unlink()
