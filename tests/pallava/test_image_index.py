from __future__ import annotations

from pathlib import Path

from PIL import Image

from pallava.image_index import index_images


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
