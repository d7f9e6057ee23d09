"""Images resized before the model's own preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pallava.records.questions import FileImage
from pallava.records.resizing import ResizedImage, resize


@pytest.mark.parametrize(
    ("rule", "size"),
    [("shorter:10", (20, 10)), ("squash:10", (10, 10)), ("pad:10", (10, 10)),
     ("crop:10", (10, 10)), ("shorter:100", (200, 100))],
)  # fmt: skip
def test_sizes(rule: str, size: tuple[int, int]) -> None:
    assert resize(Image.new("RGB", (40, 20)), rule).size == size


def test_what_is_kept_of_the_image() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 4, 20))  # a margin that a crop loses
    squashed, padded, cropped = (
        np.asarray(resize(image, f"{kind}:20")) for kind in ("squash", "pad", "crop")
    )
    assert squashed[10, 0].tolist() == [255, 0, 0]
    assert padded[0].max() == 0 and padded[10, 0].tolist() == [255, 0, 0]
    assert (cropped == 255).all()


def test_the_rule_is_part_of_the_identity(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    source = FileImage(tmp_path / "a.png", "a.png")
    resized = ResizedImage(source, "pad:8")
    assert resized.load().size == (8, 8) and resized.name == "a.png"
    identities = {image.identity(str) for image in (source, resized, ResizedImage(source, "pad:9"))}
    assert len(identities) == 3


@pytest.mark.parametrize("rule", ["", "224", "shorter:0", "stretch:10", "pad:1e3"])
def test_wrong_rules(rule: str) -> None:
    with pytest.raises(ValueError, match="expected shorter:N"):
        resize(Image.new("RGB", (4, 4)), rule)
