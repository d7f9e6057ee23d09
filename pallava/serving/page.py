"""Web page: an image or slide region, what the model sees of it, and a conversation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from pallava.inference.streaming import Sampling
from pallava.modeling.attention_maps import sub_image_attention
from pallava.serving.page_parts import about, head, picture, shown_text
from pallava.serving.pictures import (
    attention_picture,
    cut_picture,
    marked_picture,
    tile_pictures,
)
from pallava.serving.service import Answers, BusyError, ModelService
from pallava.serving.slides import MAX_REGION_PX, SlideInfo, SlideSource, square_around
from pallava.text.encoding import ConversationError
from pallava.text.turns import Turn
from pathcore.images import decode_image

EXAMPLES = (
    "Describe this image.",
    "Which organ is this?",
    "Is there necrosis?",
    "What do the nuclei look like?",
)
_SESSIONS = 64
_SESSION_S = 3600
_SWEEP_S = 600
_THUMBNAIL_PX = 1000
_ASKED_PX = 160
_FIRST_REGION_UM = 500.0
_NO_IMAGE = (
    "No image is chosen, so the model was not asked. Choose an image, or click on the slide, and "
    "ask again."
)
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# A step that waits for nothing answers its own request instead of joining the queue.
_DIRECT: dict[str, Any] = {**_QUIET, "queue": False}


@dataclass
class Session:
    """State of one visitor.

    Attributes:
        turns: Conversation so far.
        pixels: Current image, preprocessed for the model.
        shown: Current image, downscaled for the conversation.
        is_new: Whether the current image has not been sent to the model yet.
        centre: Centre of the region on the slide, as fractions of its sides.
        unit: Unit of the region's side.
        answering: Answers that are being generated for the conversation.
    """

    turns: list[Turn] = field(default_factory=list)
    pixels: Tensor | None = None
    shown: Image.Image | None = None
    is_new: bool = False
    centre: tuple[float, float] = (0.5, 0.5)
    unit: Literal["µm", "px"] = "µm"
    answering: list[Answers] = field(default_factory=list)


def mount_page(service: ModelService, slides: SlideSource | None, max_pixels: int) -> FastAPI:
    """Creates the page as an ASGI application.

    Args:
        service: Model to serve.
        slides: Slides from which regions can be chosen.
        max_pixels: Maximum number of pixels of an image.
    """
    page = Page(service, slides, max_pixels)
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        # System fonts, so that none are downloaded.
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.build(),
        path="/",
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )


class Page:
    """Layout and event handlers of the page."""

    def __init__(self, service: ModelService, slides: SlideSource | None, max_pixels: int) -> None:
        self.service = service
        self.slides = slides
        self.max_pixels = max_pixels

    def build(self) -> gr.Blocks:
        """Builds the layout and connects the event handlers."""
        # Uploads and pictures are deleted after an hour, the rest when the server exits.
        with gr.Blocks(
            title="Pathology assistant",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(_SWEEP_S, _SESSION_S),
        ) as blocks:
            session = gr.State(time_to_live=_SESSION_S)
            gr.HTML(head(self.service.name))
            with gr.Row(equal_height=False):
                with gr.Column(scale=6, min_width=420):
                    sources = self._lay_out_sources()
                    shown = self._lay_out_pictures()
                with gr.Column(scale=5, min_width=380):
                    self._lay_out_chat(session)
            self._connect_sources(sources, [session, *shown])
            if self.slides is not None:
                self._connect_slides(blocks, sources, [session, *shown])
        blocks.state_session_capacity = _SESSIONS
        return blocks.queue(api_open=False)

    def _lay_out_sources(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}

        def upload() -> None:
            parts["upload"] = gr.Image(
                label="Image",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=300,
                elem_id="picture",
                buttons=[],
                placeholder="Drop a histology image here, or click to choose one",
            )

        if self.slides is None:
            upload()
            return parts
        with gr.Tabs():
            with gr.Tab("Image"):
                upload()
            with gr.Tab("Region of a slide", elem_id="slide-tab"):
                with gr.Row():
                    parts["name"] = gr.Dropdown(
                        label="Slide", choices=self.slides.names(), value=None, scale=3,
                        elem_id="slide-name",
                    )  # fmt: skip
                    parts["size"] = gr.Number(
                        label="Side of the region (µm)", value=_FIRST_REGION_UM, minimum=1,
                        scale=2, elem_id="region-size",
                    )  # fmt: skip
                gr.HTML(
                    "Click on the slide to move the region there",
                    elem_classes="caption",
                    padding=False,
                )
                parts["slide"] = gr.Image(elem_id="slide", **picture(360, buttons=[]))
                parts["about"] = gr.HTML(elem_classes="note", elem_id="about", padding=False)
        return parts

    def _lay_out_pictures(self) -> list[Any]:
        with gr.Row(equal_height=True):
            with gr.Column(min_width=200):
                gr.HTML(
                    "What the model sees: its sub-images", elem_classes="caption", padding=False
                )
                cut = gr.Image(elem_id="cut", **picture(240))
            with gr.Column(min_width=200):
                gr.HTML("Where the connector looks", elem_classes="caption", padding=False)
                heat = gr.Image(elem_id="attention", **picture(240))
        note = gr.HTML(elem_classes="note", elem_id="note", padding=False)
        with gr.Accordion("The tiles as the encoder receives them", open=False):
            tiles = gr.Gallery(
                show_label=False, columns=9, height=170, object_fit="contain", interactive=False,
                elem_id="tiles", buttons=[],
            )  # fmt: skip
        return [cut, heat, tiles, note]

    def _lay_out_chat(self, session: Any) -> None:
        chat = gr.Chatbot(
            show_label=False,
            height=520,
            elem_id="chat",
            render_markdown=False,
            buttons=[],
            placeholder="Choose an image, then ask about it.",
        )
        with gr.Row(elem_id="examples"):
            examples = [gr.Button(text, size="sm", min_width=0) for text in EXAMPLES]
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                placeholder="Ask about the image",
                show_label=False,
                container=False,
                max_length=4000,
                scale=7,
                elem_id="question",
            )
            ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
            stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        with gr.Accordion("Settings", open=False):
            length = gr.Slider(
                1, 2048, 512, step=1, label="Longest answer (tokens)", elem_id="length"
            )
            temperature = gr.Slider(
                0, 2, 0, step=0.05, label="Temperature", info="0: always the most probable word"
            )
            seed = gr.Number(0, precision=0, minimum=0, label="Seed, when temperature is above 0")
        fresh = gr.Button("New conversation", size="sm", elem_id="fresh")
        asked = gr.State("")
        settings = [length, temperature, seed]
        answering: dict[str, Any] = {
            "inputs": [asked, chat, session, *settings],
            "outputs": [chat, session],
            "concurrency_limit": self.service.capacity + 1,  # the service rejects the excess
            **_QUIET,
        }
        running = [
            button.click(lambda text: text, button, asked, **_DIRECT).then(self.answer, **answering)
            for button in examples
        ]
        for event in (question.submit, ask.click):
            taken = event(lambda text: (text, ""), question, [asked, question], **_DIRECT)
            running.append(taken.then(self.answer, **answering))
        stop.click(None, None, None, cancels=running, **_QUIET)
        for event in (fresh.click, chat.clear):
            event(_start_over, session, [chat, session], **_DIRECT)

    def _connect_sources(self, parts: dict[str, Any], outputs: list[Any]) -> None:
        inputs = [parts["upload"], outputs[0]]
        parts["upload"].upload(self.take_upload, inputs, outputs, **_QUIET)
        parts["upload"].clear(_put_away, outputs[0], outputs, **_DIRECT)

    def _connect_slides(self, blocks: Any, parts: dict[str, Any], outputs: list[Any]) -> None:
        assert self.slides is not None
        name, size, session = parts["name"], parts["size"], outputs[0]
        slide = [parts["slide"], parts["about"]]
        names = self.slides.names
        blocks.load(lambda: gr.Dropdown(choices=names()), None, name, **_QUIET)
        name.input(
            self.take_slide, [name, session], [*slide, size, parts["upload"], *outputs], **_QUIET
        )
        inputs = [name, size, session]
        # Every click counts and the last one wins. By default Gradio drops clicks while one is
        # being answered: for good, if the answer to that one is lost with a closed connection.
        common: dict[str, Any] = {"trigger_mode": "multiple", **_QUIET}
        parts["slide"].select(self.take_click, inputs, [*slide, *outputs], **common)
        size.submit(self.take_region, inputs, [*slide, *outputs], **common)

    async def take_upload(self, path: str | None, session: Session | None) -> list[Any]:
        """Handles an upload; `path` is that of Gradio's file in the upload folder."""
        if path is None:
            return _put_away(session)
        file = Path(path)
        try:
            image = await asyncio.to_thread(
                lambda: decode_image(
                    file.read_bytes(), name="the image", max_pixels=self.max_pixels
                )
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return await self._show(image, session)

    async def take_slide(self, name: str | None, session: Session | None) -> list[Any]:
        """Shows a slide of the listing and removes the previous image.

        Otherwise, until a region is chosen, questions about the slide would go to that image.
        """
        session = session or Session()
        if name is None:
            return [None, "", gr.skip(), None, *_put_away(session)]
        info, thumbnail = await self._slide(name)
        size: Any = gr.skip()  # keep the chosen size while the unit stays the same
        unit: Literal["µm", "px"] = "px" if info.mpp is None else "µm"
        if unit == "px":
            side = float(max(1, min(info.width_px, info.height_px) // 4))
            size = gr.Number(side, label="Side of the region (px)")
        elif session.unit != unit:
            size = gr.Number(_FIRST_REGION_UM, label="Side of the region (µm)")
        session.unit = unit
        return [thumbnail, about(info), size, None, *_put_away(session)]

    async def take_click(
        self, name: str | None, size: float | None, session: Session | None, event: gr.SelectData
    ) -> list[Any]:
        """Selects the region around the clicked position."""
        if name is None:
            raise gr.Error("Choose a slide first.", print_exception=False)
        session = session or Session()
        _, thumbnail = await self._slide(name)
        try:
            x, y = (float(part) for part in event.index)
        except (TypeError, ValueError) as error:
            raise gr.Error("Click on the slide.", print_exception=False) from error
        session.centre = (x / thumbnail.width, y / thumbnail.height)
        return await self.take_region(name, size, session)

    async def take_region(
        self, name: str | None, size: float | None, session: Session | None
    ) -> list[Any]:
        """Makes a slide region the current image."""
        if name is None or self.slides is None:
            raise gr.Error("Choose a slide first.", print_exception=False)
        session = session or Session()
        info, thumbnail = await self._slide(name)
        try:
            left, top, side = square_around(info, session.centre, size or 0)
            image = await asyncio.to_thread(
                self.slides.region, name, left, top, side, MAX_REGION_PX
            )
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        width, height = info.width_px, info.height_px
        box = (left / width, top / height, (left + side) / width, (top + side) / height)
        shown = await self._show(image, session)
        return [marked_picture(thumbnail, box), about(info, left, top, side), *shown]

    async def _slide(self, name: str) -> tuple[SlideInfo, Image.Image]:
        assert self.slides is not None
        try:
            info = await asyncio.to_thread(self.slides.info, name)
            return info, await asyncio.to_thread(self.slides.thumbnail, name, _THUMBNAIL_PX)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def _show(self, image: Image.Image, session: Session | None) -> list[Any]:
        session = session or Session()
        assistant = self.service.assistant
        anyres = assistant.anyres
        pixels = await asyncio.to_thread(assistant.pixel_values, image)
        session.pixels, session.is_new = pixels, True
        session.shown = image.copy()
        session.shown.thumbnail((_ASKED_PX, _ASKED_PX))
        cut = await asyncio.to_thread(cut_picture, image, anyres)
        tiles = tile_pictures(pixels, anyres)
        captions = ["thumbnail", *(f"sub-image {number}" for number in range(1, len(tiles)))]
        gallery = list(zip(tiles, captions, strict=True))
        text = shown_text(image, anyres, len(tiles) - 1)
        if not anyres.sub_images:
            return [session, cut, None, gallery, text]
        try:
            attention = await self.service.call(
                sub_image_attention, assistant.model, pixels.to(assistant.device)
            )
        except BusyError:
            return [session, cut, None, gallery, "The model is busy: no attention is shown."]
        assert attention is not None  # the image has sub-images
        heat = await asyncio.to_thread(attention_picture, image, anyres, attention)
        return [session, cut, heat, gallery, text]

    async def answer(
        self,
        question: str,
        history: list[dict[str, Any]],
        session: Session | None,
        length: float,
        temperature: float,
        seed: float | None,
    ) -> AsyncIterator[tuple[list[dict[str, Any]], Session]]:
        """Streams the answer into the conversation."""
        session = session or Session()
        question = question.strip()
        if not question:
            return
        if session.pixels is None or session.shown is None:
            refusal = {"role": "assistant", "content": _NO_IMAGE}
            yield [*history, {"role": "user", "content": question}, refusal], session
            return
        images = (session.pixels,) if session.is_new else ()
        earlier = session.turns
        turns = [*earlier, Turn("user", question, images)]
        # Every question shows its image, since another image may be chosen for the next one.
        asked = {"path": _saved(session.shown), "alt_text": "The image that is asked about"}
        history = [*history, {"role": "user", "content": [asked, question]}]
        try:
            sampling = Sampling(int(length), float(temperature), seed=int(seed or 0))
            answers = self.service.ask(turns, sampling)
        except (BusyError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        session.answering.append(answers)
        text = ""
        try:
            yield history, session
            async for _, item in answers:
                if isinstance(item, str):
                    text += item
                    yield [*history, {"role": "assistant", "content": text}], session
        except ConversationError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:  # also if generation is stopped or the page closed
            is_over = answers.is_cancelled  # a new conversation was started meanwhile
            answers.cancel()
            session.answering.remove(answers)
            if text and session.turns is earlier:
                session.turns, session.is_new = [*turns, Turn("assistant", text)], False
        if is_over:
            if not (session.turns or session.answering):
                # A piece of this answer may reach the page after it was cleared; this comes last.
                yield [], session
        elif not text:
            yield [*history, {"role": "assistant", "content": "(no answer)"}], session


def _saved(image: Image.Image) -> str:
    """Saves a picture to the folder that Gradio serves and that is swept regularly."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"asked-{secrets.token_hex(8)}.png"
    image.save(path)
    return str(path)


def _start_over(session: Session | None) -> tuple[list[Any], Session]:
    session = session or Session()
    # Gradio's `cancels` would race with the reply to this request: a piece of the answer that
    # arrives between the two would stay on the page.
    for answers in session.answering:
        answers.cancel()
    session.turns, session.is_new = [], session.pixels is not None
    return [], session


def _put_away(session: Session | None) -> list[Any]:
    session = session or Session()
    session.pixels, session.shown, session.is_new = None, None, False
    return [session, None, None, None, ""]
