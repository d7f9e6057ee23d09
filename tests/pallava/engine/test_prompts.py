"""The template that the training data is written in, whatever else a config names."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

from pallava import load_model
from pallava.dataset import LLaVADataset
from pallava.engine.prompts import (
    NO_TEMPLATE,
    disagreeing_templates,
    template_of,
    trained_template,
)
from pallava.engine.recipe import read_recipe, trained_preparation
from pallava.engine.tokenised import settings_from_names, tokenise
from pallava.release.pth_to_hf import convert_checkpoint
from pallava.text.encoding import IMAGE_TOKEN_INDEX
from pallava.text.templates import PROMPT_TEMPLATES, PromptTemplate
from tests.pallava.engine.tiny_run import CONFIGS, make_folder
from tests.pallava.goldens import RELEASED_PTH, TINY_LLAMA

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", sorted(PROMPT_TEMPLATE.keys()))
def test_every_template_of_xtuner_is_found_out(name: str) -> None:
    found = template_of(template_map_fn_factory(template=PROMPT_TEMPLATE[name]))
    assert found == PromptTemplate.from_fields(PROMPT_TEMPLATE[name])
    assert found.same_text(PROMPT_TEMPLATES[found.name])


def test_a_template_of_the_users_own() -> None:
    template = PROMPT_TEMPLATE.qwen_chat | {"INSTRUCTION": "Q{round}: {input}\nA: "}
    found = template_of(partial(template_map_fn, template=type(PROMPT_TEMPLATE)(template)))
    assert found.instruction == "Q{round}: {input}\nA: " and found.name == "unnamed"
    assert found.stop_words == ("<|im_end|>", "<|endoftext|>")


def test_without_a_template_the_bare_question_is_recorded() -> None:
    assert template_of(None) == NO_TEMPLATE
    assert NO_TEMPLATE.render("Is it red?") == "Is it red?"


def test_a_function_that_is_no_template_is_an_error() -> None:
    def shout(row: dict[str, Any]) -> dict[str, Any]:
        turns = [{**t, "input": t["input"].lower()} for t in row["conversation"]]
        return {"conversation": turns}

    with pytest.raises(ValueError, match="cannot be written as a prompt template"):
        template_of(shout)


def dataset(name: str, **others: Any) -> dict[str, Any]:
    template = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE[name])
    return dict(type=LLaVADataset, template_map_fn=template, **others)


def test_several_data_sets_agree_or_are_refused() -> None:
    both = [dataset("qwen_chat"), dataset("qwen_chat")]
    cfg = Config({"train_dataloader": {"dataset": {"type": "ConcatDataset", "datasets": both}}})
    assert trained_template(cfg).name == "qwen_chat"
    cfg.train_dataloader.dataset.datasets[1] = dataset("gemma")
    with pytest.raises(
        ValueError, match=r"datasets\[1\] uses .* 'gemma', .*\[0\] uses 'qwen_chat'"
    ):
        trained_template(cfg)
    assert trained_preparation(cfg)["ties"] == "largest_scale"
    assert trained_preparation(cfg)["pad_to_square"] is False
    cfg.train_dataloader.dataset.datasets[1]["grid_ties"] = "published"
    with pytest.raises(ValueError, match=r"datasets\[0\]: 'largest_scale', .*\[1\]: 'published'"):
        trained_preparation(cfg)
    del cfg.train_dataloader.dataset.datasets[1]["grid_ties"]
    cfg.train_dataloader.dataset.datasets[1]["pad_image_to_square"] = True
    with pytest.raises(ValueError, match=r"pad_image_to_square: .*\[0\]: False, .*\[1\]: True"):
        trained_preparation(cfg)


def test_other_positions_of_a_config_are_named_when_they_differ() -> None:
    llama3 = PROMPT_TEMPLATE.llama3_chat
    hooks = [{"type": "A"}, {"type": "EvaluateChatHook", "prompt_template": llama3}]
    cfg = Config(
        {
            "prompt_template": llama3,
            "custom_hooks": hooks,
            "train_dataloader": {"dataset": dataset("qwen_chat")},
        }
    )
    names = [text.split(" ")[0] for text in disagreeing_templates(cfg, trained_template(cfg))]
    assert names == ["prompt_template", "custom_hooks[1].prompt_template"]
    cfg.train_dataloader.dataset = dataset("llama3_chat")
    assert disagreeing_templates(cfg, trained_template(cfg)) == []


def test_tokenised_rows_bring_their_template(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "yes"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "conversations": turns}))
    tokenise(rows, tmp_path / "text", settings_from_names(str(TINY_LLAMA), "vicuna"))
    offline = dataset("llama3_chat", offline_processed_text_folder=str(tmp_path / "text"))
    assert trained_template({"train_dataloader": {"dataset": offline}}).name == "vicuna"


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose tokenizer carries ChatML, and a config that trains in it."""
    from transformers import AutoTokenizer

    root = make_folder(tmp_path_factory.mktemp("chatml"), num_images=2)
    llm = root / "data" / "tiny" / "llama"
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(llm)
    shutil.copytree(CONFIGS, root / "configs")
    config = root / "configs" / "chatml.py"
    config.write_text(
        "from mmengine.config import read_base\n\n"
        "with read_base():\n    from .pallava_domain_alignment_tiny import *\n\n"
        "from xtuner.utils import PROMPT_TEMPLATE as TEMPLATES\n\n"
        "# A variable of the base that is assigned again does not reach the data set.\n"
        'train_dataloader["dataset"]["template_map_fn"].update(template=TEMPLATES.qwen_chat)\n'
        'model["llm_lora"].update(r=4, lora_alpha=8)\n'
    )
    return root, config


