from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader

from cite.mm.hooks import (
    CheckpointFitsHook,
    ClassesAgreeHook,
    MissingPatchesHook,
    PortableCheckpointHook,
    ResumeDataHook,
    ZeroShotHook,
)
from cite.mm.samplers import ShuffledPatchSampler
from cite.text_embeddings import TextEmbeddings
from cite.text_scores import TextScores
from pathcore.weights import CheckpointError


def runner(work_dir: Path, **attributes: Any) -> Any:
    attributes = {"_resume": True, "_load_from": None, "logger": logging.getLogger()} | attributes
    return SimpleNamespace(work_dir=str(work_dir), **attributes)


def test_checkpoint_loads_without_classes(tmp_path: Path) -> None:
    checkpoint = {
        "state_dict": {"weight": torch.ones(2)},
        "message_hub": {
            "log_scalars": {"train/loss": HistoryBuffer([1.0], [1])},
            "runtime_info": {
                "iter": 7,
                "best_score": np.float64(0.5),
                "best_ckpt": "best.pth",
                "loop": object(),
            },
            "resumed_keys": {"iter": True},
        },
    }
    PortableCheckpointHook().before_save_checkpoint(runner(tmp_path), checkpoint)
    torch.save(checkpoint, tmp_path / "iter_7.pth")
    loaded = torch.load(tmp_path / "iter_7.pth", weights_only=True)
    assert loaded["message_hub"] == {
        "log_scalars": {},
        "runtime_info": {"iter": 7, "best_score": 0.5, "best_ckpt": "best.pth"},
        "resumed_keys": {},
    }


def test_last_checkpoint_moves_with_its_folder(tmp_path: Path) -> None:
    hook = PortableCheckpointHook()
    (tmp_path / "last_checkpoint").write_text("/elsewhere/run/iter_7.pth")
    hook.after_train_iter(runner(tmp_path), 0)
    assert (tmp_path / "last_checkpoint").read_text() == "iter_7.pth"
    run = runner(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"names iter_7\.pth, which is not beside it"):
        hook.before_run(run)
    (tmp_path / "iter_7.pth").touch()
    hook.before_run(run)
    assert run._load_from == str(tmp_path / "iter_7.pth")
    named = runner(tmp_path, _load_from="mine.pth")
    hook.before_run(named)
    assert named._load_from == "mine.pth"


