"""One name gives the same bits in `embed`, `select-patches`, CITE and the Python call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch.nn.functional import normalize

from cite.features import read_features as read_cite_features
from cite.mm.feature_extraction import extract_features
from gigapath.embed.job import EmbeddingSettings, Placement, embed_slides
from gigapath.embed.tile_inference import describe_encoder
from pathcore.encoders import create_encoder
from pathgen.selection.features import slide_features
from tests.pathcore.encoders.tiny_presets import tiny_uni
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Region, Slide
from wsi.store import read_features
from wsi.tiling import PatchSpec

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PATCH_PX, BATCH = 40, 6


@pytest.fixture
def name(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "timm preset":
        with tiny_uni(tmp_path) as found:
            yield found
    else:
        save = {"open_clip": save_open_clip, "hf": save_hugging_face}[request.param]
        save(tmp_path / "clip")
        yield str(tmp_path / "clip")


def cite_config(name: str, precision: str, patches: Path, ann_file: Path) -> dict[str, Any]:
    pipeline = [
        dict(type="LoadPatch"),
        dict(type="EncoderResize", encoder=name),
        dict(type="PackPatch"),
    ]
    return dict(
        custom_imports=dict(imports=["cite.mm"], allow_failed_imports=False),
        default_scope="mmcls",
        model=dict(
            type="ImageClassifier",
            data_preprocessor=dict(type="EncoderDataPreprocessor", encoder=name),
            backbone=dict(type="PromptedEncoder", encoder=name, precision=precision),
            head=dict(type="LinearClsHead", num_classes=2, in_channels=16),
        ),
        test_dataloader=dict(
            dataset=dict(
                type="PatchDataset",
                classes=["a", "b"],
                data_prefix=str(patches),
                ann_file=str(ann_file),
                slide_pattern=None,
                pipeline=pipeline,
            )
        ),
    )


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["timm preset", "open_clip", "hf"], indirect=True)
def test_one_name_gives_the_same_bits_everywhere(name: str, precision: str, tmp_path: Path) -> None:
    slide = tmp_path / "s.svs"
    write_svs(slide, tissue_pixels(330, 300, seed=1), mpp=0.5)
    spec = describe_encoder(name, precision=precision)
    settings = EmbeddingSettings(
        spec, None, PatchSpec(PATCH_PX, 0.5), batch_size=BATCH, pictures=False
    )
    embed_slides(slide, tmp_path / "out", settings, Placement("cpu"), progress=False)
    (path,) = (tmp_path / "out" / "features").rglob("s.h5")
    embedded, coords = read_features(path)
    assert len(coords) > BATCH

    encoder = create_encoder(name, device="cpu", precision=DTYPES[precision])
    (tmp_path / "patches").mkdir()
    images = []
    with Slide(slide) as opened:
        for number, (x, y) in enumerate(coords):
            region = Region(int(x), int(y), PATCH_PX, PATCH_PX)
            images.append(Image.fromarray(opened.read(region)))
            images[-1].save(tmp_path / f"patches/{number:03d}.png")
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    called = torch.cat([encoder.features(batch) for batch in batches])
    assert torch.equal(torch.from_numpy(embedded), called)

    (coordinates,) = (tmp_path / "out" / "coords").rglob("s*.h5")
    selected = slide_features(slide, coordinates, encoder, tmp_path / "selection", batch_size=BATCH)
    rows = {tuple(row): number for number, row in enumerate(coords.tolist())}
    order = [rows[tuple(row)] for row in selected.coords.tolist()]
    compared = torch.cat(
        [
            normalize(encoder.features([images[i] for i in order[start : start + BATCH]]), dim=-1)
            for start in range(0, len(order), BATCH)
        ]
    )
    assert torch.equal(torch.as_tensor(selected.features), compared)

    ann_file = tmp_path / "ann.txt"
    ann_file.write_text(
        "".join(f"{number:03d}.png {number % 2}\n" for number in range(len(images)))
    )
    config = Config(cite_config(name, precision, tmp_path / "patches", ann_file))
    config.dump(tmp_path / "config.py")
    out = tmp_path / "cite.safetensors"
    extract_features(tmp_path / "config.py", out, split="test", batch_size=BATCH, progress=False)
    assert torch.equal(read_cite_features(out).features, called)
