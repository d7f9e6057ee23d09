from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pallava.image_index import index_images, path_inside
from pathcore.images import ImageError


def test_sizes_and_errors_of_many_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    names = [f"deep/{index}.png" for index in range(1, 200)]
    for index, name in enumerate(names, start=1):
        Image.new("L", (index, 7)).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    index = index_images(tmp_path, [*names, "bad.png", "absent.png", "../out.png"])
    assert index.sizes == {name: (i, 7) for i, name in enumerate(names, start=1)}
    assert index.size("deep/5.png") == (5, 7)
    assert set(index.errors) == {"bad.png", "absent.png", "../out.png"}
    assert "not a readable image" in index.errors["bad.png"]
    assert "no such image file" in index.errors["absent.png"]
    assert "resolves to a path outside the image folder" in index.errors["../out.png"]


def test_nothing_to_index(tmp_path: Path) -> None:
    assert index_images(tmp_path, []).sizes == {}


def test_too_large_images_are_errors(tmp_path: Path) -> None:
    Image.new("L", (10, 10)).save(tmp_path / "a.png")
    index = index_images(tmp_path, ["a.png"], max_pixels=99)
    assert "10 x 10 px is more than the 99 pixels allowed" in index.errors["a.png"]


@pytest.mark.parametrize("name", ["../a.png", "deep/../../a.png", "/etc/passwd", "..", "a/.."])
def test_names_that_lead_out_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"(resolves to a path|is) outside the image folder"):
        path_inside(tmp_path, name)


def test_an_absolute_name_inside_is_taken_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for root in ("real", "link"):
        name = str(tmp_path / root / "a.png")
        assert path_inside(tmp_path / "link", name) == Path(name)
    with pytest.raises(ImageError, match="outside the image folder"):
        path_inside(tmp_path / "link", str(tmp_path / "other" / "a.png"))
    with pytest.raises(ImageError, match="resolves to a path outside"):
        path_inside(tmp_path / "link", str(tmp_path / "link" / ".." / "a.png"))
