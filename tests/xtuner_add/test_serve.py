"""`xtuner-add serve` as its own process: paths, sizes, keys, and the page in a browser."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from pallava import load_model
from pallava.inference.assistant import Assistant
from pallava.inference.streaming import Sampling, converse
from pallava.serving.file_guard import folder_bytes
from pallava.text.turns import Turn
from tests.pallava import goldens
from tests.pallava.browser import chromium
from tests.pallava.serving.conftest import send_raw
from tests.pallava.tiny_folders import make_folders
from tests.xtuner_add.served_model import Server, make_slides, served
from xtuner_add import cli

KEY = "0123456789abcdef-key"
PICTURE = goldens.GOLDEN / "anyres" / "sq_big.png"
HUGE = 2 << 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folders(tmp_path_factory.mktemp("serve"), goldens.CROSSATTN_STATE)
    make_slides(folder / "slides")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with served(root, "--slides", "slides", "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def assistant(root: Path) -> Assistant:
    return load_model(root / "llama", root / "llava", root / "plip", device="cpu")


def join(server: Server, function: int, data: list[Any], **more: Any) -> httpx.Response:
    body = {"data": data, "fn_index": function, "session_hash": "abc", "trigger_id": 1, **more}
    return httpx.post(f"{server.address}/gradio_api/queue/join", json=body, timeout=60)


def events(server: Server) -> list[dict[str, Any]]:
    """What the page is told until its jobs are done."""
    found = []
    address = f"{server.address}/gradio_api/queue/data?session_hash=abc"
    with httpx.stream("GET", address, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if found[-1]["msg"] in ("process_completed", "close_stream"):
                    return found
    return found


def functions(server: Server) -> dict[str, int]:
    """The page's functions by name."""
    config = httpx.get(f"{server.address}/config").json()
    return {entry["api_name"]: entry["id"] for entry in config["dependencies"]}


def upload(server: Server, file: Path) -> str:
    address = f"{server.address}/gradio_api/upload"
    with file.open("rb") as content:
        answer = httpx.post(address, files={"files": ("a.png", content, "image/png")})
    assert answer.status_code == 200, answer.text
    return str(answer.json()[0])


def file_of(path: object, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png", **more}


def test_an_uploaded_image_is_taken_and_lies_where_it_is_deleted(server: Server) -> None:
    path = upload(server, PICTURE)
    assert Path(path).is_relative_to(server.temporary)
    assert join(server, functions(server)["take_upload"], [file_of(path), None]).status_code == 200
    last = events(server)[-1]
    assert last["success"], last
    pictures = [part["path"] for part in last["output"]["data"] if isinstance(part, dict)]
    assert len(pictures) == 2
    shown = httpx.get(f"{server.address}/gradio_api/file={pictures[0]}")
    assert shown.headers["content-type"].startswith("image/")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{temporary}/../llama/config.json",
        "{upload}/../../../../llama/config.json",
        "../../../etc/passwd",
        "llama/config.json",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "%2Fetc%2Fpasswd",
        "\0",
        7,
        ["/etc/passwd"],
    ],
)
def test_no_path_of_a_request_reaches_the_disk(server: Server, path: object) -> None:
    if isinstance(path, str):
        path = path.format(temporary=server.temporary, upload=upload(server, PICTURE))
    refused = join(server, functions(server)["take_upload"], [file_of(path), None])
    assert refused.status_code == 400
    assert "uploaded to this server" in refused.json()["error"]["message"]
    nested = join(server, 0, [{"value": [{"deep": file_of(path)}]}])
    assert nested.status_code == 400
    direct = {"data": [file_of(path)], "fn_index": 0, "session_hash": "abc"}
    answer = httpx.post(f"{server.address}/gradio_api/run/predict", json=direct)
    assert answer.status_code == 400
    if isinstance(path, str) and "\0" not in path:
        read = httpx.get(f"{server.address}/gradio_api/file={path}")
        assert read.status_code in (403, 404)
        assert "root:" not in read.text


