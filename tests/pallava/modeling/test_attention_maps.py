"""The map shows the attention that the connector's SDPA computes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig

from pallava.modeling.attention_maps import sub_image_attention
from pallava.modeling.llava import PALLaVA
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector


def model(cross_attention: bool = True) -> PALLaVA:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    sizes = {"visual_hidden_size": 16, "llm_hidden_size": 8, "num_attention_heads": 2}
    config = ConnectorConfig(
        **sizes, num_hidden_layers=1, intermediate_size=32, cross_attention=cross_attention
    )
    connector = ScaleInvariantConnector(config)
    return PALLaVA(nn.Identity(), PLIPVisionEncoder(vision), connector)


def test_map_is_a_distribution_over_the_sub_images() -> None:
    attention = sub_image_attention(model(), torch.randn(6, 3, 32, 32))
    assert attention is not None and attention.shape == (5, 2, 2)
    torch.testing.assert_close(attention.sum(), torch.tensor(1.0))


def test_sharp_keys_move_the_map_to_their_sub_image() -> None:
    built = model()
    pixels = torch.randn(5, 3, 32, 32)
    weights = built.projector.model.bert.encoder.layer[0].crossattention.get_submodule("self")
    with torch.no_grad():
        features = built.visual_encoder.features(pixels[1:])
        # All queries ask for the mean feature of the third sub-image.
        direction = features[2].mean(dim=0) - features.mean(dim=(0, 1))
        weights.query.weight.zero_()
        weights.query.bias.copy_(60 * direction / direction.norm())
        weights.key.weight.copy_(torch.eye(16))
        weights.key.bias.zero_()
    attention = sub_image_attention(built, pixels)
    assert attention is not None and attention.sum(dim=(1, 2)).argmax() == 2


def test_nothing_to_show_where_sub_images_are_not_looked_at() -> None:
    assert sub_image_attention(model(cross_attention=False), torch.randn(5, 3, 32, 32)) is None
    assert sub_image_attention(model(), torch.randn(1, 3, 32, 32)) is None


def test_training_mode_is_left_as_it_was() -> None:
    built = model().train()
    sub_image_attention(built, torch.randn(3, 3, 32, 32))
    assert built.training and built.projector.training
