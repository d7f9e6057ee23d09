"""The web application: endpoint and page behind one guard."""

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
from pallava.serving.slides import SlideSource

MAX_FOLDER_BYTES = 1 << 30
"""What all uploads together may take on the disk before they are deleted."""

KEPT_S = 3600
"""How long uploads and pictures are kept."""


def create_app(
    service: ModelService,
    settings: GuardSettings | None = None,
    *,
    upload_folder: Path | None = None,
    slides: SlideSource | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Guard:
    """Makes the ASGI application.

    Args:
        service: The model.
        settings: Who may ask, and how much.
        upload_folder: For what the page is given, emptied by `xtuner-add serve` in the end; None
            for the endpoint without a page.
        slides: Slides to choose regions from.
        max_pixels: Of the images of a request together.
    """
    page: FastAPI | None = None
    if upload_folder is not None:
        page = _make_page(service, upload_folder, slides, max_pixels)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(service.close)
            if page is not None and upload_folder is not None:
                # Nobody else starts what lies inside another application.
                await stack.enter_async_context(page.router.lifespan_context(page))
                sweeping = asyncio.create_task(_sweep(upload_folder))
                stack.callback(sweeping.cancel)
            yield

    # Without FastAPI's pages about the routes, which load scripts from elsewhere.
    app = FastAPI(title="xtuner-add", docs_url=None, redoc_url=None, openapi_url=None,
                  lifespan=lifespan)  # fmt: skip

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(request: Request, error: Any) -> JSONResponse:
        message = f"{request.method} {request.url.path!r:.80}: {error.detail}"
        content = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, error.status_code)

    app.include_router(make_router(service, max_pixels))
    if page is not None and upload_folder is not None:
        app.mount("/", FileGuard(page, upload_folder, MAX_FOLDER_BYTES))
    return Guard(app, settings or GuardSettings())


def _make_page(
    service: ModelService, upload_folder: Path, slides: SlideSource | None, max_pixels: int
) -> FastAPI:
    # Read by Gradio when it is imported, or whenever it writes a file.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(upload_folder / "gradio")
    tempfile.tempdir = str(upload_folder)  # an upload that is still coming
    from pallava.serving.page import mount_page

    return mount_page(service, slides, max_pixels)


async def _sweep(folder: Path) -> None:
    """Deletes old files: pictures and uploads, those included that were broken off."""
    while True:
        await asyncio.to_thread(delete_older, folder, KEPT_S)
        await asyncio.sleep(KEPT_S / 6)


def delete_older(folder: Path, age_s: float) -> None:
    """Deletes the files of a folder that nobody wrote to for a while."""
    oldest = time.time() - age_s
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if file.lstat().st_mtime < oldest:
                    file.unlink()
