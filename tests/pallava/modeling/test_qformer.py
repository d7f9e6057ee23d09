"""The connector against the goldens, and its packed attention against padding and masking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pallava.modeling.folders import connector_config_of, load_connector, save_connector
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pathcore.weights import CheckpointError
from tests.pallava import goldens

TOKENS, WIDTH = 4, 64
KINDS = ("released", "crossattn")
# The reference's mask shows one copy of the last sub-image of the second sample.
CASES = {
    "a_single_nomask": [4],
    "b_batch2_truemask": [4, 2],
    "b_batch2_refmask": [4, 3],
    "c_zero_subimages": [0],
}
counts_of_sub_images = st.lists(st.integers(0, 8), min_size=1, max_size=6)


def golden_case(kind: str, case: str) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """The recorded tensors, and the visible sub-images packed, with their numbers."""
    io = goldens.read_tensors(f"projector/{kind}_A_h64_heads4_{case}_io.safetensors")
    counts = CASES[case]
    if "mask" in io:
        assert (io["mask"].sum(dim=1) / TOKENS).tolist() == counts
    pieces = [
        rows.unflatten(0, (-1, TOKENS))[:count] if count else rows.new_zeros(0, TOKENS, WIDTH)
        for rows, count in zip(io["patch"], counts, strict=True)
    ]
    return io, torch.cat(pieces), counts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_published_one(kind: str, case: str) -> None:
    io, sub_images, counts = golden_case(kind, case)
    with torch.no_grad():
        found = goldens.connector(kind)(io["ori"], sub_images, counts)
    torch.testing.assert_close(found, io["out"], atol=goldens.ENCODER_ATOL, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("c_")])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_published_ones(kind: str, case: str, checkpointing: bool) -> None:
    io, sub_images, counts = golden_case(kind, case)
    connector = goldens.connector(kind)
    if checkpointing:
        connector.gradient_checkpointing_enable()
        goldens.without_dropout(connector)
    thumbnails = io["ori"].requires_grad_()
    sub_images.requires_grad_()
    (connector(thumbnails, sub_images, counts) * io["cotangent"]).sum().backward()
    torch.testing.assert_close(thumbnails.grad, io["grad_ori"], atol=goldens.ENCODER_ATOL, rtol=0)
    if kind == "released":
        assert sub_images.grad is None
    else:
        expected = torch.cat(
            [
                rows.unflatten(0, (-1, TOKENS))[:count]
                for rows, count in zip(io["grad_patch"], counts, strict=True)
            ]
        )
        torch.testing.assert_close(sub_images.grad, expected, atol=goldens.ENCODER_ATOL, rtol=0)
    norms = goldens.read_json(f"projector/{kind}_A_h64_heads4_{case}_gradnorms.json")
    # A key's bias moves every score alike: its gradient is zero but for rounding.
    assert goldens.gradient_norms(connector) == pytest.approx(
        norms, rel=goldens.NORM_RTOL, abs=2e-6
    )


def padded_and_masked(
    connector: ScaleInvariantConnector, thumbnails: Tensor, sub_images: Tensor, counts: list[int]
) -> Tensor:
    """The same connector in the usual way: padded to the longest, hidden by a mask."""
    longest = max(counts)
    padded = thumbnails.new_zeros(len(counts), longest, *thumbnails.shape[1:])
    for row, piece in zip(padded, sub_images.split(counts), strict=True):
        row[: len(piece)] = piece
    keys = padded.flatten(1, 2)
    visible = torch.arange(longest) < torch.tensor(counts)[:, None]
    mask = visible.repeat_interleave(thumbnails.shape[1], dim=1)[:, None, None]

    def attend(block: torch.nn.Module, states: Tensor, source: Tensor, shown: Tensor) -> Tensor:
        weights = block.get_submodule("self")
        query, key, value = (
            project(tensor).unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
            for project, tensor in (
                (weights.query, states),
                (weights.key, source),
                (weights.value, source),
            )
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        share = scores.masked_fill(~shown, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        return block.output((share @ value).transpose(1, 2).flatten(2), states)

    states = F.layer_norm(thumbnails, thumbnails.shape[-1:], eps=connector.config.layer_norm_eps)
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for layer in connector.model.bert.encoder.layer:
        states = attend(layer.attention, states, states, everything)
        if longest:
            states = attend(layer.crossattention, states, keys, mask)
        else:
            states = layer.crossattention.output(torch.zeros_like(states), states)
        states = layer.output_query(layer.intermediate_query(states), states)
    return connector.model.mlp.model(connector.model.norm(states + thumbnails))


@given(counts=counts_of_sub_images)
@settings(deadline=None, max_examples=40)
def test_packed_attention_is_padded_and_masked_attention(counts: list[int]) -> None:
    connector = cached_connector()
    thumbnails = goldens.noise(len(counts), TOKENS, WIDTH)
    sub_images = goldens.noise(sum(counts), TOKENS, WIDTH, seed=1)
    with torch.no_grad():
        packed = connector(thumbnails, sub_images, counts)
        masked = padded_and_masked(connector, thumbnails, sub_images, counts)
    torch.testing.assert_close(packed, masked, atol=5e-6, rtol=0)


@given(counts=counts_of_sub_images, data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_order_of_a_batch_does_not_matter(counts: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(counts))))
    connector = cached_connector()
    thumbnails = goldens.noise(len(counts), TOKENS, WIDTH)
    pieces = goldens.noise(sum(counts), TOKENS, WIDTH, seed=1).split(counts)
    with torch.no_grad():
        straight = connector(thumbnails, torch.cat(pieces), counts)
        shuffled = connector(
            thumbnails[order], torch.cat([pieces[i] for i in order]), [counts[i] for i in order]
        )
    torch.testing.assert_close(shuffled, straight[order], atol=2e-6, rtol=0)


_CONNECTORS: list[ScaleInvariantConnector] = []


def cached_connector() -> ScaleInvariantConnector:
    if not _CONNECTORS:  # read once: hypothesis calls a test many times
        _CONNECTORS.append(goldens.connector("crossattn"))
    return _CONNECTORS[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_scale_invariant_connector_sees_sub_images(kind: str) -> None:
    connector = goldens.connector(kind)
    assert connector.uses_sub_images == (kind == "crossattn")
    thumbnails = goldens.noise(2, TOKENS, WIDTH)
    with torch.no_grad():
        first, second = (
            connector(thumbnails, goldens.noise(7, TOKENS, WIDTH, seed=seed), [4, 3])
            for seed in (1, 2)
        )
    assert torch.equal(first, second) == (kind == "released")
    assert connector(thumbnails, goldens.noise(0, TOKENS, WIDTH), [0, 0]).shape == (
        2,
        TOKENS,
        WIDTH,
    )


def test_released_mode_needs_no_sub_images() -> None:
    connector, thumbnails = goldens.connector("released"), goldens.noise(2, TOKENS, WIDTH)
    with_them = connector(thumbnails, goldens.noise(5, TOKENS, WIDTH), [2, 3])
    assert torch.equal(connector(thumbnails), with_them)


@pytest.mark.parametrize("counts", [[0, 0], [2, 3], [0, 4], [3, 0]])
def test_every_parameter_gets_a_gradient_whatever_the_numbers(counts: list[int]) -> None:
    connector = goldens.without_dropout(goldens.connector("crossattn"))
    connector.gradient_checkpointing_enable()
    sub_images = goldens.noise(sum(counts), TOKENS, WIDTH)
    connector(goldens.noise(2, TOKENS, WIDTH), sub_images, counts).square().sum().backward()
    absent = [name for name, p in connector.named_parameters() if p.grad is None]
    assert absent == []
    crossed = connector.model.bert.encoder.layer[0].crossattention.get_submodule("self")
    assert bool(crossed.value.weight.grad.any()) == any(counts)


def test_checkpointing_repeats_the_dropout_of_the_forward_pass() -> None:
    norms = []
    for enable in (False, True):
        connector = goldens.connector("crossattn").train()
        if enable:
            connector.gradient_checkpointing_enable()
        torch.manual_seed(0)
        output = connector(goldens.noise(2, TOKENS, WIDTH), goldens.noise(5, TOKENS, WIDTH), [2, 3])
        output.square().sum().backward()
        norms.append(goldens.gradient_norms(connector))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5, abs=1e-5)


def test_dropout_of_attention_weights_is_on_in_training_only() -> None:
    config = ConnectorConfig(
        visual_hidden_size=WIDTH,
        llm_hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.5,
    )
    connector = ScaleInvariantConnector(config)
    inputs = goldens.noise(1, TOKENS, WIDTH), goldens.noise(2, TOKENS, WIDTH), [2]
    assert not torch.equal(connector(*inputs), connector(*inputs))
    connector.eval()
    assert torch.equal(connector(*inputs), connector(*inputs))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "needs sub_images and num_sub_images"),
        ([5], r"\[5\]: 2 counts with sum 5"),
        ([2, 2], r"\[2, 2\]: 2 counts with sum 5"),
        ([2, 2, 1], r"2 counts with sum 5"),
    ],
)
def test_wrong_numbers_of_sub_images_are_an_error(counts: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cached_connector()(goldens.noise(2, TOKENS, WIDTH), goldens.noise(5, TOKENS, WIDTH), counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_as_it_was(tmp_path: Path, kind: str) -> None:
    connector = goldens.connector(kind)
    save_connector(connector, tmp_path / "projector")
    again = load_connector(tmp_path / "projector").eval()
    assert again.config == connector.config
    inputs = goldens.noise(1, TOKENS, WIDTH), goldens.noise(2, TOKENS, WIDTH), [2]
    assert torch.equal(again(*inputs), connector(*inputs))


def test_a_published_folder_says_neither_heads_nor_sizes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = ConnectorConfig(
        visual_hidden_size=768, llm_hidden_size=8, num_hidden_layers=1, cross_attention=False
    )
    save_file(ScaleInvariantConnector(config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "q_former_projector"}')
    assert load_connector(tmp_path).config == config


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="projector: no such file or folder"):
        load_connector(tmp_path / "projector")


def test_tensors_of_something_else_are_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"no connector checkpoint.*lm_head\.weight"):
        connector_config_of({"lm_head.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("layers", "frequency", "crossed"), [(2, 2, [0]), (3, 2, [0, 2]), (4, 3, [0, 3]), (1, 1, [0])]
)
def test_frequency_is_read_from_the_names(layers: int, frequency: int, crossed: list[int]) -> None:
    config = ConnectorConfig(
        visual_hidden_size=8,
        llm_hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        cross_attention_freq=frequency,
        depth=2,
    )
    connector = ScaleInvariantConnector(config)
    has = [layer.has_cross_attention for layer in connector.model.bert.encoder.layer]
    assert [index for index, crosses in enumerate(has) if crosses] == crossed
    read = connector_config_of(connector.state_dict(), num_attention_heads=2)
    assert read == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, found 0"),
        ({"depth": 0}, "depth: expected at least 1"),
        ({"num_attention_heads": 7}, "768 is not a multiple of num_attention_heads 7"),
    ],
)
def test_impossible_sizes_are_an_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**changes)
