"""Slides as the connector's input: packing, positions, values, memory, and the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pallava.modeling.attention_maps import tile_attention
from pallava.modeling.folders import load_slide_encoder, save_connector, save_slide_encoder
from pallava.modeling.llava import PALLaVA
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.modeling.slide_tokens import SlideTokenEncoder, encode_positions
from pallava.registry import ENCODERS
from pallava.slide_bags import SlideBag
from pallava.text.encoding import IMAGE_TOKEN_INDEX
from pathcore.weights import CheckpointError
from tests.pallava import goldens

WIDTH, FEATURES, MAP = 64, 24, 3


def encoder(**changes: int) -> SlideTokenEncoder:
    torch.manual_seed(1)
    sizes = {"in_features": FEATURES, "hidden_size": WIDTH, "num_attention_heads": 4}
    return SlideTokenEncoder(**(sizes | {"map_size": MAP} | changes)).eval()


def connector(**changes: Any) -> ScaleInvariantConnector:
    torch.manual_seed(2)
    sizes = {"visual_hidden_size": WIDTH, "llm_hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 128}
    return ScaleInvariantConnector(ConnectorConfig(**(sizes | changes))).eval()


def bag(num_tiles: int, seed: int = 0, side: int = 9) -> SlideBag:
    """Tiles on different places of a square grid."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(side * side, generator=generator)[:num_tiles]
    positions = torch.stack([places % side, places // side], dim=1).float()
    return SlideBag(torch.randn(num_tiles, FEATURES, generator=generator), positions)


def outputs(bags: list[SlideBag], **changes: int) -> Tensor:
    with torch.no_grad():
        return connector()(*encoder(**changes).visual_tokens(bags))


def test_tiles_of_a_part_keep_their_places() -> None:
    whole, kept = bag(40), torch.arange(40) % 3 == 0
    with torch.no_grad():
        all_tiles = encoder().visual_tokens([whole])[1]
        slide_map, tiles, counts = encoder().visual_tokens([whole.part(kept)])
        again = encoder().visual_tokens([whole.part(kept).part(torch.arange(13))])[0]
    assert counts == [14] and torch.equal(tiles, all_tiles[kept])
    empty = bag(40).part(torch.tensor([0]))
    assert torch.equal(empty.extent(), whole.extent())
    assert slide_map.shape == again.shape and not torch.equal(slide_map, again)


def test_bags_in_a_batch_do_not_see_each_other() -> None:
    bags = [bag(n, seed=n) for n in (7, 1, 60, 7, 23)]
    together = outputs(bags)
    assert together.shape == (5, MAP * MAP + 1, 64)
    for number, each in enumerate(bags):
        torch.testing.assert_close(together[number], outputs([each])[0], atol=1e-5, rtol=1e-5)


def test_gradients_of_a_batch_are_the_sum_of_those_alone() -> None:
    bags = [bag(n, seed=n) for n in (5, 31, 1)]

    def gradients(batches: list[list[SlideBag]]) -> list[Tensor]:
        parts = encoder(), connector()
        for batch in batches:
            parts[1](*parts[0].visual_tokens(batch)).square().sum().backward()
        return [p.grad for part in parts for p in part.parameters() if p.grad is not None]

    for left, right in zip(gradients([bags]), gradients([[b] for b in bags]), strict=True):
        torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)


@given(st.integers(1, 40), st.integers(0, 50_000), st.integers(0, 50_000), st.integers(0, 9))
def test_where_tissue_lies_on_the_glass_and_in_which_order_is_nothing(
    num_tiles: int, right: int, down: int, seed: int
) -> None:
    one = bag(num_tiles, seed)
    order = torch.randperm(num_tiles, generator=torch.Generator().manual_seed(seed))
    moved = SlideBag(one.features[order], one.positions[order] + torch.tensor([right, down]))
    torch.testing.assert_close(outputs([moved]), outputs([one]), atol=2e-5, rtol=1e-5)


def test_places_matter_to_map_and_tiles() -> None:
    one = bag(40)
    exchanged = one._replace(positions=one.positions.flip(0))
    for first, second in zip(
        encoder().visual_tokens([one])[:2], encoder().visual_tokens([exchanged])[:2], strict=True
    ):
        assert (first - second).abs().max() > 0.1


def test_the_map_is_the_mean_of_the_tiles_of_each_cell() -> None:
    features = torch.randn(4, FEATURES)
    one = SlideBag(features, torch.tensor([[5.0, 2.0], [6.0, 2.0], [5.0, 7.0], [10.0, 7.0]]))
    module = encoder(map_size=2)
    content = module._project(features)
    # Six tiles wide and high: halves of three tiles, centres at 1 and 4 of 0..5.
    centres = encode_positions(torch.tensor([[1.0, 1], [4, 1], [1, 4], [4, 4]]), WIDTH)
    number = module.number_of_tiles
    expected = torch.stack(
        [
            content.mean(dim=0) + module.slide_token + torch.tensor(5.0).log() * number,
            content[:2].mean(dim=0) + torch.tensor(3.0).log() * number + centres[0],
            module.empty_cell + centres[1],
            content[2] + torch.tensor(2.0).log() * number + centres[2],
            content[3] + torch.tensor(2.0).log() * number + centres[3],
        ]
    )
    slide_map, tiles, counts = module.visual_tokens([one])
    torch.testing.assert_close(slide_map[0], expected)
    places = encode_positions(torch.tensor([[0.0, 0], [1, 0], [0, 5], [5, 5]]), WIDTH)
    torch.testing.assert_close(tiles[:, 0], content + places)
    assert counts == [4]


def test_position_encoding_is_the_published_one() -> None:
    found = encode_positions(torch.tensor([3.0, 11.0]), 16)
    steps = torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000 ** -(i / 4)
    parts = [(3 * steps).sin(), (3 * steps).cos(), (11 * steps).sin(), (11 * steps).cos()]
    torch.testing.assert_close(found, torch.cat(parts))


def test_the_slide_embedding_changes_the_slide_token_alone() -> None:
    module = encoder(slide_embedding_features=8)
    first = bag(9)._replace(slide_embedding=torch.randn(8))
    second = first._replace(slide_embedding=torch.randn(8).half())
    difference = (
        (module.visual_tokens([first])[0] - module.visual_tokens([second])[0]).abs().amax(dim=-1)[0]
    )
    assert difference[0] > 0.1 and difference[1:].max() == 0
    with pytest.raises(ValueError, match="slide embedding of width 8, found None"):
        module.visual_tokens([bag(9)])


def test_memory_grows_linearly_with_tiles() -> None:
    def saved_bytes(num_tiles: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        parts = encoder(), connector().train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = parts[1](*parts[0].visual_tokens([bag(num_tiles, side=100)]))
            tokens.sum().backward()
        return sum(storages.values())

    small, middle, large = map(saved_bytes, (2_000, 4_000, 8_000))
    assert 0 < middle - small < large - middle <= 2.05 * (middle - small)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (bag(0), r"bag 1: expected features \(N, 24\) with at least one tile, found \(0, 24\)"),
        (
            SlideBag(torch.ones(3, 5), torch.ones(3, 2)),
            r"bag 1: expected features .* found \(3, 5\)",
        ),
        (bag(3)._replace(positions=torch.ones(2, 2)), r"bag 1: positions \(2, 2\), \(3, 2\)"),
    ],
)
def test_bags_that_do_not_fit(wrong: SlideBag, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encoder().visual_tokens([bag(3), wrong])


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="hidden_size 66: expected a multiple of 4"):
        encoder(hidden_size=66)
    with pytest.raises(ValueError, match="map_size: expected at least 1"):
        encoder(map_size=0)


