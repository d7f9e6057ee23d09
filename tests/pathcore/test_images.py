"""Every kind of image file becomes 8-bit RGB or an error that names it."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pallava.anyres import AnyRes
from pathcore.images import (
    MAX_IMAGE_PIXELS,
    ImageError,
    decode_image,
    find_image,
    image_size,
    load_image,
    path_inside,
    relative_name,
    to_rgb,
)

SIZE = (12, 8)


def gradient() -> Image.Image:
    """A colour picture without two equal columns."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return Image.fromarray(np.stack([x * 20, y * 30, 255 - x * 20], axis=-1).astype(np.uint8))


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.bmp", "a.webp"])
def test_lossless_formats_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, gradient(), name, **({"lossless": True} if "webp" in name else {}))
    assert image_size(path) == SIZE
    assert np.array_equal(pixels(load_image(path)), pixels(gradient()))


@pytest.mark.parametrize("name", ["a.tiff", "a.jpg"])
def test_cmyk_keeps_its_colours(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, gradient().convert("CMYK"), name)
    assert Image.open(path).mode == "CMYK"
    difference = np.abs(pixels(load_image(path)).astype(int) - pixels(gradient()))
    assert difference.mean() < 6  # JPEG


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        found = pixels(load_image(saved(tmp_path, Image.fromarray(values), name)))
        assert np.array_equal(found[..., 0], (values / 257).round().astype(np.uint8))
        assert np.array_equal(found[..., 0], found[..., 2])


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = gradient().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    found = pixels(load_image(saved(tmp_path, image, "a.png"))).astype(float)
    alpha = np.asarray(image)[..., 3:] / 255
    assert np.abs(found - (pixels(gradient()) * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_grey_and_palette_with_transparency(mode: str) -> None:
    assert (pixels(to_rgb(Image.new(mode, SIZE, (40, 0)))) == 255).all()
    assert not (pixels(to_rgb(Image.new(mode, SIZE, (40, 255)))) == 255).any()


def test_palette_keeps_its_colours_and_its_transparency(tmp_path: Path) -> None:
    image = gradient().quantize(16)
    expected = pixels(image.convert("RGB"))
    assert np.array_equal(pixels(load_image(saved(tmp_path, image, "a.png"))), expected)
    path = saved(tmp_path, image, "b.png", transparency=int(np.asarray(image)[0, 0]))
    found = pixels(load_image(path))
    clear = np.asarray(image) == np.asarray(image)[0, 0]
    assert (found[clear] == 255).all()
    assert np.array_equal(found[~clear], expected[~clear])


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    found = pixels(load_image(path))
    assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "LAB", "HSV", "RGBX", "I", "F", "I;16B"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, SIZE)).mode == "RGB"


def test_fractions_are_brightness() -> None:
    values = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    found = pixels(to_rgb(Image.fromarray(values)))
    assert np.array_equal(found[..., 1], (values * 255).round().astype(np.uint8))


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf")])
def test_fractions_of_unknown_scale_are_an_error(tmp_path: Path, value: float) -> None:
    values = np.full((4, 6), value, dtype=np.float32)
    path = saved(tmp_path, Image.fromarray(values), "a.tiff")
    with pytest.raises(ImageError, match=r"a\.tiff: floating-point pixels outside 0\.\.1"):
        load_image(path)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_32_bit_grey_of_unknown_scale_is_an_error(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((4, 4), value, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=rf"a\.tiff: 32-bit pixels from {value} to {value}"):
        load_image(tmp_path / "a.tiff")


def test_one_pixel(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7)), "a.png")
    assert image_size(path) == (1, 1)
    assert pixels(load_image(path)).tolist() == [[[9, 8, 7]]]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match=r"absent\.png: no such image file"):
            read(tmp_path / "absent.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=rf"{name}.*: (cannot be decoded|not a readable image)"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match=r"a\.png'?: not a readable image"):
            read(tmp_path / "a.png")


def test_names_that_no_file_has_are_errors(tmp_path: Path) -> None:
    for name in ("a\0b.png", "\ud800.png", "x" * 300, "."):
        with pytest.raises(ImageError, match="not a readable image"):
            load_image(tmp_path / name)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """One small file of each format."""
    contents = []
    for name in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "ICO", "PPM"):
        buffer = io.BytesIO()
        image = gradient().resize((16, 16)) if name == "ICO" else gradient()
        image.save(buffer, name)
        contents.append(buffer.getvalue())
    return contents


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@given(data=st.data())
@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_file_is_an_image_or_an_image_error(
    files: list[bytes], tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path / "damaged"
    path.write_bytes(content)
    for read in (image_size, lambda name: load_image(name, max_pixels=10_000).size):
        try:
            width_px, height_px = read(path)
        except ImageError as error:
            assert "damaged" in str(error)
        else:
            assert min(width_px, height_px) >= 1


def test_more_pixels_than_allowed_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("1", (300, 200)), "a.png")
    assert load_image(path, max_pixels=60_000).size == (300, 200)
    for read in (image_size, load_image):
        with pytest.raises(
            ImageError, match=r"a\.png: 300 x 200 px is more than the 59,999 pixels allowed"
        ):
            read(path, max_pixels=59_999)