def test_a_data_url_in_a_message_is_not_written(server: Server) -> None:
    path = upload(server, PICTURE)
    payload = file_of(path, url="data:image/png;base64,aGVsbG8=")
    assert join(server, functions(server)["take_upload"], [payload, None]).status_code == 200
    assert events(server)[-1]["success"], "the uploaded file was read, not the text in the URL"
    texts = [file.read_bytes() for file in server.temporary.rglob("*") if file.is_file()]
    assert b"hello" not in texts
    assert PICTURE.read_bytes() in texts


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "link.png", "tissue.tiff/../x"])
def test_a_slide_is_looked_up_in_the_listing(server: Server, name: str) -> None:
    assert join(server, functions(server)["take_slide"], [name, None]).status_code in (200, 422)
    assert not events(server)[-1]["success"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=https://example.org/"),
        ("GET", "/gradio_api/file=https://example.org/"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/gradio_api/call/take_slide"),
        ("POST", "/gradio_api/run/take_slide"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/login"),
        ("PUT", "/config"),
    ],
)
def test_routes_that_the_page_does_not_need_are_absent(
    server: Server, method: str, path: str
) -> None:
    answer = httpx.request(method, server.address + path, json={} if method != "GET" else None)
    assert answer.status_code in (403, 404, 405)


def huge_file(chunked: bool) -> Iterator[bytes]:
    """Yields a file of two gigabytes as the body of a request."""
    opening = b'--xx\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    piece = bytes(1 << 18)
    for part in (opening, *[piece] * (HUGE // len(piece))):
        yield f"{len(part):x}\r\n".encode() + part + b"\r\n" if chunked else part


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/v1/chat/completions"])
@pytest.mark.parametrize("framing", [f"Content-Length: {HUGE}", "Transfer-Encoding: chunked"])
def test_two_gigabytes_fill_neither_memory_nor_disk(
    server: Server, path: str, framing: str
) -> None:
    limit = 64 << 20
    peak, stored = server.peak_kib(), folder_bytes(server.temporary)
    head = (
        f"POST {path} HTTP/1.1\nHost: 127.0.0.1\n{framing}\n"
        "Content-Type: multipart/form-data; boundary=xx\n\n"
    )
    answer, sent = send_raw(server.port, head, huge_file("chunked" in framing))
    assert sent < 2 * limit
    if answer:  # a reset may overtake it
        assert answer.split(b" ")[1] == b"413"
    # A chat request is held until it is whole; an upload goes to the disk, and from there.
    assert server.peak_kib() - peak < 3 * limit >> 10
    assert folder_bytes(server.temporary) - stored <= limit
    if "Length" in framing:
        assert b"MiB" in answer
        assert server.peak_kib() - peak < 16 << 10
        assert folder_bytes(server.temporary) == stored
    assert httpx.get(f"{server.address}/health").json()["waiting"] == 0


def test_a_key_from_the_environment_guards_page_and_endpoint(root: Path) -> None:
    with served(root, environ={"XTUNER_ADD_API_KEY": KEY}) as server:
        for path in ("/", "/v1/models", "/config"):
            assert httpx.get(server.address + path).status_code == 401
            assert httpx.get(server.address + path, auth=("me", KEY)).status_code == 200
            bearer = {"Authorization": f"Bearer {KEY}"}
            assert httpx.get(server.address + path, headers=bearer).status_code == 200


def run(*arguments: str, **environ: str) -> Any:
    return CliRunner().invoke(cli.main, ["serve", *arguments], env=environ)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["llama", "--host", "0.0.0.0"], {}, "--allow-anonymous"),
        (["llama", "--host", "::"], {}, "--allow-anonymous"),
        (["llama", "--host", "example.org"], {}, "--allow-anonymous"),
        (["llama", "--api-key-env", "NO_SUCH_KEY"], {}, "NO_SUCH_KEY is empty"),
        (["llama"], {"XTUNER_ADD_API_KEY": "short"}, "shorter than 16"),
        (["llama", "--slides", "nowhere"], {}, "nowhere"),
        (["llama", "--port", "99999"], {}, "99999"),
        ([], {}, "Missing argument"),
    ],
)
def test_wrong_usage_is_said_with_code_2(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    result = run(*arguments, **environ)
    assert result.exit_code == 2
    assert message in result.output
    assert "short" not in result.output.replace("shorter", "")


@pytest.mark.parametrize("options", [["--allow-anonymous"], ["--api-key-env", "OTHER_KEY"]])
def test_other_machines_are_let_in_with_a_warning(options: list[str]) -> None:
    result = run("no-such-model", "--host", "0.0.0.0", "--port", "0", *options, OTHER_KEY=KEY)
    assert "is not encrypted" in result.output
    assert KEY not in result.output
    assert result.exit_code == 1
    assert "no-such-model" in result.output


def test_a_port_in_use_shows_before_the_model_is_loaded(server: Server) -> None:
    result = run("no-such-model", "--port", str(server.port))
    assert result.exit_code == 1
    assert f"--port {server.port}" in result.output


def words(text: str) -> list[str]:
    return text.split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, opened; at the end it is seen that it spoke to this server alone."""
    opened = browser.new_page(viewport={"width": 1400, "height": 1100})
    addresses: list[str] = []
    opened.on("request", lambda request: addresses.append(request.url))
    opened.goto(server.address)
    opened.wait_for_selector("#question textarea")
    yield opened
    foreign = [
        address
        for address in addresses
        if not address.startswith((server.address, "data:", "blob:"))
    ]
    opened.close()
    assert addresses
    assert foreign == []


def ask(page: Any, question: str, number: int, expected: str | None = None) -> None:
    """Asks, and waits for an answer; for all of it where it is known."""
    page.fill("#question textarea", question)
    page.click("#ask")
    answer = page.locator("#chat [data-testid=bot]").nth(number - 1)
    answer.wait_for()
    for _ in range(300):
        text = words(answer.inner_text())
        if text and (expected is None or text == words(expected)):
            return
        page.wait_for_timeout(100)
    assert text == words(expected or "")


def mean_colour(page: Any, selector: str) -> list[float]:
    """Of a picture on the page, drawn by the browser."""
    return page.evaluate(
        """selector => {
            const image = document.querySelector(selector);
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 1;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0, 1, 1);
            return [image.naturalWidth, image.naturalHeight,
                    ...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }""",
        selector,
    )


@pytest.mark.slow
def test_an_image_is_dropped_asked_about_and_answered(page: Any, assistant: Assistant) -> None:
    assert "Not for diagnosis" in page.inner_text("#notice")
    page.set_input_files("#picture input[type=file]", str(PICTURE))
    page.wait_for_selector("#cut img")
    page.wait_for_selector("#attention img")
    width, height, *cut = mean_colour(page, "#cut img")
    assert min(width, height) > 50
    assert mean_colour(page, "#attention img")[2:] != cut
    assert "sub-images of 32 x 32 px" in page.inner_text("#note")
    turn = Turn("user", "Is fibrosis shown?", (PICTURE,))
    expected = converse(assistant, [turn], Sampling(40)).text
    page.get_by_text("Settings").click()
    page.fill("#length input[type=number]", "40")
    page.keyboard.press("Tab")
    ask(page, "Is fibrosis shown?", 1, expected)
    ask(page, "Why?", 2)
    page.click("#fresh")  # while the second answer is coming
    page.wait_for_function("!document.querySelector('#chat [data-testid=bot]')")
    ask(page, "Is fibrosis shown?", 1, expected)  # a new conversation keeps the image
    assert page.locator("#chat [data-testid=user] img").count() == 1
    assert not page.locator("#chat button[title=Share]").is_visible()
    page.set_viewport_size({"width": 390, "height": 844})  # a phone
    page.wait_for_function("document.documentElement.scrollWidth <= 390")


@pytest.mark.slow
def test_a_slide_that_is_chosen_but_not_clicked_is_not_asked_about(page: Any) -> None:
    page.set_input_files("#picture input[type=file]", str(PICTURE))
    page.wait_for_selector("#cut img")
    page.get_by_role("tab", name="Region of a slide").click()
    page.click("#slide-name input")
    page.get_by_role("option", name="tissue.tiff").click()
    page.wait_for_selector("#slide img")
    page.wait_for_function("!document.querySelector('#cut img')")
    ask(page, "What is shown in this slide?", 1)
    assert "No image is chosen" in page.locator("#chat [data-testid=bot]").first.inner_text()
    assert page.locator("#chat [data-testid=user] img").count() == 0
    box = page.locator("#slide img").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.5)
    page.wait_for_selector("#attention img")
    ask(page, "And here?", 2)
    page.wait_for_selector("#chat [data-testid=user] img")
    red, green, blue = mean_colour(page, "#chat [data-testid=user] img")[2:]
    assert abs(red - 192) < 25 and abs(green - 128) < 25 and abs(blue - 63) < 25


@pytest.mark.slow
def test_a_region_of_a_slide_is_chosen_with_a_click(page: Any) -> None:
    page.get_by_role("tab", name="Region of a slide").click()
    page.click("#slide-name input")
    page.get_by_role("option", name="tissue.tiff").click()
    page.wait_for_selector("#slide img")
    assert "0.5 µm per pixel, 1.0 x 0.5 mm" in page.inner_text("#about")
    box = page.locator("#slide img").bounding_box()
    about, deadline = "", time.monotonic() + 60
    # The slide's arrival sets the size, on a busy machine after the test has typed its own.
    while "Region: 200 px" not in about and time.monotonic() < deadline:
        page.fill("#region-size input", "100")
        page.keyboard.press("Tab")
        page.wait_for_timeout(500)
        page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.5)
        page.wait_for_timeout(3000)
        about = page.inner_text("#about")
    assert "Region: 200 px" in about
    page.wait_for_selector("#attention img")
    page.wait_for_timeout(1000)  # the pictures come with it, but are drawn after it
    left = int(about.split("(")[1].split(",")[0] + about.split("(")[1].split(",")[1][:3])
    assert abs(left - (2048 * 0.75 - 100)) < 30
    red, green, blue = mean_colour(page, "#cut img")[2:]
    assert abs(red - 192) < 25 and abs(green - 128) < 25 and abs(blue - 63) < 25
    ask(page, "What?", 1)
    for part in (0.25, 0.5):  # the second click comes before the first is answered
        page.mouse.click(box["x"] + box["width"] * part, box["y"] + box["height"] * 0.5)
    page.wait_for_function("document.querySelector('#about').innerText.includes('(924, 41')")


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_an_error_on_the_page(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:60])
    page.set_input_files("#picture input[type=file]", str(broken))
    page.wait_for_selector(".toast-body.error")
    assert not page.query_selector("#cut img")


def test_help_costs_nothing() -> None:
    code = (
        "import sys, click.testing as t; from xtuner_add import cli;"
        "assert t.CliRunner().invoke(cli.main, ['serve', '--help']).exit_code == 0;"
        "print(sorted({'torch', 'gradio', 'uvicorn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
