"""Questions during training: with sub-images, the published prompt, and no side effects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor
from xtuner.utils import PROMPT_TEMPLATE

from pallava.anyres import AnyRes
from pallava.evaluate_chat_hook import EvaluateChatHook
from pallava.model import LLaVAModel
from pathcore.images import ImageError
from tests.pallava import goldens

TOKENIZER = {
    "type": AutoTokenizer.from_pretrained,
    "pretrained_model_name_or_path": str(goldens.TINY_LLAMA),
}
PICTURE = goldens.GOLDEN / "anyres" / "sq_big.png"
QUESTION = "Is fibrosis shown?"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processor")
    CLIPImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return {
        "type": CLIPImageProcessor.from_pretrained,
        "pretrained_model_name_or_path": str(folder),
    }


def hook(processor: dict[str, Any] | None, **changes: Any) -> EvaluateChatHook:
    arguments: dict[str, Any] = {
        "tokenizer": dict(TOKENIZER),
        "evaluation_inputs": [QUESTION],
        "evaluation_images": str(PICTURE),
        "image_processor": dict(processor) if processor else None,
        "prompt_template": PROMPT_TEMPLATE.llama3_chat,
        "projector_type": "qformer_mlp",
        "max_new_tokens": 12,
        "generation_kwargs": {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
    }
    return EvaluateChatHook(**(arguments | changes))


class Run:
    """What the hook asks of a runner."""

    def __init__(self, model: LLaVAModel, folder: Path) -> None:
        self.model, self.log_dir, self.iter, self.cfg = model, str(folder), 3, {}
        self.said: list[str] = []
        self.logger = SimpleNamespace(info=self.said.append)
        self.hooks: list[object] = []


def build(checkpoint: Path = goldens.RELEASED_PTH) -> LLaVAModel:
    return LLaVAModel(
        llm=goldens.llm(r=0),
        visual_encoder=goldens.encoder(),
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=goldens.lora_config(target_modules=None),
        num_hidden_layers=2,
        pretrained_pth=checkpoint,
        use_activation_checkpointing=True,
    ).train()


def test_the_recorded_answer_is_given(processor: dict[str, Any], tmp_path: Path) -> None:
    (case,) = [
        case
        for case in goldens.read_json("generate/cases.json")
        if case["question_id"] == "q1" and case["bos"] == "single_bos_as_training"
    ]
    run = Run(build(), tmp_path)
    hook(processor).after_train(run)
    assert f"{case['prompt_text']}{case['text']}\n" in "".join(run.said)


def test_sub_images_are_seen_as_in_training(processor: dict[str, Any], tmp_path: Path) -> None:
    model = build(goldens.CROSSATTN_STATE)
    seen: list[int] = []
    embeddings = model.visual_encoder.vision_model.embeddings
    embeddings.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    asking = hook(processor)
    expected = AnyRes(tile_px=32)(Image.open(PICTURE).convert("RGB"))
    assert torch.equal(asking.evaluation_images[0], expected)
    asking.after_train(Run(model, tmp_path))
    assert sum(seen) == 5
    tall = Image.open(PICTURE.with_name("tall_3.png")).convert("RGB")
    padding = hook(
        processor, evaluation_images=str(PICTURE.with_name("tall_3.png")), pad_image_to_square=True
    )
    squared = AnyRes(tile_px=32, ties="largest_scale", pad_to_square=True)(tall)
    assert torch.equal(padding.evaluation_images[0], squared)
    assert [len(image) for image in hook(processor, anyres_image=False).evaluation_images] == [1]


def test_images_are_prepared_as_the_data_set_prepares_them(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    name = PICTURE.with_name("tall_3.png")
    tall = Image.open(name).convert("RGB")
    run = Run(build(), tmp_path)
    dataset = {"grid_ties": "published", "pad_image_to_square": True, "anyres_image": False}
    run.cfg = {"train_dataloader": {"dataset": dataset}}
    asking = hook(processor, evaluation_images=str(name))
    asking.before_train(run)
    trained = AnyRes(tile_px=32, ties="published", pad_to_square=True, sub_images=False)
    assert torch.equal(asking.evaluation_images[0], trained(tall))
    stated = hook(
        processor, evaluation_images=str(name), pad_image_to_square=False, anyres_image=True
    )
    stated.before_train(run)
    assert torch.equal(stated.evaluation_images[0], AnyRes(tile_px=32, ties="published")(tall))


def test_training_goes_on_as_before(processor: dict[str, Any], tmp_path: Path) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hook(processor).before_train(Run(model, tmp_path))
    assert model.training and model.projector.training
    assert model.llm.is_gradient_checkpointing and model.projector.gradient_checkpointing
    assert model.llm.config.use_cache is False
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_answers_are_saved_with_a_checkpoint(processor: dict[str, Any], tmp_path: Path) -> None:
    run = Run(build(), tmp_path)
    hook(processor)._generate_samples(run, max_new_tokens=2, save_eval_output=True)
    text = (tmp_path / "vis_data" / "eval_outputs_iter_3.txt").read_text()
    assert text.startswith("Eval output 1:\n<|start_header_id|>user")
    assert QUESTION in text


def test_questions_without_images_are_asked_as_text(tmp_path: Path) -> None:
    run = Run(build(), tmp_path)
    hook(None, evaluation_images=None).after_train(run)
    assert QUESTION in "".join(run.said)


def test_one_image_serves_all_questions(processor: dict[str, Any], tmp_path: Path) -> None:
    asking = hook(processor, evaluation_inputs=["a?", "b?"])
    assert len(asking.evaluation_images) == 2
    other = str(goldens.GOLDEN / "anyres" / "tall_3.png")
    both = hook(processor, evaluation_inputs=["a?", "b?"], evaluation_images=[str(PICTURE), other])
    assert [len(image) for image in both.evaluation_images] == [5, 9]
    run = Run(build(), tmp_path)
    both.after_train(run)
    assert sum("Sample output" in line for line in run.said) == 2


def test_the_system_prompt_comes_first(processor: dict[str, Any], tmp_path: Path) -> None:
    run = Run(build(), tmp_path)
    hook(processor, system="You see tissue.").after_train(run)
    said = "".join(run.said)
    assert 0 <= said.index("You see tissue.") < said.index("<image>")


def test_hooks_do_not_share_their_stop_words(processor: dict[str, Any]) -> None:
    numbers = [len(hook(processor).stop_criteria) for _ in range(3)]
    assert len(set(numbers)) == 1


def test_an_absent_image_is_named_before_training(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation image .*absent\.png: no such file"):
        hook(processor, evaluation_images=str(tmp_path / "absent.png"))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ImageError, match=r"a\.png'?: not a readable image"):
        hook(processor, evaluation_images=str(tmp_path / "a.png"))


def test_images_and_questions_must_agree(processor: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="2 evaluation_images for 1 evaluation_inputs"):
        hook(processor, evaluation_images=[str(PICTURE)] * 2)
    with pytest.raises(ValueError, match="evaluation_images need an image_processor"):
        hook(None)