def png_header(width_px: int, height_px: int) -> bytes:
    """A 1-bit PNG that says its size and holds no pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_001, 20_000), (25_000, 25_000), (100_000, 100_000)])
def test_the_default_limit_is_20_000_px_square(tmp_path: Path, size: tuple[int, int]) -> None:
    assert MAX_IMAGE_PIXELS == 20_000**2
    (tmp_path / "a.png").write_bytes(png_header(*size))
    for read in (image_size, load_image):
        with pytest.raises(ImageError, match="more than the 400,000,000 pixels allowed"):
            read(tmp_path / "a.png")


@pytest.mark.slow
def test_20_000_px_square_is_read(tmp_path: Path) -> None:
    image = Image.new("1", (20_000, 20_000), 1)
    image.paste(0, (0, 0, 10_000, 20_000))
    path = saved(tmp_path, image, "a.png")
    del image
    assert path.stat().st_size < 1_000_000
    assert image_size(path) == (20_000, 20_000)
    loaded = load_image(path)
    assert loaded.size == (20_000, 20_000)
    tiles = AnyRes(tile_px=32, image_mean=(0, 0, 0), image_std=(1, 1, 1))(loaded)
    assert tiles.shape == (5, 3, 32, 32)
    assert tiles[0, 0, 5, 4].item() == 0.0
    assert tiles[0, 0, 5, 28].item() == 1.0


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp", "a.bmp", "a.gif"])
def test_bytes_are_decoded_as_their_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, gradient(), name)
    assert np.array_equal(pixels(decode_image(path.read_bytes())), pixels(load_image(path)))


def test_bytes_of_other_formats_and_broken_ones_are_refused(tmp_path: Path) -> None:
    other = saved(tmp_path, gradient(), "a.ppm").read_bytes()
    with pytest.raises(ImageError, match="'upload': not a readable image"):
        decode_image(other, name="upload")
    png = saved(tmp_path, gradient(), "a.png").read_bytes()
    with pytest.raises(ImageError, match="upload: cannot be decoded"):
        decode_image(png[:-40], name="upload")
    with pytest.raises(ImageError, match="upload: 12 x 8 px is more than the 95 pixels"):
        decode_image(png, name="upload", max_pixels=95)


@pytest.mark.parametrize(
    "name", ["../a.png", "deep/../../a.png", "/etc/passwd", "..", "a/..", "..\\a.png"]
)
def test_names_that_lead_out_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"(resolves to a path|is) outside the image folder"):
        path_inside(tmp_path, name)


def test_an_absolute_name_inside_is_taken_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for root in ("real", "link"):
        name = str(tmp_path / root / "a.png")
        assert path_inside(tmp_path / "link", name) == Path(name)
        assert relative_name(tmp_path / "link", Path(name)) == "a.png"
    with pytest.raises(ImageError, match="outside the image folder"):
        path_inside(tmp_path / "link", str(tmp_path / "other" / "a.png"))
    with pytest.raises(ImageError, match="resolves to a path outside"):
        path_inside(tmp_path / "link", str(tmp_path / "link" / ".." / "a.png"))
    with pytest.raises(ImageError, match="outside the image folder"):
        relative_name(tmp_path / "link", tmp_path / "a.png")


@pytest.mark.parametrize("name", [None, 7, "", ".", "a\0.png"])
def test_what_names_no_file_is_an_error(tmp_path: Path, name: object) -> None:
    with pytest.raises(ImageError, match="expected a file name"):
        path_inside(tmp_path, name)


def test_an_image_is_found_without_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.1.png").touch()
    assert find_image(tmp_path, "a.1.png") == find_image(tmp_path, "a.1") == tmp_path / "a.1.png"
    for name in ("a", "a.1.jpg", "x" * 300):
        with pytest.raises(ImageError, match="no such image file"):
            find_image(tmp_path, name)
    with pytest.raises(ImageError, match="no such image file"):
        find_image(tmp_path, "a.1", (".jpg",))
