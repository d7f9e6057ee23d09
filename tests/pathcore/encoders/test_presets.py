"""Presets as data: complete and readable, and errors for invalid ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pathcore.encoders import Transform, get_preset, list_encoders, presets
from pathcore.encoders.presets import PresetError, UnknownEncoderError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of presets that a third party has registered."""
    own = Path(presets.__file__).with_name("presets")
    monkeypatch.setattr(presets, "_folders", lambda: [own, tmp_path])
    presets._files.cache_clear()
    yield tmp_path
    presets._files.cache_clear()
    presets._read_encoder_preset.cache_clear()


@pytest.mark.parametrize("name", list_encoders())
def test_every_preset_says_what_a_feature_needs(name: str) -> None:
    preset = get_preset(name)
    assert preset.hub or preset.source, "where the weights come from"
    assert preset.licence and preset.citation
    assert preset.embed_dim > 0 and preset.patch_px > 0
    assert preset.precision in ("float32", "float16", "bfloat16")
    assert preset.files or preset.library in ("transformers", "open_clip")
    if preset.transform is not None:
        assert Transform.from_dict(preset.transform.to_dict()) == preset.transform
    if preset.remote_code:
        assert preset.library == "transformers"
    if preset.library == "package":
        assert preset.package and preset.install.startswith("pip install ")


def test_where_the_field_disagrees_the_preset_says_whose_reading_it_is() -> None:
    names = set(list_encoders())
    pairs = {name.rpartition("-")[0] for name in names} & names
    ambiguous = {"virchow", "virchow2", "h0-mini", "midnight", "conch", "musk"}
    assert ambiguous <= pairs
    for name in ambiguous:
        assert get_preset(name).convention
    assert get_preset("virchow2").embed_dim == 2 * get_preset("virchow2-cls").embed_dim
    assert get_preset("ctranspath").files != get_preset("chief-ctp").files


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownEncoderError, match="did you mean uni2-h"):
        get_preset("UNI2_h")
    with pytest.raises(UnknownEncoderError, match=r"neither a preset nor a folder$"):
        get_preset("zzzzzz")


def test_a_new_encoder_is_one_file(folder: Path) -> None:
    content = {"extends": "uni", "hub": "lab/mine", "embed_dim": 7, "convention": "ours"}
    (folder / "mine.json").write_text(json.dumps(content))
    preset = get_preset("mine")
    assert "mine" in list_encoders()
    assert (preset.embed_dim, preset.hub) == (7, "lab/mine")
    assert preset.transform == get_preset("uni").transform
    assert preset.origin == str(folder / "mine.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"library": "timm"}', "architecture, embed_dim, feature, transform missing"),
        ('{"extends": "uni", "embed_dims": 7}', "embed_dims not known"),
        ('{"extends": "uni", "library": "keras"}', "library 'keras', expected one of timm"),
        ('{"extends": "nobody"}', "extends 'nobody', which is no other preset"),
        ('{"extends": "uni", "transform": {"mean": [0, 0, 0]}}', "interpolation, resize_px, std"),
        ("[]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "wrong.json").write_text(content)
    with pytest.raises(PresetError, match=message):
        get_preset("wrong")
    (folder / "uni.json").write_text("{}")
    presets._files.cache_clear()
    with pytest.raises(PresetError, match="rename one"):
        list_encoders()


def test_images_of_any_mode_are_read_as_files_are() -> None:
    transform = Transform(None, None, "bicubic", (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]
    clear, deep = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("I;16", (4, 4), 257 * 40)
    assert transform.resize(clear).getpixel((0, 0)) == (255, 255, 255)
    assert transform.resize(deep).getpixel((0, 0)) == (40, 40, 40)
