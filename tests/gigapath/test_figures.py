"""Pictures of embeddings: colours by principal components, squares at the tiles' positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gigapath.embed.figures import draw_folder, draw_slide, principal_colours
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.features import FolderTiles
from wsi.reader import Slide


def test_like_embeddings_have_like_colours() -> None:
    generator = np.random.default_rng(0)
    centres = 5 * generator.standard_normal((3, 24))
    kinds = np.repeat([0, 1, 2], 200)
    features = centres[kinds] + 0.1 * generator.standard_normal((600, 24))
    colours = principal_colours(features.astype(np.float32)).astype(float)
    # Two components tell three kinds apart; the third is noise.
    means = np.array([colours[kinds == kind].mean(axis=0) for kind in range(3)])[:, :2]
    spread = max(colours[kinds == kind][:, :2].std() for kind in range(3))
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(means[one] - means[two]).max() > 80
    assert np.abs(means[0] - means[1]).max() > spread
    assert np.array_equal(colours, principal_colours(features.astype(np.float32)))


@given(st.integers(1, 8), st.integers(1, 5), st.booleans())
def test_any_number_of_tiles(number: int, dim: int, same: bool) -> None:
    features = np.random.default_rng(number).standard_normal((number, dim))
    if same:
        features[:] = features[0]
    colours = principal_colours(features)
    assert colours.shape == (number, 3) and colours.dtype == np.uint8
    if same or number == 1:
        assert (colours == 128).all()


def test_squares_lie_where_the_tiles_do(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "s.svs", tissue_pixels(512, 768), mpp=0.5)
    coords = np.array([[0, 0], [256, 512]], np.int64)
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    with Slide(path) as slide:
        picture = np.asarray(draw_slide(slide, coords, 128, colours))
    assert picture.shape == (768, 2 * 512 + 16, 3)
    painted = picture[:, 512 + 16 :]
    red = (painted == (255, 0, 0)).all(axis=2)
    blue = (painted == (0, 0, 255)).all(axis=2)
    assert red.sum() == blue.sum() == 128 * 128
    assert red[:128, :128].all() and blue[512:640, 256:384].all()


def test_a_folder_of_tiles_is_put_together(tmp_path: Path) -> None:
    pixels = tissue_pixels(120, 40)
    for x in (0, 40, 80):
        tile = Image.fromarray(pixels[:, x : x + 40])
        tile.save(tmp_path / f"{x + 1000:05d}x_07000y.png")
    tiles = FolderTiles.find(tmp_path)
    picture = np.asarray(draw_folder(tiles, tiles.coords[1:], np.full((2, 3), 9, np.uint8)))
    assert picture.shape == (40 + 16 + 40, 120, 3)  # wide: one above the other
    assert np.array_equal(picture[:40], pixels)
    assert (picture[56:, 40:] == 9).all() and not (picture[56:, :40] == 9).all(axis=2).any()
