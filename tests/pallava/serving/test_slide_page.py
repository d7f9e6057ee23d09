"""The page of a slide model: viewer, questions about a slide or a view, evidence, errors."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from pallava.inference.assistant import Assistant
from pallava.modeling.llava import PALLaVA
from pallava.serving import slide_page
from pallava.serving.app import create_app
from pallava.serving.guard import GuardSettings
from pallava.serving.service import ModelService
from pallava.serving.slide_folder import SlideFolder
from pallava.slide_bags import SlideBagError, SlidePreparation
from tests.pallava import goldens
from tests.pallava.browser import chromium
from tests.pallava.modeling.test_slide_tokens import FEATURES, connector, encoder
from tests.pallava.serving.conftest import serving
from tests.wsi.slides import tissue_pixels, write_svs

WIDTH, HEIGHT, SIDE = 2400, 1500, 100
QUESTION = "Which organ is this?"
RED = (200, 30, 58)
"""Outline of a tile, in `viewer.js`."""


def write_features(path: Path) -> Path:
    """Random features of tiles over the whole slide."""
    x, y = np.meshgrid(np.arange(0, WIDTH, SIDE), np.arange(0, HEIGHT, SIDE))
    coords = np.stack([x.ravel(), y.ravel()], axis=1)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["features"] = rng.standard_normal((len(coords), FEATURES)).astype(np.float32)
        file["coords"] = coords
        file["coords"].attrs["patch_size_level0"] = SIDE
    return path


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("served_slides")
    for number, name in enumerate(("a", "b")):
        pixels = tissue_pixels(WIDTH, HEIGHT, seed=number)
        write_svs(root / "slides" / f"{name}.svs", pixels, mpp=0.5)
    features = write_features(root / "a.h5")

    def embed(slide: Path) -> Path:
        if slide.stem != "a":
            raise SlideBagError(f"slide {slide}: no tissue")
        return features

    assistant = Assistant(
        PALLaVA(goldens.llm(r=0), encoder(), connector()).requires_grad_(False),
        goldens.tokenizer(),
        SlidePreparation(FEATURES, embed=embed),
    )
    with pytest.MonkeyPatch.context() as patch:
        # The model has random weights and never ends an answer; removing anything changes a long
        # one, so that there would be no evidence.
        patch.setattr(slide_page, "_MAX_NEW_TOKENS", 3)
        service = ModelService(assistant, "tiny")
        app = create_app(
            service,
            GuardSettings(hosts=("127.0.0.1",)),
            upload_folder=root,
            slides=SlideFolder(root / "slides"),
        )
        with serving(app) as port:
            yield f"http://127.0.0.1:{port}"


def get(url: str, **parameters: object) -> bytes:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}") as reply:
        return bytes(reply.read())


def post(url: str, body: Any) -> dict[str, Any]:
    return send(url, json.dumps(body).encode())


def send(url: str, content: bytes) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, content, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return dict(json.loads(reply.read()))
    except urllib.error.HTTPError as error:
        return {"status": error.code, **json.loads(error.read())}


def test_tiles_are_the_pixels_of_the_slide(address: str) -> None:
    assert json.loads(get(f"{address}/slides")) == ["a.svs", "b.svs"]
    info = json.loads(get(f"{address}/slide", name="a.svs"))
    assert info == {"name": "a.svs", "width_px": WIDTH, "height_px": HEIGHT, "mpp": 0.5}
    pixels = tissue_pixels(WIDTH, HEIGHT, seed=0).astype(int)
    for level, scale in ((12, 1), (11, 2), (9, 8)):
        place = {"level": level, "column": 1, "row": 0}
        tile = Image.open(io.BytesIO(get(f"{address}/tile", name="a.svs", **place)))
        left = 256 * scale
        expected = Image.fromarray(
            pixels[: 256 * scale, left : left + 256 * scale].astype(np.uint8)
        ).reduce(scale)
        expected = expected.crop((0, 0, *tile.size))
        difference = np.abs(np.asarray(tile, int) - np.asarray(expected, int))
        assert difference.mean() < 8, (level, difference.mean())
    edge = Image.open(io.BytesIO(get(f"{address}/tile", name="a.svs", level=12, column=9, row=5)))
    assert edge.size == (WIDTH - 9 * 256, HEIGHT - 5 * 256)
    for wrong in (
        {"column": 10}, {"row": 6}, {"level": 13}, {"level": -1}, {"name": "../a.svs"},
        {"level": -(10**5)}, {"level": 10**400}, {"row": 10**400},
    ):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(f"{address}/tile", **{"name": "a.svs", "level": 12, "column": 0, "row": 0, **wrong})
        assert caught.value.code == 404


def test_answers_about_a_slide_and_a_region(address: str) -> None:
    ask = {"slide": "a.svs", "question": QUESTION, "evidence": True}
    whole = post(f"{address}/ask", ask)
    count = (WIDTH // SIDE) * (HEIGHT // SIDE)
    assert whole["tiles"] == whole["evidence"]["of"] == count
    assert whole["evidence"]["told"] and len(whole["evidence"]["squares"]) > 0
    region = [600, 300, 1400, 900]
    part = post(f"{address}/ask", {**ask, "region": region})
    assert part["tiles"] == 8 * 6
    for x, y in part["evidence"]["squares"]:
        assert 600 <= x < 1400 and 300 <= y < 900
    outside = post(f"{address}/ask", {**ask, "region": [5000, 5000, 6000, 6000]})
    assert outside["status"] == 400 and "no tissue in this view" in outside["error"]["message"]
    bad = post(f"{address}/ask", {**ask, "slide": "b.svs"})
    assert bad["error"]["message"] == "slide b.svs: no tissue"  # without the folder's path
    assert (
        "not in the listing" in post(f"{address}/ask", {**ask, "slide": "/x"})["error"]["message"]
    )
    for wrong in ([], {"slide": "a.svs"}, {**ask, "question": "\ud800"}):
        assert post(f"{address}/ask", wrong)["status"] == 400
    for place in ([1, 2], "x", [0, 0, 10**400, 1], [None, 0, 1, 1], True):
        bad = post(f"{address}/ask", {**ask, "region": place})
        assert bad["status"] == 400 and "expected four numbers" in bad["error"]["message"]
    deep = "[" * 100_000
    for content in (deep, f'{{"slide": {deep}', "", "\0"):
        bad = send(f"{address}/ask", content.encode())
        assert bad["status"] == 400 and "no JSON" in bad["error"]["message"]
    bad = post(f"{address}/ask", {**ask, "question": "<image> <image>"})
    assert bad["status"] == 400 and "2 <image>" in bad["error"]["message"]


def test_a_failing_model_is_not_the_clients_fault(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: PALLaVA, *_: Any, **__: Any) -> Any:
        raise ValueError("inner")

    monkeypatch.setattr(PALLaVA, "generate_answer", failing)
    found = post(f"{address}/ask", {"slide": "a.svs", "question": QUESTION})
    assert found["status"] == 500 and found["error"]["type"] == "server_error"
    assert "inner" not in found["error"]["message"] and "inner" in caplog.text


def test_the_endpoint_takes_slides_by_name(address: str) -> None:
    def body(url: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": "tiny", "messages": messages, "max_tokens": 3}

    reply = post(f"{address}/v1/chat/completions", body("slide:a.svs"))
    found = reply["choices"][0]["message"]["content"]
    assert found == post(f"{address}/ask", {"slide": "a.svs", "question": QUESTION})["answer"]
    for url, fault in (
        ("slide:b.svs", "slide b.svs: no tissue"),
        ("slide:../a.svs", "not in the listing"),
        ("data:image/png;base64,AAAA", "this model reads slides; expected slide:NAME"),
    ):
        assert fault in post(f"{address}/v1/chat/completions", body(url))["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_a_visitor_zooms_asks_and_sees_the_evidence(address: str, width: int) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 850})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.goto(address)
        page.wait_for_function(
            "viewer.world.getItemCount() && viewer.world.getItemAt(0).getFullyLoaded()"
        )
        bar = page.locator("#scale")
        first = bar.inner_text()
        assert first.endswith(("µm", "mm"))
        page.fill("#question", QUESTION)
        page.click("#ask")
        page.locator("#answers button").wait_for()
        item = page.locator("#answers li")
        assert "a.svs, the whole slide" in item.inner_text()
        assert "in 0 of 20 trials" in item.inner_text()
        assert item.locator("img").get_attribute("alt") == "a.svs: the whole slide"
        assert _num_red(page) > 50
        # The bar is as long as it says: 2,400 px at 0.5 µm are the width of the slide.
        scale = "viewer.world.getItemAt(0).viewportToImageZoom(viewer.viewport.getZoom(true))"
        length = float(first.split()[0]) * (1000 if first.endswith("mm") else 1)
        drawn = page.evaluate("document.querySelector('#scale i').getBoundingClientRect().width")
        assert drawn == pytest.approx(length / 0.5 * page.evaluate(scale), abs=1)
        for _ in range(2):
            page.click("#in")
        page.wait_for_function(f"document.querySelector('#scale').innerText !== {first!r}")
        page.check("input[value=view]")
        page.fill("#question", "Why?")
        page.press("#question", "Enter")
        page.wait_for_function("document.querySelectorAll('#answers button').length === 2")
        assert " mm at (" in page.locator("#answers li").first.inner_text()
        page.locator("#answers button").last.click()
        page.wait_for_function(f"document.querySelector('#scale').innerText === {first!r}")
        # On a phone the question stands under the slide, and nothing is wider than the screen.
        slide, form = (page.locator(part).bounding_box() for part in ("#frame", "#form"))
        assert (form["y"] > slide["y"] + slide["height"]) == (width < 760)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.select_option("#name", "b.svs")
        page.fill("#question", QUESTION)
        page.click("#ask")
        page.locator("#status.error").wait_for()
        assert page.locator("#status").inner_text() == "slide b.svs: no tissue"
        assert [fault for fault in faults if "400" not in fault] == []
        _check_accessibility(page)


def _num_red(page: Any) -> int:
    """Pixels of the overlay in the colour of cited tiles."""
    return int(
        page.evaluate(
            """([red, green, blue]) => {
              const canvas = document.getElementById("marks");
              const { data } = canvas.getContext("2d").getImageData(
                0, 0, canvas.width, canvas.height);
              let found = 0;
              for (let i = 0; i < data.length; i += 4) {
                found += data[i] === red && data[i + 1] === green && data[i + 2] === blue;
              }
              return found;
            }""",
            list(RED),
        )
    )


def _check_accessibility(page: Any) -> None:
    """Nothing serious by axe, where the development requirements are installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] not in ("minor",)]
    assert serious == []
