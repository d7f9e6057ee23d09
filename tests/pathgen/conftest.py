"""Patches with captions, and a describer that answers over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pathgen.describer_server import DescriberServer, running_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DescriberServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_server() as running:
        yield running


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """A folder with ten different images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16), (20 * number, 80, 120)).save(folder / f"{number}.png")
    return folder


def patch_rows(*captions: str) -> list[dict[str, Any]]:
    return [
        {"id": f"p{number}", "image": f"{number % 10}.png", "caption": caption}
        for number, caption in enumerate(captions)
    ]
