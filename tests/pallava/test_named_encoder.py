"""PA-LLaVA on encoders by name: tokens, training, what is written, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from pallava import load_model
from pallava.model import LLaVAModel
from pallava.named_encoder import NamedVisionEncoder, load_named_encoder
from pathcore.encoders import create_encoder
from pathcore.encoders.patch_tokens import PatchTokens
from pathcore.encoders.towers import EncoderError, build_tower
from tests.pallava import goldens
from tests.pathcore.encoders.tiny_presets import TINY_VIT, tiny_uni

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
SMALL |= dict(image_size=32, patch_size=8)


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    with tiny_uni(tmp_path) as found:
        yield found


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224"],
)
def test_tokens_of_timm_are_those_of_its_intermediates(architecture: str) -> None:
    arguments = dict(img_size=56, embed_dim=32, depth=3, num_heads=2)
    tower = build_tower(dict(library="timm", architecture=architecture, arguments=arguments))
    read, pixels = PatchTokens(tower), torch.randn(2, 3, 56, 56)
    module: Any = tower.module.eval()
    expected = module.forward_intermediates(
        pixels, indices=3, norm=False, output_fmt="NLC", intermediates_only=True
    )
    for state in (1, 2, 3):
        assert torch.equal(read(pixels, state), expected[state - 1])
    assert torch.equal(read(pixels), expected[-2])
    assert read(pixels, 0).shape == (2, (56 // read.patch_px) ** 2, 32)
    with pytest.raises(ValueError, match=r"select_layer 4: the encoder has hidden states -4\.\.3"):
        read(pixels, 4)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (dict(model_type="clip_vision_model"), 1),
        (dict(model_type="dinov2", mlp_ratio=2), 1),
        (dict(model_type="dinov2_with_registers", num_register_tokens=3), 4),
        (dict(model_type="vit"), 1),
        (dict(model_type="deit"), 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_tokens_of_transformers_are_its_hidden_states(config: dict[str, Any], prefix: int) -> None:
    tower = build_tower(dict(library="transformers", config={**SMALL, **config}))
    read, pixels = PatchTokens(tower), torch.randn(2, 3, 32, 32)
    states = tower.module(pixels, output_hidden_states=True).hidden_states
    for state in range(4):
        torch.testing.assert_close(read(pixels, state), states[state][:, prefix:])


def test_tokens_of_open_clip_are_those_of_its_intermediates() -> None:
    vision = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16)
    tower = build_tower(dict(library="open_clip", config=dict(embed_dim=16, vision_cfg=vision)))
    read, pixels = PatchTokens(tower), torch.randn(2, 3, 32, 32)
    module: Any = tower.module
    expected = module.forward_intermediates(
        pixels, indices=3, output_fmt="NLC", intermediates_only=True
    )["image_intermediates"]
    for state in (1, 2, 3):
        torch.testing.assert_close(read(pixels, state), expected[state - 1])


def test_networks_without_patch_tokens_are_refused() -> None:
    for architecture in ("resnet18", "convnext_atto"):
        with pytest.raises(EncoderError, match="has no patch tokens; expected a vision trans"):
            PatchTokens(build_tower(dict(library="timm", architecture=architecture)))


def build(visual_encoder: Any, **changes: Any) -> LLaVAModel:
    arguments: dict[str, Any] = {
        "llm": {
            "type": AutoModelForCausalLM.from_pretrained,
            "pretrained_model_name_or_path": str(goldens.TINY_LLAMA),
        },
        "visual_encoder": visual_encoder,
        "freeze_llm": True,
        "freeze_visual_encoder": True,
        "llm_lora": goldens.lora_config(target_modules=None),
        "num_hidden_layers": 2,
        "connector": {"num_attention_heads": 4},
        "use_activation_checkpointing": False,
    }
    return LLaVAModel(**(arguments | changes))


@pytest.mark.parametrize("frozen", [True, False])
def test_it_trains_and_answers_again_from_what_was_written(
    name: str, tmp_path: Path, frozen: bool
) -> None:
    import pallava.engine.parts  # noqa: F401  (registers the types)

    torch.manual_seed(0)
    config = dict(type="NamedVisionEncoder", encoder=name)
    model = build(config, freeze_visual_encoder=frozen).train()
    assert model.visual_encoder.config.hidden_size == TINY_VIT["embed_dim"]
    ids = torch.tensor([[0, -200, 9, 12]])
    batch = {"input_ids": ids, "labels": ids.clamp(min=0), "attention_mask": ids != -1}
    model(batch | {"pixel_values": [goldens.noise(5, 3, 32, 32)]})["loss"].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any(n.startswith("visual_encoder.") for n in moved) is not frozen
    assert any(n.startswith("visual_encoder.") for n in model.state_dict()) is not frozen
    model.eval().to_hf(None, str(tmp_path / "out"), fp32=True)
    assert (tmp_path / "out" / "visual_encoder").is_dir() is not frozen
    again = load_model(
        goldens.TINY_LLAMA,
        tmp_path / "out",
        f"encoder:{name}" if frozen else None,
        prompt_template="vicuna",
        device="cpu",
    )
    pixels = [goldens.noise(5, 3, 32, 32)]
    with torch.no_grad():
        torch.testing.assert_close(again.model.encode_images(pixels), model.encode_images(pixels))
    picture = Image.new("RGB", (50, 40), (200, 100, 150))
    assert isinstance(again.answer(picture, "What?", max_new_tokens=2), str)
    if not frozen:
        with pytest.raises(ValueError, match="leave --visual-encoder out"):
            load_model(goldens.TINY_LLAMA, tmp_path / "out", f"encoder:{name}", device="cpu")


def test_pixels_are_those_of_the_encoder(name: str, tmp_path: Path) -> None:
    from xtuner.registry import BUILDER

    import pallava.engine.parts  # noqa: F401  (registers the types)
    from pallava.anyres import AnyRes

    processor = BUILDER.build(dict(type="EncoderImageProcessor", encoder=name))
    prepare = AnyRes.from_image_processor(processor, sub_images=False)
    picture = Image.fromarray((goldens.noise(1, 32, 32, 3)[0] * 60 + 120).byte().numpy())
    (pixels,) = prepare(picture)
    encoder = create_encoder(name, device="cpu")
    torch.testing.assert_close(pixels, encoder.transform(picture), atol=1e-5, rtol=0)
    vision = NamedVisionEncoder(name)
    tokens = vision.features(pixels[None], -1)
    module: Any = encoder.module
    (expected,) = module.forward_intermediates(
        pixels[None], indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(tokens, expected)
    vision.save(tmp_path / "saved")
    saved = load_named_encoder(tmp_path / "saved")
    assert torch.equal(saved.features(pixels[None], -1), tokens)
    assert saved.transform == vision.transform
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 32, 32\), as tiny-uni takes them"):
        vision.features(torch.zeros(1, 3, 16, 16))


def test_one_folder_for_transformers_refuses_it_in_one_line(name: str, tmp_path: Path) -> None:
    from pallava.engine.recipe import read_recipe

    for value in (f"dict(type='NamedVisionEncoder', encoder={name!r})", repr(f"encoder:{name}")):
        config = tmp_path / "config.py"
        config.write_text(f"model = dict(llm=dict(), visual_encoder={value})\n")
        with pytest.raises(ValueError, match="cannot travel with an exported model") as error:
            read_recipe(config)
        assert len(str(error.value).splitlines()) == 1
        assert f"--visual-encoder encoder:{name}" in str(error.value)


def test_what_has_no_tokens_or_no_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    with pytest.raises(EncoderError, match="ResNet has no patch tokens"):
        NamedVisionEncoder(f"timm:resnet18.tv_in1k@{weights}")
    with pytest.raises(ValueError, match="did you mean uni2-h"):
        build("encoder:uni2h")
