"""Configs written for the original run as they are, on the released kind of weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pathcore.weights import read_state_dict
from tests.pallava.engine.tiny_run import GOLDEN, losses, make_folder, run

CONFIG = Path(__file__).with_name("published_style.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("published"), num_images=24)
    shutil.copy(GOLDEN / "model/released/tiny_release.pth", root / "released.pth")
    save_processed_text(root / "data/tiny")
    return root


def save_processed_text(data: Path) -> None:
    from transformers import AutoTokenizer
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    from pallava.dataset import process_text
    from pallava.skipping import SkipLog

    rows = process_text(
        data / "conversations.jsonl",
        tokenizer=AutoTokenizer.from_pretrained(data / "llama"),
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat),
        max_length=1852,
        max_dataset_length=None,
        num_proc=None,
        skip_log=SkipLog(data / "skipped.jsonl"),
    )
    rows.select_columns(["id", "image", "input_ids", "labels"]).save_to_disk(str(data / "text"))


@pytest.mark.slow
def test_trains_released_weights_on_this_machine(folder: Path) -> None:
    result = run(folder, "train", CONFIG, "--seed", 1)
    assert result.returncode == 3, result.stdout[-3000:]  # one image is missing
    values = losses(result.stdout)
    assert values[-1] < 0.9 * values[0]
    assert result.stdout.count("Sample output:") >= 4
    work_dir = folder / "work_dirs" / CONFIG.stem
    (last,) = work_dir.glob("iter_10.pth")
    before, after = read_state_dict(folder / "released.pth"), read_state_dict(last)
    assert before.keys() == after.keys(), "released weights stay in released mode"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before) - 1, "all but the position ids were trained"
    groups = torch.load(last, weights_only=False)["optimizer"]["param_groups"]
    assert sorted(group["initial_lr"] for group in groups) == [1e-3, 2e-3]
