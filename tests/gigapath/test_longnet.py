from __future__ import annotations

import pytest
import torch

from gigapath.longnet import EncoderLayer, LongNetConfig, LongNetEncoder, default_segment_lengths
from tests.gigapath.slide_goldens import golden_json


def small_encoder(**changes: object) -> LongNetEncoder:
    settings = dict(
        embed_dim=32, depth=3, num_heads=4, segment_lengths=(4, 16), dilated_ratios=(1, 2)
    )
    torch.manual_seed(0)
    return LongNetEncoder(LongNetConfig(**{**settings, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", golden_json("slide/segment_lengths"))
def test_segment_lengths_are_the_originals(case: dict) -> None:
    found = default_segment_lengths(case["max_wsi_size"], case["tile_size"])
    assert list(found) == case["segment_length"]


def test_a_slide_smaller_than_a_tile_has_no_segments() -> None:
    with pytest.raises(ValueError, match="max_wsi_size 100: expected at least tile_size 256"):
        default_segment_lengths(100, 256)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    encoder = small_encoder().eval()
    lengths = [7, 7, 20, 1, 7]
    tokens = torch.randn(sum(lengths), 32)
    with torch.no_grad():
        together = encoder(tokens.clone(), lengths).split(lengths)
        alone = [encoder(part.clone(), [len(part)]) for part in tokens.split(lengths)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_in_place_without_gradients_is_the_same() -> None:
    encoder = small_encoder().eval()
    tokens = torch.randn(2 * 600, 32)  # more than one chunk of the feed-forward part
    with_graph = encoder(tokens, [600, 600])
    with torch.no_grad():
        found = encoder(tokens.clone(), [600, 600])
    torch.testing.assert_close(found, with_graph.detach(), rtol=0, atol=1e-5)


def test_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        encoder = small_encoder(dropout=0.3).train()
        encoder.grad_checkpointing = checkpointing
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        tokens = torch.randn(50, 32).requires_grad_()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = encoder(tokens, [30, 20])
        kept.append(sum(sizes))
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert kept[1] < kept[0] / 5
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_are_left_out_for_whole_sequences_and_on_average_kept() -> None:
    config = LongNetConfig(
        embed_dim=8, depth=2, num_heads=2, segment_lengths=(4,), dilated_ratios=(1,),
        drop_path_rate=0.4,
    )  # fmt: skip
    layers = [EncoderLayer(config, index) for index in range(2)]
    assert [layer.drop_path for layer in layers] == [0.0, 0.4]
    torch.manual_seed(0)
    lengths = [1 + index % 3 for index in range(3000)]
    factors = layers[1].train()._drop_sequences(torch.ones(sum(lengths), 8), lengths)
    values = [part.unique() for part in factors.split(lengths)]
    assert all(len(value) == 1 for value in values)
    assert sorted(set(torch.cat(values).tolist())) == pytest.approx([0.0, 1 / 0.6])
    assert float(torch.cat(values).mean()) == pytest.approx(1.0, abs=0.05)
    unchanged = torch.ones(3, 8)
    assert layers[1].eval()._drop_sequences(unchanged, [3]) is unchanged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=5), "embed_dim 32: expected a multiple of num_heads 5"),
        (dict(dilated_ratios=(1,)), "expected equally many"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_encoder(**change)


def test_every_layer_takes_the_backend() -> None:
    encoder = small_encoder().eval()
    tokens = torch.randn(40, 32)
    with torch.no_grad():
        default = encoder(tokens.clone(), [40])
        encoder.set_attention_backend("math")
        torch.testing.assert_close(encoder(tokens.clone(), [40]), default, rtol=0, atol=1e-5)
        encoder.set_attention_backend("none such")
        with pytest.raises(ValueError, match="none such"):
            encoder(tokens.clone(), [40])
