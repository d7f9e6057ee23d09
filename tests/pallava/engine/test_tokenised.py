"""The offline folder against the same rows tokenised when training starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor
from xtuner.dataset import LLaVADataset as XTunerDataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

from pallava.dataset import LLaVADataset
from pallava.engine.conversations import process_text
from pallava.engine.tokenised import settings_from_config, settings_from_names, tokenise
from pallava.skipping import SkipLog
from pallava.text.encoding import IMAGE_TOKEN_INDEX, interleaved_map_fn
from pathcore.files import OutputExistsError
from tests.pallava import goldens

CONFIGS = Path(__file__).parents[3] / "configs" / "pallava"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    lines = [
        {"id": "a", "image": "0.png", "conversations": turns("<image>\nWhat?", "A gland.")},
        {"id": "b", "conversations": turns("And text alone?", "Yes.")},
        {"id": "c", "image": "1.png", "conversations": turns("Which?\n<image>", "A nerve.")},
        *({"id": f"t{n}", "conversations": turns("?", "Yes.")} for n in range(9)),
        {"id": "bad", "image": "1.png", "conversations": turns("no mark", "A nerve.")},
    ]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_same_as_at_the_start_of_training(rows: Path, tmp_path: Path) -> None:
    settings = settings_from_names(str(goldens.TINY_LLAMA), "llama3_chat", max_length=64)
    out = tmp_path / "tokens"
    report = tokenise(rows, out, settings)
    assert report["num_rows"] == 12 and report["num_skipped"] == 1
    assert tokenise(rows, out, settings) == report
    common: dict[str, Any] = {
        "image_folder": tmp_path,
        "image_processor": CLIPImageProcessor(crop_size={"height": 32, "width": 32}),
        "skip_log": tmp_path / "skipped.jsonl",
    }
    offline = LLaVADataset(offline_processed_text_folder=out, **common)
    online = LLaVADataset(
        data_path=rows,
        tokenizer=goldens.tokenizer(),
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat),
        max_length=64,
        **common,
    )
    assert len(offline) == len(online) == 12
    assert offline.modality_length == online.modality_length
    assert offline.num_sub_images == online.num_sub_images
    for index in range(12):
        ours, theirs = offline[index], online[index]
        assert ours["input_ids"] == theirs["input_ids"] and ours["labels"] == theirs["labels"]
        assert len(ours["pixel_values"]) == len(theirs["pixel_values"])


def other_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with as many ids as the golden one, two of them exchanged."""
    shutil.copytree(goldens.TINY_LLAMA, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def written(rows: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a data set that reads a folder, as far as the folder does not concern them."""
    settings = settings_from_names(str(goldens.TINY_LLAMA), "llama3_chat", max_length=64)
    tokenise(rows, tmp_path / "tokens", settings)
    return {
        "offline_processed_text_folder": tmp_path / "tokens",
        "image_folder": tmp_path,
        "image_processor": CLIPImageProcessor(crop_size={"height": 32, "width": 32}),
        "skip_log": tmp_path / "skipped.jsonl",
    }


def test_a_data_set_of_other_settings_is_refused(written: dict[str, Any], tmp_path: Path) -> None:
    same = {
        "tokenizer": goldens.tokenizer(),
        "dataset_map_fn": llava_map_fn,
        "template_map_fn": template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat),
        "max_length": 64,
    }
    assert len(LLaVADataset(**written, **same)) == 12
    other = AutoTokenizer.from_pretrained(other_tokenizer(tmp_path / "other"))
    for name, value, found in (
        ("tokenizer", other, "the vocabulary [0-9a-f]{12}, the data set has the vocabulary"),
        ("dataset_map_fn", interleaved_map_fn, "llava_map_fn.*has .*interleaved_map_fn"),
        ("template_map_fn", template_map_fn_factory(PROMPT_TEMPLATE.vicuna), "has vicuna"),
        ("max_length", 32, "64, the data set has 32"),
    ):
        with pytest.raises(ValueError, match=f"tokens: {name} differs.*{found}"):
            LLaVADataset(**written, **{**same, name: value})


def test_a_folder_without_a_record_cannot_be_compared(
    written: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        "pallava.engine.tokenised.print_log", lambda message, **_: shown.append(message)
    )
    (tmp_path / "tokens" / "tokenised.json").unlink()
    assert len(LLaVADataset(**written, max_length=32)) == 12
    assert "so that max_length cannot be compared" in shown[0]


def test_some_rows_of_the_folder(written: dict[str, Any]) -> None:
    data = LLaVADataset(**written, max_dataset_length=5)
    assert len(data) == len(data.num_sub_images) == 5


def test_another_tokenizer_under_the_same_path_is_noticed(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(goldens.TINY_LLAMA, folder)
    tokenise(rows, tmp_path / "tokens", settings_from_names(str(folder), "llama3_chat"))
    shutil.rmtree(folder)
    settings = settings_from_names(str(other_tokenizer(folder)), "llama3_chat")
    with pytest.raises(OutputExistsError, match="the result of other settings"):
        tokenise(rows, tmp_path / "tokens", settings)


def test_a_mapping_by_its_import_path(rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"""
from transformers import AutoTokenizer
tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path={str(goldens.TINY_LLAMA)!r}
)
train_dataloader = dict(dataset=dict(
    type="LLaVADataset", tokenizer=tokenizer,
    dataset_map_fn="xtuner.dataset.map_fns.llava_map_fn",
))
"""
    )
    settings = settings_from_config(config)
    data = process_text(
        rows,
        tokenizer=settings.tokenizer,
        dataset_map_fn=settings.dataset_map_fn,
        template_map_fn=None,
        max_length=64,
        max_dataset_length=None,
        num_proc=1,
        skip_log=SkipLog(tmp_path / "skipped.jsonl"),
    )
    assert data["input_ids"][2][1] == IMAGE_TOKEN_INDEX, "llava_map_fn moves the image to the front"


def test_xtuners_own_class_reads_it(rows: Path, tmp_path: Path) -> None:
    settings = settings_from_names(str(goldens.TINY_LLAMA), "llama3_chat")
    report = tokenise(rows, tmp_path / "tokens", settings)
    size = {"height": 32, "width": 32}
    data = XTunerDataset(
        image_folder=str(tmp_path),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        offline_processed_text_folder=str(tmp_path / "tokens"),
    )
    assert len(data) == report["num_rows"]
    assert data[0]["pixel_values"].shape == (3, 32, 32)
    assert sum(abs(length) for length in data.modality_length) == report["num_tokens"]


def test_settings_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "llama").symlink_to(goldens.TINY_LLAMA)
    monkeypatch.chdir(tmp_path)
    settings = settings_from_config(CONFIGS / "pallava_domain_alignment_tiny.py")
    assert settings.max_length == settings.description["config"]["max_length"] > 0
    assert settings.tokenizer.encode("a") == goldens.tokenizer().encode("a")
    assert settings.dataset_map_fn is llava_map_fn and settings.template_map_fn is not None
    described = json.dumps(settings.description)
    assert "llava_map_fn" in described and "0x" not in described, "the same in every process"
    for text in ("train_dataloader = dict(dataset=dict(type='Several'))", "model = dict()"):
        (tmp_path / "none.py").write_text(text)
        with pytest.raises(ValueError, match="with a tokenizer; of several"):
            settings_from_config(tmp_path / "none.py")


def test_other_data_or_settings_are_refused(rows: Path, tmp_path: Path) -> None:
    settings = settings_from_names(str(goldens.TINY_LLAMA), "llama3_chat")
    tokenise(rows, tmp_path / "tokens", settings)
    other = settings_from_names(str(goldens.TINY_LLAMA), "vicuna")
    with pytest.raises(OutputExistsError, match="the result of other settings"):
        tokenise(rows, tmp_path / "tokens", other)
    with pytest.raises(ValueError, match="llama3_chat"):
        settings_from_names(str(goldens.TINY_LLAMA), "llama4")
    rows.write_text("no json\n")
    with pytest.raises(ValueError, match="1 of 1 rows"):
        tokenise(rows, tmp_path / "broken", settings)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("name", ["", "absent/folder/of/a/tokenizer"])
def test_a_folder_without_a_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    with pytest.raises(ValueError, match=rf"tokenizer {folder}: cannot be loaded"):
        settings_from_names(str(folder), "llama3_chat")
