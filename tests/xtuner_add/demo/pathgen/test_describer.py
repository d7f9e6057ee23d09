from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathcore.chat_backends import Request, Sampling
from pathcore.chat_local import LocalBackend
from xtuner_add.demo import language_model
from xtuner_add.demo.pathgen import describer
from xtuner_add.demo.pathgen.describer import DescriberSizes, Lesson, train_describer
from xtuner_add.demo.pathgen.wording import Field

SIZES = DescriberSizes(
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    naming_steps=2,
    steps=5,
    batch_size=2,
)
FIELDS = [Field(("glands",), True), Field(("fat", "mucin"), None), Field(("fat",), None, "ink")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = {**size, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {**size, "num_attention_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text, vision, projection_dim=16)).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> list[Lesson]:
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [(folder / f"{number}.png", field) for number, field in enumerate(FIELDS)]


def stop_before(step: int) -> Callable[[], bool]:
    asked = iter(range(1, step + 1))
    return lambda: next(asked) == step


def test_a_stopped_training_ends_as_if_it_had_not_been(
    clip: Path, lessons: list[Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_SAVE_EVERY", 2)
    whole = train_describer(clip, lessons, tmp_path / "whole", SIZES, 3)
    with pytest.raises(InterruptedError, match="before step 4"):
        train_describer(clip, lessons, tmp_path / "again", SIZES, 3, stop_before(4))
    assert not (tmp_path / "again").exists()
    assert train_describer(clip, lessons, tmp_path / "again", SIZES, 3) == whole
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_backend_asks_as_the_training_did(
    clip: Path, lessons: list[Lesson], tmp_path: Path
) -> None:
    train_describer(clip, lessons, tmp_path / "model", SIZES, 3)
    backend = LocalBackend(str(tmp_path / "model"), Sampling(3), device="cpu")
    processor = backend._processor
    teacher = describer._Teacher(lessons, processor, 3)
    request = Request("", "Describe this field of tissue.", lessons[0][0])
    prompt = processor.apply_chat_template(
        request.messages({"type": "image"}), tokenize=False, add_generation_prompt=True
    )
    with Image.open(lessons[0][0]) as image:
        asked = processor(text=[prompt], images=[[image.convert("RGB")]], return_tensors="pt")
    taught = describer._encode(processor.tokenizer, [(teacher._chat("describe", request.user), "")])
    assert asked["input_ids"].tolist() == taught["input_ids"].tolist()
    assert torch.equal(asked["pixel_values"][0], teacher._pixels[0])
    (reply,) = backend.ask([request])
    assert reply.reply_tokens
    assert reply.prompt_tokens == taught["input_ids"].shape[1]
