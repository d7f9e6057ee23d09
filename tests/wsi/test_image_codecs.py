"""Image codecs are deterministic, and lossless where they claim to be."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tests.wsi.slides import tissue_pixels
from wsi.image_codecs import encode_png, encoder

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))


def decode(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.verify()  # checksums
    return np.asarray(Image.open(io.BytesIO(data)))


@given(hnp.arrays(np.uint8, SHAPES))
def test_png_is_lossless(pixels: np.ndarray) -> None:
    data = encode_png(pixels)
    assert np.array_equal(decode(data), pixels)
    assert encode_png(np.asfortranarray(pixels)) == data


def test_webp_at_100_is_lossless_and_below_it_small() -> None:
    pixels = tissue_pixels(96, 64)
    assert np.array_equal(decode(encoder("webp", 100)(pixels)), pixels)
    assert len(encoder("webp", 50)(pixels)) < len(encoder("webp", 100)(pixels)) / 2


def test_jpeg_keeps_colour_at_full_resolution() -> None:
    pixels = tissue_pixels(96, 64)
    data = encoder("jpg")(pixels)
    sampling = [layer[1:3] for layer in Image.open(io.BytesIO(data)).layer]  # type: ignore[attr-defined]
    assert sampling == [(1, 1)] * 3
    assert np.abs(decode(data).astype(int) - pixels).mean() < 4
    assert encoder("jpg", 95)(pixels) != data == encoder("jpg", 90)(pixels)


def test_wrong_settings() -> None:
    for arguments, message in (
        (("gif",), "one of png, jpg, webp"),
        (("png", 90), "PNG is lossless"),
        (("jpg", 0), "expected 1 to 100"),
        (("webp", 101), "expected 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(*arguments)  # type: ignore[arg-type]
