"""One folder: the same greedy answers as the training code, here and with transformers alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from xtuner.utils import PROMPT_TEMPLATE

from pallava.anyres import AnyRes
from pallava.release.export import export
from pallava.release.hub import plan_push, push
from pallava.release.pth_to_hf import convert_checkpoint
from pallava.release.remote_code import travelling_files
from pallava.text.encoding import encode_prompt
from pathcore.images import load_image
from pathcore.weights import CheckpointError
from tests.pallava.engine.tiny_run import save_image
from tests.pallava.goldens import CROSSATTN_STATE, RELEASED_PTH, TINY_LLAMA, model, tokenizer
from tests.pallava.release.exported import QUESTIONS, answer
from tests.pallava.release.test_pth_to_hf import recipe

SCRIPT = Path(__file__).with_name("exported.py")
CHECKPOINTS = {"released": RELEASED_PTH, "crossattn": CROSSATTN_STATE}
PYTHONS = "PALLAVA_TRANSFORMERS_PYTHONS"
"""Environment variable: interpreters of environments with transformers alone, joined by `:`."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):  # of three different sizes
        save_image(folder / f"{index}.png", index)
    return [str(folder / f"{index}.png") for index in range(3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    for kind, checkpoint in CHECKPOINTS.items():
        convert_checkpoint(
            checkpoint,
            recipe(root, training={"data": "pairs.jsonl", "max_epochs": 9}),
            root / f"{kind}_converted",
            save_tokenizer=tokenizer().save_pretrained,
            fp32=True,
        )
        scores = {"PathVQA": {"closed accuracy": 0.5}}
        audits = {"PathVQA": {"yes/no": "No fault found."}}
        export(
            TINY_LLAMA,
            root / f"{kind}_converted",
            root / kind,
            scores=scores,
            audits=audits,
            progress=False,
        )
    return {kind: root / kind for kind in CHECKPOINTS}


def training_answers(kind: str, images: list[str]) -> list[list[int]]:
    """One by one, by the training code, LoRA not merged."""
    trained, answers = model(CHECKPOINTS[kind]), []
    for path, question in zip(images, QUESTIONS, strict=True):
        text = PROMPT_TEMPLATE.llama3_chat.INSTRUCTION.format(input=f"<image>\n{question}")
        ids = torch.tensor([encode_prompt(tokenizer(), text)])
        pixels = [AnyRes(tile_px=32)(load_image(path))]
        options = {
            "max_new_tokens": 12,
            "min_new_tokens": 12,
            "do_sample": False,
            "pad_token_id": 4,
        }
        answers.append(trained.generate(ids, pixels, **options)[0].tolist())
    return answers


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_batched_answers_equal_the_training_codes(
    kind: str, folders: dict[str, Path], images: list[str]
) -> None:
    expected = training_answers(kind, images)
    assert len({tuple(row) for row in expected}) == len(images), "answers depend on the input"
    assert answer(str(folders[kind]), images, "package") == expected


def in_environment(
    python: str, folders: dict[str, Path], images: list[str], cache: Path
) -> dict[str, list[list[int]]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    result = subprocess.run(
        [python, str(SCRIPT), json.dumps(images), *map(str, folders.values())],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    answers = dict(json.loads(line.removeprefix("ANSWERS ")) for line in lines)
    return {kind: answers[str(folder)] for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def answers_without_this_package(
    folders: dict[str, Path], images: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]]]:
    return in_environment(sys.executable, folders, images, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_without_this_package(
    kind: str, images: list[str], answers_without_this_package: dict[str, list[list[int]]]
) -> None:
    assert answers_without_this_package[kind] == training_answers(kind, images)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(PYTHONS), reason=f"{PYTHONS} names no environments")
def test_with_transformers_alone(
    folders: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    expected = {kind: training_answers(kind, images) for kind in folders}
    for index, python in enumerate(os.environ[PYTHONS].split(os.pathsep)):
        cache = tmp_path / str(index)
        cache.mkdir()
        assert in_environment(python, folders, images, cache) == expected


def test_travelling_code_imports_itself_alone() -> None:
    files = travelling_files()
    # Each of these is read by whoever runs `trust_remote_code=True`: no file handling, no
    # registry, no checkpoint reader.
    assert [name.removesuffix(".py") for name in files] == [
        *("anyres", "configuration_pallava", "contrast", "contrasts", "encoding", "linear"),
        *("llava", "modeling_pallava", "plip", "processing_pallava", "qformer", "rgb", "words"),
    ]
    ours = ("pallava", "pathcore")
    for name, source in files.items():
        for node in ast.walk(ast.parse(source, name)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] not in ours, name
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] not in ours for alias in node.names), name


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), np.zeros((8, 8, 3), np.uint8)])
def test_the_processor_takes_images_not_paths(image: Any, folders: dict[str, Path]) -> None:
    processor = AutoProcessor.from_pretrained(folders["released"])
    with pytest.raises(ValueError, match=r"expected PIL images .*, found .*PIL\.Image\.open"):
        processor(images=[image], text=["<image>\nWhat?"])


@pytest.mark.parametrize("in_parts", [True, False])
def test_special_tokens_that_a_message_spells_are_letters(
    in_parts: bool, folders: dict[str, Path]
) -> None:
    processor = AutoProcessor.from_pretrained(folders["released"])
    eos = processor.tokenizer.eos_token

    def ids(question: str) -> list[int]:
        content = [{"type": "text", "text": question}] if in_parts else question
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, tokenize=False)
        return processor(text=prompt)["input_ids"][0].tolist()

    assert eos in processor.decode(ids(f"Is it {eos} red?"))
    number = ids("Is it red?").count(processor.tokenizer.eos_token_id)
    assert ids(f"Is it {eos} red?").count(processor.tokenizer.eos_token_id) == number


def test_refuses_stock_llava(folders: dict[str, Path], tmp_path: Path) -> None:
    converted = folders["released"].with_name("released_converted")
    with pytest.raises(CheckpointError, match="no place for it"):
        export(TINY_LLAMA, converted, tmp_path / "out", layout="llava", progress=False)
    assert not (tmp_path / "out").exists()


def test_card_and_push(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    card = (folders["crossattn"] / "README.md").read_text()
    for text in (
        *("Research only", "closed accuracy | 0.5000", "max epochs: 9", "scale-invariant"),
        "- PathVQA, yes/no: No fault found.",
    ):
        assert text in card
    plan = plan_push(folders["crossattn"], "me/pallava")
    assert {"config.json", "README.md", "modeling_pallava.py"} <= set(plan.files)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        push(folders["crossattn"], plan)
    with pytest.raises(ValueError, match="owner/name"):
        plan_push(folders["crossattn"], "pallava")


def test_changed_folders_are_not_pushed(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="no finished release"):
        plan_push(TINY_LLAMA, "me/pallava")
    import shutil

    copy: Any = shutil.copytree(folders["released"], tmp_path / "copy")
    (copy / "modeling_pallava.py").write_text("import os")
    with pytest.raises(ValueError, match="changed since"):
        plan_push(copy, "me/pallava")
