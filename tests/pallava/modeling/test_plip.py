"""The vision encoder against the goldens, against Hugging Face's, and what it skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from pallava.modeling.folders import load_vision_encoder, read_vision_config, save_vision_encoder
from pallava.modeling.plip import PLIPVisionEncoder
from pathcore.weights import CheckpointError
from tests.pallava import goldens

SIZES = ("img32", "img64")


def tiny_config(**changes: object) -> CLIPVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    return CLIPVisionConfig(**(sizes | changes))


@pytest.mark.parametrize("size", SIZES)
def test_every_hidden_state_is_the_published_one(size: str) -> None:
    io = goldens.read_tensors(f"visual_encoder/{size}_io.safetensors")
    encoder = goldens.encoder(size)
    with torch.no_grad():
        output = encoder(io["pixel_values"], output_hidden_states=True)
    expected = [io[f"hidden_states.{index}"] for index in range(len(output.hidden_states))]
    assert len(expected) == encoder.config.num_hidden_layers + 1
    for found, wanted in zip(output.hidden_states, expected, strict=True):
        # Values reach 5: the last digits of float32 are on top of the goldens' 2e-6.
        torch.testing.assert_close(found, wanted, atol=goldens.ENCODER_ATOL, rtol=1e-6)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(output[name], io[name], atol=goldens.ENCODER_ATOL, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frozen", [True, False])
def test_selected_features_are_the_published_ones(size: str, frozen: bool) -> None:
    io = goldens.read_tensors(f"visual_encoder/{size}_io.safetensors")
    found = goldens.encoder(size).requires_grad_(not frozen).features(io["pixel_values"])
    torch.testing.assert_close(
        found, io["selected_minus2_no_cls"], atol=goldens.ENCODER_ATOL, rtol=0
    )


@pytest.mark.parametrize("select_layer", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_features_of_any_layer_are_those_of_the_whole_run(select_layer: int) -> None:
    encoder = goldens.encoder()
    pixels = goldens.noise(2, 3, 32, 32)
    with torch.no_grad():
        whole = encoder(pixels, output_hidden_states=True).hidden_states[select_layer][:, 1:]
        assert torch.equal(encoder.features(pixels, select_layer), whole)


@pytest.mark.parametrize("number", [1, 4, 5, 11])
def test_a_frozen_encoder_takes_few_tiles_at_once_and_loses_none(number: int) -> None:
    encoder, pixels = goldens.encoder(), goldens.noise(number, 3, 32, 32)
    expected = encoder.features(pixels)
    batches: list[int] = []
    embeddings = encoder.vision_model.embeddings
    embeddings.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    found = encoder.requires_grad_(False).features(pixels)
    torch.testing.assert_close(found, expected.detach(), atol=goldens.ENCODER_ATOL, rtol=0)
    assert sum(batches) == number
    assert max(batches) <= 4


def test_layers_above_the_selected_one_do_not_run() -> None:
    encoder = goldens.encoder()
    calls = []
    for index, layer in enumerate(encoder.vision_model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    encoder.vision_model.post_layrnorm.register_forward_hook(lambda *_: calls.append("norm"))
    encoder.features(goldens.noise(1, 3, 32, 32), select_layer=-2)
    assert calls == [0, 1]


def test_a_frozen_encoder_keeps_no_graph() -> None:
    encoder, pixels = goldens.encoder().train(), goldens.noise(1, 3, 32, 32)

    def saved_tensors() -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            features = encoder.features(pixels)
        assert features.requires_grad == (len(saved) > 0)
        return len(saved)

    assert saved_tensors() > 0
    encoder.requires_grad_(False)
    assert saved_tensors() == 0


def test_checkpointing_changes_no_gradient() -> None:
    pixels = goldens.noise(2, 3, 32, 32)
    norms = []
    for enable in (False, True):
        encoder = goldens.encoder().train()
        if enable:
            encoder.gradient_checkpointing_enable()
        encoder.features(pixels).square().sum().backward()
        norms.append(goldens.gradient_norms(encoder))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0]["vision_model.encoder.layers.0.mlp.fc1.weight"] > 0


@pytest.mark.parametrize("select_layer", [-5, 4, 12])
def test_a_layer_that_is_not_there_is_an_error(select_layer: int) -> None:
    with pytest.raises(ValueError, match=rf"select_layer {select_layer}.*-4\.\.3"):
        goldens.encoder().features(goldens.noise(1, 3, 32, 32), select_layer)


def test_pixels_of_another_size_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"expected \(batch, 3, 32, 32\), found \(1, 3, 224, 224\)"
    ):
        goldens.encoder().features(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "image_size 40 is not a multiple of patch_size 16"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLIPVisionEncoder(tiny_config(**changes))


def test_a_saved_folder_is_a_clip_vision_model(tmp_path: Path) -> None:
    encoder, pixels = goldens.encoder("img64"), goldens.noise(2, 3, 64, 64)
    save_vision_encoder(encoder, tmp_path / "plip")
    reference, info = CLIPVisionModel.from_pretrained(
        tmp_path / "plip", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert_same_states(encoder, reference.eval(), pixels)
    again = load_vision_encoder(tmp_path / "plip").eval()
    assert torch.equal(again.features(pixels), encoder.features(pixels))
    assert not list((tmp_path / "plip").glob("*.partial"))


def test_a_saved_folder_keeps_the_image_statistics(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    save_vision_encoder(
        goldens.encoder(), tmp_path, image_mean=(0.7, 0.5, 0.6), image_std=(0.1, 0.2, 0.3)
    )
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_size == {"height": 32, "width": 32}
    assert (processor.image_mean, processor.image_std) == ([0.7, 0.5, 0.6], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("safe", [True, False])
def test_a_clip_vision_folder_loads(tmp_path: Path, safe: bool) -> None:
    reference = noisy(CLIPVisionModel(tiny_config(attn_implementation="eager")))
    reference.save_pretrained(tmp_path, safe_serialization=safe)
    encoder = load_vision_encoder(tmp_path).eval()
    assert_same_states(encoder, reference, goldens.noise(2, 3, 32, 32))


def test_the_vision_tower_of_a_whole_clip_folder_loads(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    text |= {"num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=tiny_config().to_dict(), text_config=text, attn_implementation="eager"
    )
    reference = noisy(CLIPModel(config))
    reference.save_pretrained(tmp_path)
    encoder = load_vision_encoder(tmp_path).eval()
    assert_same_states(encoder, reference, goldens.noise(2, 3, 32, 32))


def test_an_absent_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"visual encoder .*plip.*config\.json and weights"):
        load_vision_encoder(tmp_path / "plip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama"}', "no CLIP vision config"),
        ("[]", "no CLIP vision config"),
        ("{", "no JSON"),
    ],
)
def test_a_folder_of_something_else_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        read_vision_config(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        load_vision_encoder(tmp_path)


def test_weights_of_another_size_are_an_error(tmp_path: Path) -> None:
    CLIPVisionModel(tiny_config()).save_pretrained(tmp_path)
    tiny_config(intermediate_size=48, num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_vision_encoder(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing: vision_model.encoder.layers.3.self_attn.q_proj.weight" in message
    assert "mlp.fc1.weight: (64, 32) found, (48, 32) expected" in message


def test_weights_without_a_vision_tower_are_an_error(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    torch.save({"text_model.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"hold no vision_model\.\*"):
        load_vision_encoder(tmp_path)


def noisy(module: nn.Module) -> nn.Module:
    """Fills every parameter, biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def assert_same_states(
    encoder: PLIPVisionEncoder, reference: nn.Module, pixels: torch.Tensor
) -> None:
    tower = reference.vision_model
    with torch.no_grad():
        ours = encoder(pixels, output_hidden_states=True)
        theirs = tower(pixels, output_hidden_states=True)
    for found, wanted in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)
