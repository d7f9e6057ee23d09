from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pathcore import image_features as module
from pathcore.encoders import Encoder
from pathcore.image_features import image_features
from pathcore.image_sets import FileImage, HDF5Image
from tests.pathgen.histology import knowing_encoder, patch


def write_images(folder: Path, kind: str, count: int = 5) -> list[FileImage]:
    folder.mkdir(parents=True)
    for number in range(count):
        patch(kind, number).save(folder / f"{number}.png")
    return [FileImage(f"{n}.png", folder / f"{n}.png") for n in range(count)]


def colours(encoder: Encoder, images: list[FileImage]) -> np.ndarray:
    return encoder.encode_images([image.open() for image in images]).numpy()


def test_equal_names_in_two_folders_have_their_own_features(tmp_path: Path) -> None:
    encoder = knowing_encoder()
    for kind in ("fat", "blood"):
        images = write_images(tmp_path / kind, kind)
        found = image_features(encoder, images, tmp_path / "cache", progress=False)
        np.testing.assert_allclose(found.features, colours(encoder, images), rtol=1e-6)

    with h5py.File(tmp_path / "x.h5", "w") as file:
        for number, name in enumerate(("x", "y")):
            file[name] = np.full((3, 4, 4, 3), 60 * number + 50, np.uint8)
    first, second = (
        image_features(
            encoder,
            [HDF5Image(f"x.h5:{row}", tmp_path / "x.h5", name, row) for row in range(3)],
            tmp_path / "cache",
            joint=False,
            progress=False,
        ).features
        for name in ("x", "y")
    )
    np.testing.assert_allclose(second - first, 60, rtol=1e-5)


def test_features_that_are_not_finite_stop(tmp_path: Path) -> None:
    """Zero-shot classification would find the first class in every image."""
    encoder = knowing_encoder()
    images = write_images(tmp_path / "images", "fat")
    black = encoder.transform(images[2].open())
    encoder._built = replace(
        encoder._built,
        features=lambda pixels: torch.where(
            (pixels == black).all(dim=(1, 2, 3))[:, None], torch.nan, pixels.mean(dim=(2, 3))
        ),
    )
    with pytest.raises(ValueError, match=r"colours: features of 2\.png are not finite in float32"):
        image_features(encoder, images, tmp_path / "cache", batch_size=2, progress=False)


def test_a_changed_image_costs_its_part_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_SIZE", 2)
    encoder, calls = knowing_encoder(), []
    real = encoder.encode_images

    def counts(pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return real(pixel_values)

    monkeypatch.setattr(encoder, "encode_images", counts)
    images = write_images(tmp_path / "images", "fat")
    image_features(encoder, images, tmp_path / "cache", progress=False)
    patch("blood", 99).save(images[3].path)
    found = image_features(encoder, images, tmp_path / "cache", progress=False)
    assert calls == [2, 2, 1, 2]
    np.testing.assert_allclose(
        found.features, real([image.open() for image in images]).numpy(), rtol=1e-6
    )


def test_another_transform_or_precision_computes_anew(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "fat")
    encoders = [knowing_encoder() for _ in range(3)]
    encoders[1].transform = replace(encoders[1].transform, mean=(0.1, 0.5, 0.9))
    encoders[2].precision = "bfloat16"
    assert len({encoder.digest for encoder in encoders}) == 1
    for encoder in encoders:
        found = image_features(encoder, images, tmp_path / "cache", progress=False)
        np.testing.assert_allclose(found.features, colours(encoder, images), rtol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_images_that_could_not_be_read_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, cache = knowing_encoder(), tmp_path / "cache"
    images = write_images(tmp_path / "images", "fat")
    images[1].path.unlink()
    real, away = FileImage.open, {"3.png"}

    def fails_at_times(image: FileImage) -> object:
        if image.id in away:
            raise OSError("stale file handle")
        return real(image)

    monkeypatch.setattr(FileImage, "open", fails_at_times)
    first = image_features(encoder, images, cache, progress=False)
    assert [row["id"] for row in first.skipped] == ["1.png", "3.png"]
    away.clear()
    second = image_features(encoder, images, cache, progress=False)
    assert [row["id"] for row in second.skipped] == ["1.png"]
    assert second.kept.tolist() == [0, 2, 3, 4]
    patch("blood", 1).save(images[1].path)
    third = image_features(encoder, images, cache, progress=False)
    assert not third.skipped and third.kept.tolist() == list(range(5))
    np.testing.assert_allclose(third.features, colours(encoder, images), rtol=1e-6)
    for file in cache.rglob("*.npz"):
        file.unlink()
    away.update(image.id for image in images)
    with pytest.raises(ValueError, match="none of 5 images can be read"):
        image_features(encoder, images, cache, progress=False)
    assert not list(cache.rglob("*.npz"))