def test_a_folder_is_the_encoder_and_nothing_else(tmp_path: Path) -> None:
    module = encoder(slide_embedding_features=8)
    save_slide_encoder(module, tmp_path / "visual_encoder")
    again = ENCODERS.get("slide_tokens")(tmp_path / "visual_encoder")
    assert again.config == module.config
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_slide_encoder(tmp_path)
    save_connector(connector(), tmp_path / "projector")
    with pytest.raises(CheckpointError, match="expected model_type 'slide_tokens'"):
        load_slide_encoder(tmp_path / "projector")


def model(**changes: Any) -> PALLaVA:
    llm = goldens.llm(r=0)
    width = llm.get_input_embeddings().weight.shape[1]
    return PALLaVA(llm, encoder(), connector(llm_hidden_size=width, **changes)).eval()


def batch() -> tuple[Tensor, Tensor, list[SlideBag]]:
    """A text, a question about a slide, and one about two, padded on the right."""
    rows = [
        [0, 9, 12, 33],
        [0, IMAGE_TOKEN_INDEX, 9, 12],
        [0, 5, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, 11],
    ]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (6 - len(row)) for row in rows])
    return ids, mask, [bag(30, 1), bag(2, 2), bag(50, 3)]


def test_texts_and_slides_in_one_batch_are_those_alone() -> None:
    module, (ids, mask, bags) = model(), batch()
    with torch.no_grad():
        together = module.prepare_inputs(ids, bags, mask)
        alone = [
            module.prepare_inputs(ids[:1], [], mask[:1]),
            module.prepare_inputs(ids[1:2], bags[:1], mask[1:2]),
            module.prepare_inputs(ids[2:], bags[1:], mask[2:]),
        ]
    for row, single in enumerate(alone):
        length = int(single.attention_mask.sum())
        torch.testing.assert_close(
            together.inputs_embeds[row][together.attention_mask[row]],
            single.inputs_embeds[0][:length],
            atol=1e-5,
            rtol=1e-5,
        )


