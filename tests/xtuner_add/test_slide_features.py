"""A slide is asked about like its features file; its features are computed once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pallava import load_model
from pallava.modeling.folders import save_connector, save_slide_encoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.modeling.slide_tokens import SlideTokenEncoder
from pallava.slide_bags import SlideBagError
from tests.gigapath.tiny_encoders import write_tile_encoder
from tests.pallava import goldens
from tests.wsi.slides import tissue_pixels, write_svs
from xtuner_add.cli import main
from xtuner_add.slide_features import reads_slide_files

WIDTH = 48
"""Of the features of `write_tile_encoder`."""


def write_parts(folder: Path, **origin: Any) -> Path:
    """A slide model with random weights, as `convert pth_to_hf` writes one."""
    torch.manual_seed(0)
    llm = goldens.llm(r=0)
    encoder = SlideTokenEncoder(
        in_features=WIDTH, hidden_size=32, num_attention_heads=4, map_size=2, **origin
    )
    connector = ScaleInvariantConnector(
        ConnectorConfig(
            visual_hidden_size=32,
            llm_hidden_size=llm.config.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    save_slide_encoder(encoder, folder / "visual_encoder")
    save_connector(connector, folder / "projector")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    write_tile_encoder(root / "encoder")
    write_svs(root / "slides/good.svs", tissue_pixels(600, 500, blank=0.3), mpp=0.25)
    write_svs(root / "slides/glass.svs", np.full((400, 400, 3), 243, np.uint8), mpp=0.5)
    write_parts(root / "model", tile_encoder=str(root / "encoder"), patch_px=64, mpp=0.5)
    return root


def model(root: Path, folder: str = "model") -> Any:
    loaded = load_model(goldens.TINY_LLAMA, root / folder, device="cpu")
    return reads_slide_files(loaded, root / "features", device="cpu")


@pytest.mark.slow
def test_a_slide_is_its_features_and_is_embedded_once(world: Path) -> None:
    assistant = model(world)
    bag = assistant.pixel_values(world / "slides/good.svs")
    (file,) = (world / "features").rglob("features/*/good.h5")
    assert file.parent.parent.parent.name.startswith("good-")
    written = file.stat().st_mtime_ns
    again = model(world).pixel_values(world / "slides/good.svs")
    assert file.stat().st_mtime_ns == written
    assert torch.equal(bag.features, again.features) and torch.equal(bag.positions, again.positions)
    assert torch.equal(assistant.pixel_values(file).features, bag.features)
    assert assistant.answer(world / "slides/good.svs", "Why?", max_new_tokens=4) == (
        assistant.answer(file, "Why?", max_new_tokens=4)
    )
    with pytest.raises(SlideBagError, match=r"glass\.svs: no tissue"):
        assistant.pixel_values(world / "slides/glass.svs")
    with pytest.raises(SlideBagError, match=r"other\.svs: no such file"):
        assistant.pixel_values(world / "slides/other.svs")


def test_features_of_another_slide_of_this_name_are_refused(world: Path, tmp_path: Path) -> None:
    good = world / "slides/good.svs"
    file = model(world).anyres.features_file(good)
    shutil.copy(file, tmp_path / "good.h5")
    write_svs(tmp_path / "good.svs", tissue_pixels(700, 500, seed=2), mpp=0.25)
    loaded = load_model(goldens.TINY_LLAMA, world / "model", device="cpu")
    assistant = reads_slide_files(loaded, tmp_path, device="cpu")
    assert assistant.anyres.features_file(good) == tmp_path / "good.h5"
    with pytest.raises(SlideBagError, match=r"good\.h5: of a slide of 600 x 500 px"):
        assistant.pixel_values(tmp_path / "good.svs")


@pytest.mark.slow
def test_the_command_answers_about_a_folder_of_slides(world: Path) -> None:
    arguments = ["answer", goldens.TINY_LLAMA, "--llava", world / "model", world / "slides"]
    arguments += ["-q", "Is it red?", "--features", world / "features", "--max-new-tokens", 3]
    result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 3, result.output
    assert "glass.svs: no tissue" in result.output
    assert "good.svs\n  Is it red?\n" in result.output


def test_a_model_that_names_no_encoder_takes_features_alone(world: Path) -> None:
    write_parts(world / "unnamed", patch_px=64)
    assistant = model(world, "unnamed")
    with pytest.raises(SlideBagError, match="does not name its tile_encoder, mpp"):
        assistant.pixel_values(world / "slides/good.svs")
    plain = load_model(goldens.TINY_LLAMA, world / "unnamed", device="cpu")
    with pytest.raises(SlideBagError, match="compute those of a slide with `xtuner-add embed`"):
        plain.pixel_values(world / "slides/good.svs")
