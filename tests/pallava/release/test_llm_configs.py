"""The configs of today's language models: each family's twin trains, resumes, converts, answers.

The configs are the full ones; the language model is a tiny one of the same architecture, with a
tokenizer that carries the family's chat template.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn
from transformers import AutoProcessor
from xtuner.registry import BUILDER

from pallava.default_collate_fn import default_collate_fn
from pallava.engine.recipe import read_recipe
from pallava.inference.loading import load_model
from pallava.release.export import export
from pallava.release.pth_to_hf import convert_checkpoint
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN, encode_text
from tests.pallava import goldens
from tests.pallava.engine.tiny_run import CONFIGS, question, save_encoder, save_image
from tests.pallava.release.test_model_matrix import save_base
from tests.pallava.text.chat_tokenizers import chat_tokenizer

LLAMA31 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
# config: (architecture of the matrix, tokenizer, what differs from the matrix)
TWINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama31_8b": ("llama", "llama31", LLAMA31),
    "llama32_3b": ("llama_tied", "llama31", LLAMA31),
    "qwen25_7b": ("qwen2", "qwen25", {}),
    "qwen3_8b": ("qwen3", "qwen3", {}),
    "gemma3_4b": ("gemma3", "gemma3", {}),
    "medgemma_27b": ("gemma3", "gemma3", {"sliding_window": 8}),
    "mistral_7b": ("mistral", "mistral", {}),
    "phi4_14b": ("phi3", "phi4", {}),
    "smollm3_3b": ("smollm3", "smollm3", {}),
}


def config_file(name: str, stage: str = "domain_alignment") -> Path:
    return CONFIGS / f"pallava_{name}_{stage}.py"


def test_every_config_of_a_language_model_has_its_twin() -> None:
    stages = [path.stem for path in CONFIGS.glob("pallava_*_domain_alignment.py")]
    assert {f"pallava_{name}_domain_alignment" for name in (*TWINS, "qlora")} == set(stages)


@pytest.mark.parametrize("name", TWINS)
def test_both_stages_are_the_published_recipe(name: str) -> None:
    """Only the language model, its template and its LoRA targets differ."""
    for stage in ("domain_alignment", "instruction_tuning"):
        ours = Config.fromfile(config_file(name, stage)).to_dict()
        published = Config.fromfile(CONFIGS / f"pallava_{stage}.py").to_dict()
        llm = ours["llm_name_or_path"]
        assert ours["model"]["llm_lora"].pop("target_modules")
        for cfg in (ours, published):
            cfg["model"].pop("pretrained_pth", None)
            cfg["model"]["llm_lora"].pop("target_modules", None)
            for part in (cfg["train_dataloader"]["dataset"], *cfg["custom_hooks"], cfg):
                part.pop("template_map_fn", None)
                part.pop("prompt_template", None)
        text = json.dumps(published, default=str)
        assert json.dumps(ours, default=str) == text.replace(published["llm_name_or_path"], llm)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llms")
    save_encoder(folder / "plip")
    rows = []
    for index in range(3):
        save_image(folder / f"{index}.png", index)
        rows.append(json.dumps(question(index, f"{index}.png", "yes" if index % 2 else "no")))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def options(data: Path, base: Path) -> dict[str, Any]:
    return {
        "tokenizer.pretrained_model_name_or_path": str(base),
        "image_processor.pretrained_model_name_or_path": str(data / "plip"),
        "model.llm.pretrained_model_name_or_path": str(base),
        "model.llm_lora.r": 4,
        "model.llm_lora.lora_dropout": 0.0,
        "model.visual_encoder": str(data / "plip"),
        "model.num_hidden_layers": 1,
        "model.connector": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "train_dataloader.dataset.data_path": str(data / "rows.jsonl"),
        "train_dataloader.dataset.image_folder": str(data),
        "train_dataloader.dataset.tokenizer.pretrained_model_name_or_path": str(base),
        "train_dataloader.dataset.image_processor.pretrained_model_name_or_path": str(
            data / "plip"
        ),
        "train_dataloader.dataset.skip_log": str(base / "skipped.jsonl"),
    }


def build(cfg: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = BUILDER.build(copy.deepcopy(cfg.model)).train()
    settings = dict(cfg.optim_wrapper.optimizer) | {"params": model.parameters(), "lr": 3e-3}
    return model, BUILDER.build(settings)


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    loss = model(batch["data"], mode="loss")["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_resumes_converts_exports_and_answers(
    name: str, data: Path, tmp_path: Path
) -> None:
    family, tokens, changes = TWINS[name]
    tokenizer, base = chat_tokenizer(tokens), tmp_path / "base"
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    save_base(family, base, vocab_size=len(tokenizer), pad_token_id=None, **ids, **changes)
    tokenizer.save_pretrained(base)
    cfg = Config.fromfile(config_file(name))
    cfg.merge_from_dict(options(data, base))

    dataset = BUILDER.build(cfg.train_dataloader.dataset)
    messages = [
        {"role": "user", "content": f"{IMAGE_TOKEN}\nIs it red?"},
        {"role": "assistant", "content": "no"},
    ]
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        enable_thinking=False,
        strftime_now=lambda form: "26 Jul 2024" if "%b" in form else "26 July 2024",
    )
    assert dataset[0]["input_ids"] == encode_text(tokenizer, text)

    model, optimizer = build(cfg)
    adapted = {name.rpartition(".")[2] for name, module in model.llm.named_modules()
               if hasattr(module, "lora_A")}  # fmt: skip
    linear = {
        name.rpartition(".")[2]
        for name, module in BUILDER.build(cfg.model.llm).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert adapted == linear - {"lm_head"}
    batch = default_collate_fn([dataset[index] for index in range(3)])
    losses = [step(model, optimizer, batch) for _ in range(2)]
    checkpoint = {
        "state_dict": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    torch.save(checkpoint, tmp_path / "iter_2.pth")
    losses.append(step(model, optimizer, batch))
    assert losses[2] < losses[0]
    again, resumed = build(cfg)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    resumed.load_state_dict(checkpoint["optimizer"])
    assert step(again, resumed, batch) == losses[2]

    recipe, save_tokenizer = read_recipe(config_file(name), options=options(data, base))
    parts, exported = tmp_path / "parts", tmp_path / "exported"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "iter_3.pth")
    convert_checkpoint(
        tmp_path / "iter_3.pth", recipe, parts, save_tokenizer=save_tokenizer, fp32=True
    )
    export(base, parts, exported, probe=False, progress=False)
    readers = [load_model(base, parts, device="cpu"), load_model(exported, device="cpu")]
    labels = dataset[0]["labels"]
    prompt = dataset[0]["input_ids"][: next(i for i, n in enumerate(labels) if n != IGNORE_INDEX)]
    end = [label for label in labels if label != IGNORE_INDEX][-1]
    images = [data / f"{index}.png" for index in range(3)]
    answers = []
    for reader in readers:
        assert reader.encode("Is it red?", has_image=True) == prompt
        assert end in reader.stop_ids and reader.prompt_template == "tokenizer"
        answers.append(reader.answer_batch(images, ["Is it red?"] * 3, max_new_tokens=4))
    assert answers[0] == answers[1]

    processor = AutoProcessor.from_pretrained(exported)
    rendered = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    found = processor(text=rendered, images=Image.open(images[0]))
    expected = [image_id if token < 0 else token for token in prompt]
    assert found["input_ids"][0].tolist() == expected


def test_one_gpu_in_4_bits_keeps_the_published_global_batch(data: Path, tmp_path: Path) -> None:
    published = {"domain_alignment": 576, "instruction_tuning": 384}
    for stage, samples in published.items():
        cfg = Config.fromfile(config_file("qlora", stage))
        counts = cfg.optim_wrapper.accumulative_counts
        assert cfg.train_dataloader.batch_size * counts == samples
        assert cfg.default_hooks.checkpoint.interval % counts == 0
    base = save_base("llama", tmp_path / "base", vocab_size=340, hidden_size=64)
    goldens.tokenizer().save_pretrained(base)
    cfg = Config.fromfile(config_file("qlora"))
    cfg.merge_from_dict(options(data, base))
    dataset = BUILDER.build(cfg.train_dataloader.dataset)
    model, optimizer = build(cfg)
    kinds = {type(module).__name__ for module in model.llm.modules()}
    assert "Linear4bit" in kinds and type(model.llm.get_output_embeddings()) is nn.Linear
    batch = default_collate_fn([dataset[index] for index in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        losses = [step(model, optimizer, batch) for _ in range(3)]
    assert losses[2] < losses[0]