def test_generates_for_a_batch_what_it_does_alone() -> None:
    module, (ids, mask, bags) = model(), batch()
    kwargs: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = module.generate(ids, bags, mask, **kwargs)
    alone = module.generate(ids[1:2, :4], bags[:1], **kwargs)
    assert torch.equal(together[1, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("with_slides", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_every_weight_gets_a_gradient(with_slides: bool, recompute: bool) -> None:
    module, (ids, mask, bags) = model().train(), batch()
    if recompute:
        module.projector.gradient_checkpointing_enable()
    if not with_slides:
        ids, mask, bags = ids[:1], mask[:1], []
    module(ids, bags, mask, labels=ids.clamp(min=0))["loss"].backward()
    for part in (module.visual_encoder, module.projector):
        without = [name for name, p in part.named_parameters() if p.grad is None]
        assert not without, "data-parallel training waits for a gradient of each"
    if with_slides:
        assert module.visual_encoder.projection.weight.grad.abs().max() > 0


def test_a_connector_that_sees_the_map_alone() -> None:
    module, (ids, mask, bags) = model(cross_attention=False), batch()
    assert module(ids, bags, mask)["logits"].isfinite().all()


def test_half_precision_stays_near() -> None:
    bags = [bag(200, 1, side=40), bag(3, 2)]
    exact = outputs(bags)
    with torch.no_grad():
        parts = encoder().bfloat16(), connector().bfloat16()
        half = parts[1](
            *parts[0].visual_tokens([b._replace(features=b.features.half()) for b in bags])
        )
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.03 * exact.norm()


def test_attention_to_the_tiles_is_a_distribution_that_follows_them() -> None:
    module, one = model(), bag(40)
    attention = tile_attention(module, one)
    assert attention is not None and attention.shape == (40,)
    torch.testing.assert_close(attention.sum(), torch.tensor(1.0))
    flipped = tile_attention(module, SlideBag(one.features.flip(0), one.positions.flip(0)))
    assert flipped is not None
    torch.testing.assert_close(flipped, attention.flip(0), atol=1e-6, rtol=1e-4)
    assert tile_attention(model(cross_attention=False), one) is None