class Counted:
    """A dataset that knows what was read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.read.append(int(index))
        return int(index)


def test_resumed_run_reads_nothing_again(tmp_path: Path) -> None:
    def batches(iteration: int, count: int) -> tuple[list[list[int]], Counted]:
        data = Counted()
        loader = DataLoader(data, batch_size=3, sampler=ShuffledPatchSampler(data, seed=1))
        loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
        loop.dataloader, loop.dataloader_iterator = loader, iter(loader)
        loop._iter = iteration
        ResumeDataHook().before_train(runner(tmp_path, train_loop=loop))
        for _ in range(iteration):  # as the loop does
            next(loop.dataloader_iterator)
        return [next(loop.dataloader_iterator).tolist() for _ in range(count)], data

    whole, _ = batches(0, 9)
    rest, data = batches(5, 4)
    assert rest == whole[5:]
    assert len(data.read) == 12


def test_missing_patches_end_the_run_with_a_code(tmp_path: Path) -> None:
    def loop(missing: list[str]) -> Any:
        return SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(missing=missing)))

    whole = runner(tmp_path, _train_loop=loop([]), _val_loop=None, _test_loop={"not": "built"})
    MissingPatchesHook().after_run(whole)
    lines = ["ann.txt:3: A_0.jpg", "ann.txt:9: B_0.jpg"]
    partial = runner(tmp_path, _train_loop=loop(lines), _val_loop=loop(lines[:1]), _test_loop=None)
    with pytest.raises(SystemExit) as exit_code:
        MissingPatchesHook().after_run(partial)
    assert exit_code.value.code == 3
    assert (tmp_path / "missing_patches.txt").read_text().splitlines() == lines


def test_testing_without_a_checkpoint(tmp_path: Path) -> None:
    for given, expected in (("none", None), ("iter_1.pth", "iter_1.pth")):
        run = runner(tmp_path, _load_from=given, model=torch.nn.Identity())
        ZeroShotHook().before_run(run)
        assert run._load_from == expected


def loaded(model: torch.nn.Module, state_dict: dict[str, Any]) -> None:
    run = SimpleNamespace(model=model, _load_from="other.pth")
    CheckpointFitsHook().after_load_checkpoint(run, {"state_dict": state_dict})


def test_checkpoint_of_another_model_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded(model, own)
    loaded(model, {f"module.{name}": tensor for name, tensor in own.items()})
    for other, message in (
        ({"blocks.0.weight": torch.zeros(2)}, r"(?s)other\.pth .*Missing key.*0\.weight"),
        ({**own, "head.bias": torch.zeros(1)}, r"(?s)Unexpected key.*head\.bias"),
        ({n: t for n, t in own.items() if n != "1.running_mean"}, r"(?s)Missing.*running_mean"),
        ({**own, "0.weight": torch.zeros(2, 4)}, r"(?s)size mismatch for 0\.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            loaded(model, other)


def test_no_checkpoint_is_for_models_without_training() -> None:
    model = torch.nn.Linear(3, 2)
    run = SimpleNamespace(model=model, _load_from="none")
    with pytest.raises(ValueError, match=r"2 tensors of this config are trained.*weight, bias"):
        ZeroShotHook().before_run(run)
    model.requires_grad_(False)
    ZeroShotHook().before_run(run)
    assert run._load_from is None


class Listed:
    """Patches of slides with class names, as a data set gives them to a hook."""

    ann_file = "val.txt"

    def __init__(self, classes: str, slides: str = "") -> None:
        self.metainfo, self.slides = {"classes": list(classes)}, slides

    def __len__(self) -> int:
        return len(self.slides)

    def get_data_info(self, index: int) -> dict[str, Any]:
        return {"slide": self.slides[index]}


def run_over(head: Any, train: Listed, val: Listed) -> Any:
    def loop(data: Listed) -> Any:
        return SimpleNamespace(dataloader=SimpleNamespace(dataset=data))

    model = torch.nn.Module()
    model.head = head
    return SimpleNamespace(
        model=model, train_loop=loop(train), val_loop=loop(val), _val_loop=True,
        test_loop=loop(val), logger=logging.getLogger("cite"),
    )  # fmt: skip


def test_classes_of_head_and_data_agree(caplog: pytest.LogCaptureFixture) -> None:
    texts = TextEmbeddings(torch.eye(3), torch.arange(3), tuple("abc"), tuple("abc"))
    hook, head = ClassesAgreeHook(), TextScores(texts)
    with caplog.at_level(logging.WARNING):
        hook.before_train(run_over(head, Listed("abc", "pqq"), Listed("abc", "rs")))
        assert not caplog.records
        hook.before_train(run_over(head, Listed("abc", "pqq"), Listed("abc", "rq")))
    assert "1 slide(s) both train and validate, for instance q" in caplog.text
    hook.before_test(run_over(head, Listed("abc"), Listed("xyz")))  # descriptions, not names
    with pytest.raises(ValueError, match=r"val\.txt: 2 classes \(a, b\), but the head has 3"):
        hook.before_test(run_over(head, Listed("abc"), Listed("ab")))
    with pytest.raises(ValueError, match="order b, a, c, but the head has a, b, c"):
        hook.before_val(run_over(head, Listed("abc"), Listed("bac")))
    linear = torch.nn.Linear(2, 2)
    linear.num_classes = 2
    with pytest.raises(ValueError, match=r"3 classes .* but the head has 2"):
        hook.before_train(run_over(linear, Listed("abc"), Listed("abc")))
