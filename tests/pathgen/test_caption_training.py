"""`xtuner-add train` on the tiny twins: phase 1, then phase 2 from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pathcore.exit_codes import EXIT_SKIPPED
from tests.pallava.engine.tiny_run import GOLDEN, losses, run, save_image
from xtuner_add.paths import own_configs

pytestmark = pytest.mark.slow


def make_folder(root: Path, num_images: int = 20) -> Path:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    data = root / "data" / "tiny"
    (data / "images").mkdir(parents=True)
    shutil.copytree(GOLDEN / "model/tiny_llama", data / "llama")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(data / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(data / "clip")
    for name, question in (("captions", ""), ("conversations", "Describe the image.")):
        rows = []
        for index in range(num_images):
            colour = save_image(data / "images" / f"{index}.png", index)
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": f"It is {colour}."},
            ]
            rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_both_phases(tmp_path: Path) -> None:
    folder, configs = make_folder(tmp_path, num_images=21), own_configs()
    (folder / "data/tiny/images/20.png").write_bytes(b"no image")
    first = run(folder, "train", configs["pathgen_llava_pretrain_tiny"], "--seed", 0)
    assert first.returncode == EXIT_SKIPPED, first.stdout[-3000:]
    assert "1 sample(s) were skipped" in first.stdout and "20.png" in first.stdout
    found = losses(first.stdout)
    assert found[-1] < found[0]
    phase1 = torch.load(
        folder / "work_dirs/pathgen_llava_pretrain_tiny/iter_10.pth", weights_only=False
    )
    assert phase1["state_dict"] and all(n.startswith("projector.") for n in phase1["state_dict"])
    second = run(folder, "train", configs["pathgen_llava_finetune_tiny"], "--seed", 0)
    assert second.returncode == EXIT_SKIPPED, second.stdout[-3000:]
    assert "Load pretrained weight from" in second.stdout
    found = losses(second.stdout)
    assert found[-1] < found[0]
    phase2 = torch.load(
        folder / "work_dirs/pathgen_llava_finetune_tiny/iter_10.pth", weights_only=False
    )
    parts = {name.split(".")[0] for name in phase2["state_dict"]}
    assert parts == {"llm", "projector"}


def test_samples_are_those_of_the_host(tmp_path: Path) -> None:
    """Pixels, tokens and lengths equal XTuner's own data set, text-only rows included."""
    from transformers import AutoTokenizer, CLIPImageProcessor
    from xtuner.dataset import LLaVADataset
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    from pallava.engine.single_images import SingleImageDataset

    data = make_folder(tmp_path, num_images=4) / "data/tiny"
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "Nothing."}]
    with (data / "conversations.jsonl").open("a") as file:
        file.write(json.dumps({"id": "text", "conversations": turns}) + "\n")
    options = {
        "data_path": str(data / "conversations.jsonl"),
        "image_folder": str(data / "images"),
        "tokenizer": AutoTokenizer.from_pretrained(data / "llama"),
        "image_processor": CLIPImageProcessor.from_pretrained(data / "clip"),
        "dataset_map_fn": llava_map_fn,
        "template_map_fn": template_map_fn_factory(template=PROMPT_TEMPLATE.vicuna),
        "max_length": 60,
        "pad_image_to_square": True,
    }
    ours, theirs = SingleImageDataset(**options), LLaVADataset(**options)
    assert len(ours) == len(theirs) == 5
    assert ours.modality_length == theirs.modality_length
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["input_ids"] == other["input_ids"]
        assert mine["labels"] == other["labels"]
        assert torch.equal(mine["pixel_values"], other["pixel_values"])
    rows = [{"id": "two", "image": ["0.png", "1.png"], "conversations": [
        {"from": "human", "value": "<image><image>\nWhich is red?"}, turns[1]]}]  # fmt: skip
    with (data / "conversations.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    options |= {"dataset_map_fn": None, "skip_log": tmp_path / "skipped.jsonl"}
    assert len(SingleImageDataset(**options)) == 5
    assert "2 images" in (tmp_path / "skipped.jsonl").read_text()