def test_the_trained_template_travels_with_the_weights(
    chatml: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import AutoTokenizer

    root, config = chatml
    monkeypatch.chdir(root)
    with caplog.at_level(logging.WARNING):
        dataset = "train_dataloader.dataset"
        images = {f"{dataset}.pad_image_to_square": True, f"{dataset}.anyres_image": False}
        recipe, save_tokenizer = read_recipe(config, options=images)
    assert recipe.sub_images is False
    assert "prompt_template is 'llama3_chat', but the training data uses 'qwen_chat'" in caplog.text
    parts = tmp_path / "parts"
    convert_checkpoint(RELEASED_PTH, recipe, parts, save_tokenizer=save_tokenizer)
    assert json.loads((parts / "processor_config.json").read_bytes())["pad_to_square"]
    record = json.loads((parts / "conversion.json").read_bytes())["prompt_template"]
    assert PromptTemplate.from_fields(record).name == "qwen_chat"

    cfg = Config.fromfile(config)
    rows = tmp_path / "rows.jsonl"
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
    rows.write_text(json.dumps({"id": 0, "image": "0.png", "conversations": turns}))
    data = LLaVADataset(
        data_path=rows,
        image_folder="data/tiny/images",
        tokenizer=cfg.tokenizer,
        image_processor=cfg.image_processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=cfg.train_dataloader.dataset.template_map_fn,
        skip_log=tmp_path / "skipped.jsonl",
    )
    first_learned = next(i for i, label in enumerate(data[0]["labels"]) if label >= 0)
    prompt = data[0]["input_ids"][:first_learned]
    assert IMAGE_TOKEN_INDEX in prompt

    caplog.clear()
    model = load_model("data/tiny/llama", parts, device="cpu")
    assert model.encode("Is it red?", has_image=True) == prompt
    assert model.prompt_template == "qwen_chat" and not caplog.text
    assert model.anyres.pad_to_square
    tokenizer = AutoTokenizer.from_pretrained(parts)
    messages = [{"role": "user", "content": "Is it red?"}]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=CHATML, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == theirs

    other = load_model("data/tiny/llama", parts, device="cpu", prompt_template="gemma")
    assert other.prompt_template == "gemma"
    assert "trained with 'qwen_chat'" in caplog.text
