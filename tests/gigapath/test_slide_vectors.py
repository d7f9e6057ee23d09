from __future__ import annotations

import pytest
import torch

from gigapath.embed.slide_vectors import PRESETS, SlideVector, get_preset
from gigapath.slide_encoder import LongNetViT
from tests.gigapath.slide_goldens import recipe_inputs, recipe_state

SETTINGS = dict(in_chans=32, embed_dim=64, depth=12, num_heads=4)


@pytest.fixture(scope="module")
def model() -> LongNetViT:
    return encoder()


def encoder(**changes: object) -> LongNetViT:
    model = LongNetViT(**{**SETTINGS, **changes})  # type: ignore[arg-type]
    model.load_state_dict(recipe_state(model.state_dict()))
    return model.eval()


@torch.no_grad()
def test_presets_are_what_those_pipelines_compute(model: LongNetViT) -> None:
    x, coords = recipe_inputs("presets", 1, 40, 32)
    larger = encoder(global_pool=True)
    larger.tile_size = 512  # TRIDENT sets the attribute: segment lengths stay
    expected = {
        "pipeline": model(x, coords, all_layer_embed=True)[-1],
        "trident": larger(x, coords, all_layer_embed=True)[11],
        "lazyslide": model(x, coords).squeeze()[None],
        "mean": larger(x, coords)[0],
    }
    assert set(expected) == set(PRESETS)
    found = {
        name: preset.embed(model, x, coords, patch_size_level0=512)
        for name, preset in PRESETS.items()
    }
    for name in PRESETS:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
        others = [found[other] for other in PRESETS if other != name]
        assert all((found[name] - other).abs().max() > 1e-3 for other in others)
    assert model.tile_size == 256


@torch.no_grad()
def test_coordinates_in_tiles(model: LongNetViT) -> None:
    x, coords = recipe_inputs("unit", 2, 40, 32)
    cells = torch.floor(coords / 256)
    in_tiles = SlideVector("final", "mean", coords_unit="tile")
    expected = get_preset("mean").embed(model, x, coords, 256, lengths=[40, 12])
    assert torch.equal(in_tiles.embed(model, x, cells, lengths=[40, 12]), expected)
    assert torch.equal(in_tiles.embed(model, x, cells.to(torch.int16), lengths=[40, 12]), expected)
    with pytest.raises(ValueError, match="expected pixels at level 0"):
        indices = torch.cartesian_prod(torch.arange(5), torch.arange(8))
        get_preset("mean").embed(model, x[0], indices, 256)


def test_what_is_not_said_is_asked_for(model: LongNetViT) -> None:
    x, coords = recipe_inputs("asked", 1, 4, 32)
    with pytest.raises(ValueError, match="patch_size_level0: this preset's grid"):
        get_preset("trident").embed(model, x, coords)
    with pytest.raises(ValueError, match="preset 'titan': expected one of mean, pipeline, trident"):
        get_preset("titan")
    with pytest.raises(ValueError, match="layer 12: expected 0 to 2"):
        get_preset("pipeline").embed(encoder(depth=2), x, coords)
    assert model.tile_size == 256
