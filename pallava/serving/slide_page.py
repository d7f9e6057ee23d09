"""Page for models of slides: a viewer, questions about a slide or a part of it, and evidence."""

from __future__ import annotations

import asyncio
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response

from pallava.inference.evidence import SlideAnswer, find_evidence
from pallava.serving.openai_api import error_response, failure_response, parse_body
from pallava.serving.page_parts import NOTICE
from pallava.serving.service import BusyError, ModelService
from pallava.serving.slide_folder import SlideFolder
from pallava.slide_bags import SlideBag, read_squares
from pallava.text.encoding import ConversationError

_FOLDER = Path(__file__).with_name("viewer")
_FILES = ("viewer.css", "viewer.js", "openseadragon.min.js")
_MAX_QUESTION = 4000
_MAX_NEW_TOKENS = 256
_KEPT_S = 3600


class SlideBags:
    """Tiles of the slides of a folder, by the names of its listing.

    Error messages name slides as clients know them, without the path of the folder.

    Args:
        service: Model of slides.
        slides: Folder of slides.
    """

    def __init__(self, service: ModelService, slides: SlideFolder) -> None:
        self.assistant = service.assistant
        self.slides = slides

    def read(self, name: str) -> SlideBag:
        """Returns the tiles of a slide, embedding it first if necessary.

        Raises:
            FileNotFoundError: If the slide is not in the listing.
            ValueError: If it cannot be embedded, or its features cannot be used.
        """
        path = self.slides.path(name)
        try:
            bag: SlideBag = self.assistant.pixel_values(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from error
        return bag

    def squares(self, name: str) -> tuple[Any, int]:
        """Returns left and top of the tiles `(N, 2)` and their side, in level-0 pixels."""
        return read_squares(self.assistant.anyres.features_file(self.slides.path(name)))


def mount_slide_page(service: ModelService, bags: SlideBags) -> FastAPI:
    """Creates the page as an ASGI application.

    Args:
        service: Model of slides.
        bags: Slides that can be asked about.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    slides = bags.slides
    page = (_FOLDER / "index.html").read_text(encoding="utf-8")
    page = page.replace("{{notice}}", NOTICE).replace("{{model}}", html.escape(service.name))

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/viewer/{file}")
    async def file(file: str) -> Response:
        return FileResponse(_FOLDER / file) if file in _FILES else Response(status_code=404)

    @app.get("/slides")
    async def listing() -> Response:
        return JSONResponse(await asyncio.to_thread(slides.names))

    @app.get("/slide")
    async def info(name: str) -> Response:
        return await _read(lambda: JSONResponse(vars(slides.info(name))))

    @app.get("/tile")
    async def tile(name: str, level: int, column: int, row: int) -> Response:
        return await _read(lambda: _jpeg(slides.tile(name, level, column, row)))

    @app.post("/ask")
    async def ask(request: Request) -> Response:
        try:
            work = await _read_question(service, bags, parse_body(await request.body()))
        except (ValueError, FileNotFoundError) as error:
            return error_response(error)
        try:
            return JSONResponse(await service.call(work))
        except (BusyError, ConversationError) as error:
            return error_response(error)
        except Exception:
            return failure_response()

    return app


async def _read_question(
    service: ModelService, bags: SlideBags, body: Any
) -> Callable[[], dict[str, Any]]:
    """Returns the function that answers `{slide, question, region, evidence}`.

    `region` is left, top, right and bottom in level-0 pixels, or null for the whole slide; with
    `evidence` the answer comes with the tiles that it depends on; see `viewer/viewer.js`.
    """
    if not isinstance(body, dict):
        raise ValueError("expected a JSON object")
    name, question = body.get("slide"), body.get("question")
    if not isinstance(name, str) or not isinstance(question, str) or not question.strip():
        raise ValueError("slide and question: expected texts")
    if len(question) > _MAX_QUESTION:
        raise ValueError(f"question: longer than {_MAX_QUESTION} characters")
    bag = await asyncio.to_thread(bags.read, name)
    coords, side = await asyncio.to_thread(bags.squares, name)
    shown = torch.ones(len(coords), dtype=torch.bool)
    if (region := body.get("region")) is not None:
        try:
            left, top, right, bottom = map(float, region)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"region: expected four numbers, found {region!r:.80}") from error
        centres = coords + side / 2
        inside = (centres >= (left, top)) & (centres < (right, bottom))
        shown = torch.from_numpy(inside.all(axis=1))
        if not shown.any():
            raise ValueError("no tissue in this view: zoom out, or move to tissue")
        # A separate bag, so that the model sees nothing outside the view.
        bag = bag._replace(features=bag.features[shown], positions=bag.positions[shown])
    coords = coords[shown.numpy()]

    def work() -> dict[str, Any]:
        try:
            service.assistant.encode(question, has_image=True)
        except ValueError as error:  # told apart from errors of the model itself
            raise ConversationError(str(error)) from error
        answer = SlideAnswer(service.assistant, bag, question.strip(), _MAX_NEW_TOKENS)
        found = {"answer": answer.text, "tiles": len(bag.features)}
        if body.get("evidence"):
            evidence = find_evidence(answer)
            cited = evidence.cited.numpy()[: evidence.fields()["tiles"]]
            squares = {"squares": coords[cited].tolist(), "side": side}
            found["evidence"] = {**evidence.fields(), **squares}
        return found

    return work


async def _read(make: Callable[[], Response]) -> Response:
    try:
        return await asyncio.to_thread(make)
    except FileNotFoundError as error:
        return error_response(error, 404)
    except ValueError as error:
        return error_response(error)


def _jpeg(image: Any) -> Response:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    headers = {"cache-control": f"private, max-age={_KEPT_S}"}
    return Response(buffer.getvalue(), media_type="image/jpeg", headers=headers)
