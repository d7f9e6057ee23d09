from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image

import cite.mm  # noqa: F401
from cite.mm.transforms import CLIP_NORM, IMAGENET_NORM, AugmentPatch, LoadPatch, ResizePatch

GOLDEN = Path(__file__).parents[2] / "golden" / "cite"
PNG = GOLDEN / "pipeline_300x300.png"
TEST = ({"type": "LoadPatch"}, {"type": "ResizePatch"}, {"type": "PackPatch", "host": "mmcls"})
PUBLISHED_TEST = ({"type": "PatchGastricPipeline", "test_mode": True}, TEST[-1])


def run(pipeline: Any, **results: Any) -> Any:
    results = {"img_path": str(PNG), "gt_label": 1, "sample_idx": 0, "slide": "A"} | results
    for step in pipeline:
        results = TRANSFORMS.build(dict(step))(results)
    return results


def normalised(pixels: torch.Tensor, norm: dict[str, Any]) -> torch.Tensor:
    from mmcls.models.utils import ClsDataPreprocessor

    inputs = {"inputs": pixels[None], "data_samples": None}
    return ClsDataPreprocessor(**norm)(inputs)["inputs"][0]


@pytest.mark.parametrize("pipeline", [TEST, PUBLISHED_TEST])
def test_published_pixels(pipeline: Any) -> None:
    golden = np.load(GOLDEN / "pipeline.npz")
    packed = run(pipeline)
    assert packed["inputs"].dtype == torch.uint8
    image = normalised(packed["inputs"], IMAGENET_NORM).numpy()
    np.testing.assert_allclose(image[:, ::7, ::7], golden["img_0_7"], atol=2e-6)
    np.testing.assert_allclose(image[:, :8, :8], golden["corner"], atol=2e-6)
    np.testing.assert_allclose(image.mean(axis=(1, 2)), golden["mean"], atol=1e-5)
    np.testing.assert_allclose(image.std(axis=(1, 2)), golden["std"], atol=1e-4)


def test_norms_are_torchvisions_and_clips() -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pixels = run(TEST)["inputs"]
    image = normalised(pixels, CLIP_NORM)
    mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    torch.testing.assert_close(image, (pixels / 255 - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["mmcls", "mmpretrain"])
def test_packed_for_either_host(host: str) -> None:
    with DefaultScope.overwrite_default_scope(host):
        packed = run((*TEST[:2], {"type": "PackPatch"}))
    sample = packed["data_samples"]
    assert type(sample).__module__.split(".")[0] == host
    label = sample.gt_label.label if host == "mmcls" else sample.gt_label
    assert label.tolist() == [1]
    assert (sample.slide, sample.sample_idx, sample.img_path) == ("A", 0, str(PNG))


def test_published_augmentation_leaves_hardly_any_colour() -> None:
    before = run(PUBLISHED_TEST)["inputs"].float()
    after = run([{"type": "PatchGastricPipeline"}, TEST[-1]], draw=3)["inputs"].float()
    chroma = [float((image.amax(0) - image.amin(0)).mean()) for image in (before, after)]
    assert chroma[1] < 0.3 * chroma[0]


def test_augmentation_depends_on_the_draw_alone() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    augment = AugmentPatch()
    seen = []
    for draw in range(20):
        torch.manual_seed(draw)
        random.seed(draw)
        first = augment({"img": pixels, "draw": draw})["img"]
        state = torch.get_rng_state()
        second = augment({"img": pixels, "draw": draw})["img"]
        assert torch.equal(state, torch.get_rng_state())
        np.testing.assert_array_equal(first, second)
        seen.append(first.tobytes())
    assert len(set(seen)) == 20
    other = AugmentPatch(seed=1)({"img": pixels, "draw": 0})["img"]
    assert other.tobytes() != seen[0]
    loose = {augment({"img": pixels})["img"].tobytes() for _ in range(5)}
    assert len(loose) == 5


def test_flips_and_turns_reach_all_eight_positions() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    augment = AugmentPatch(brightness=0, saturation=0, hue=0)
    seen = {augment({"img": pixels, "draw": k})["img"].tobytes() for k in range(200)}
    positions = {
        np.ascontiguousarray(np.rot90(p, k)).tobytes()
        for p in (pixels, pixels[::-1])
        for k in range(4)
    }
    assert seen == positions


def test_ratio_can_be_kept() -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 30:50] = 255
    resized = ResizePatch(20, keep_ratio=True)({"img": wide})
    assert resized["img"].shape == (20, 20, 3)
    assert resized["img"][:, 6:14].min() == 255
    with pytest.raises(ValueError, match="interpolation 'area'; expected one of bilinear"):
        ResizePatch(interpolation="area")


def test_damaged_image_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "A_0.jpg"
    Image.new("RGB", (64, 64), "red").save(file)
    for content in (b"no image", file.read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"ann.txt:7: .*A_0.jpg cannot be read as an image"):
            LoadPatch()({"img_path": str(file), "ann_file": "ann.txt", "ann_line": 7})


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_and_floats_are_scaled(suffix: str, tmp_path: Path) -> None:
    """Pillow's own conversion clips 16-bit grey to white and makes floats black."""
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    pixels = LoadPatch()({"img_path": str(tmp_path / f"grey{suffix}")})["img"]
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[..., 0], (grey / 257).round())
    if suffix == ".tif":
        Image.fromarray((grey / 65535).astype(np.float32)).save(tmp_path / "float.tif")
        found = LoadPatch()({"img_path": str(tmp_path / "float.tif")})["img"]
        assert abs(found[..., 0].astype(int) - pixels[..., 0]).max() <= 1
        Image.fromarray(grey.astype(np.float32)).save(tmp_path / "raw.tif")
        with pytest.raises(ValueError, match=r"a\.txt:3: .*floating-point pixels outside 0\.\.1"):
            LoadPatch()({"img_path": str(tmp_path / "raw.tif"), "ann_file": "a.txt", "ann_line": 3})
