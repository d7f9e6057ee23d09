"""Gathered parameters held to DeepSpeed's own reader of the same folders."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pallava.modeling.checkpoint import CheckpointError
from pallava.release.zero import load_checkpoint
from tests.pallava.goldens import RELEASED_PTH, RELEASED_ZERO2


def write_folder(folder: Path, stage: int, ranks: int) -> dict[str, Tensor]:
    """A folder as DeepSpeed writes it, for two parameter groups with sizes no rank divides."""
    generator = torch.Generator().manual_seed(0)
    names = [["projector.a", "projector.b"], ["llm.c"]]
    sizes = {"projector.a": (3, 5), "projector.b": (7,), "llm.c": (4, 9)}
    truth = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    folder.mkdir(parents=True)
    parts: list[list[Tensor]] = [[] for _ in range(ranks)]
    for group in names:
        if stage == 3:
            pieces: list[list[Tensor]] = [[] for _ in range(ranks)]
            for name in group:
                part = math.ceil(truth[name].numel() / ranks)
                flat = torch.zeros(part * ranks)
                flat[: truth[name].numel()] = truth[name].flatten()
                for rank in range(ranks):
                    pieces[rank].append(flat[rank * part : (rank + 1) * part])
            for rank in range(ranks):
                parts[rank].append(torch.cat(pieces[rank]))
        else:
            flat = torch.cat([truth[name].flatten() for name in group])
            align = 2 * ranks
            flat = torch.cat([flat, torch.zeros(-len(flat) % align)])
            for rank, piece in enumerate(flat.chunk(ranks)):
                parts[rank].append(piece.clone())
    buffer = torch.arange(6)
    model = {
        "module": {"projector.position_ids": buffer},
        "buffer_names": ["projector.position_ids"],
        "param_shapes": [OrderedDict((n, truth[n].shape) for n in group) for group in names],
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    count: int | list[int] = ranks if stage == 3 else [ranks, ranks]
    for rank in range(ranks):
        if stage == 3:
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"zero_stage": stage, "partition_count": count, key: parts[rank]}
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    if stage != 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")
    return truth | {"projector.position_ids": buffer}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_deepspeeds_reader(stage: int, ranks: int, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    truth = write_folder(tmp_path / "run" / "iter_4.pth", stage, ranks)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "run"), "iter_4.pth")
    ours = load_checkpoint(tmp_path / "run" / "iter_4.pth")
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(ours[name], tensor) and torch.equal(
            theirs[name].to(tensor.dtype), tensor
        )


def test_a_missing_rank_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "iter", 3, 3)
    (tmp_path / "iter" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="written by 3 processes, but 2"):
        load_checkpoint(tmp_path / "iter")


def test_zero3_without_optimizer_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "iter", 3, 2)
    for file in (tmp_path / "iter").glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="without"):
        load_checkpoint(tmp_path / "iter")


def test_code_in_an_optimizer_file_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "iter", 2, 1)
    file = next((tmp_path / "iter").glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": {"zero_stage": 2, "evil": Path("/etc")}}, file)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "iter")


def test_released_forms_agree() -> None:
    pth, zero = load_checkpoint(RELEASED_PTH), load_checkpoint(RELEASED_ZERO2)
    assert pth.keys() == zero.keys()
    for name, tensor in pth.items():
        torch.testing.assert_close(zero[name].to(tensor.dtype), tensor, rtol=1e-2, atol=1e-3)
