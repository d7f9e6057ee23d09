"""`xtuner-add train` on the tiny twins: phase 1, then phase 2 from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

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
    folder, configs = make_folder(tmp_path), own_configs()
    first = run(folder, "train", configs["pathgen_llava_pretrain_tiny"], "--seed", 0)
    assert first.returncode == 0, first.stdout[-3000:]
    found = losses(first.stdout)
    assert found[-1] < found[0]
    phase1 = torch.load(
        folder / "work_dirs/pathgen_llava_pretrain_tiny/iter_10.pth", weights_only=False
    )
    assert phase1["state_dict"] and all(n.startswith("projector.") for n in phase1["state_dict"])
    second = run(folder, "train", configs["pathgen_llava_finetune_tiny"], "--seed", 0)
    assert second.returncode == 0, second.stdout[-3000:]
    assert "Load pretrained weight from" in second.stdout
    found = losses(second.stdout)
    assert found[-1] < found[0]
    phase2 = torch.load(
        folder / "work_dirs/pathgen_llava_finetune_tiny/iter_10.pth", weights_only=False
    )
    parts = {name.split(".")[0] for name in phase2["state_dict"]}
    assert parts == {"llm", "projector"}
