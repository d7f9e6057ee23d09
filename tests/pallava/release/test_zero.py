"""Reads folders that DeepSpeed wrote, and compares with DeepSpeed's own reader."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from pallava.release.zero import load_checkpoint
from pathcore.weights import CheckpointError
from tests.pallava.goldens import RELEASED_PTH, RELEASED_ZERO2
from tests.pallava.release.deepspeed_writer import TAG
from tests.warm_python import run_module

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `zero{1,2,3}_ranksN`, written by DeepSpeed in N processes on the CPU."""
    root = tmp_path_factory.mktemp("deepspeed")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_module(
        "tests.pallava.release.deepspeed_writer", [str(root)],
        cwd=REPOSITORY, environ=environ, ranks=request.param,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return root


def folder_of(written: Path, stage: int) -> Path:
    (folder,) = written.glob(f"zero{stage}_ranks*")
    return folder


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_deepspeeds_reader(stage: int, written: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = folder_of(written, stage)
    theirs = get_fp32_state_dict_from_zero_checkpoint(
        str(folder), TAG, exclude_frozen_parameters=True
    )
    masters = torch.load(folder / "expected.pt", weights_only=True)
    ours = load_checkpoint(folder / TAG)
    assert ours.keys() == theirs.keys() == {*masters, "projector.position_ids"}
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        # Bit for bit: the fp32 masters, not the bf16 copy that the model computes with.
        assert torch.equal(ours[name].to(tensor.dtype), tensor)
    for name, master in masters.items():
        assert torch.equal(ours[name].flatten(), master) and ours[name].dtype == torch.float32
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())
    # `latest` leads from the run's folder to the checkpoint.
    assert load_checkpoint(folder).keys() == ours.keys()


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_copy_where_the_optimizer_was_deleted(
    stage: int, written: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(written, stage) / TAG, tmp_path / TAG)
    masters = load_checkpoint(folder)
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    if stage == 3:
        with pytest.raises(CheckpointError, match="without"):
            load_checkpoint(folder)
        return
    copies = load_checkpoint(folder)
    for name, master in masters.items():
        assert torch.equal(copies[name], master.to(copies[name].dtype))


def copy_of_two_ranks(written: Path, stage: int, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Returns a checkpoint that may be damaged, and the optimizer files of its ranks."""
    folder = shutil.copytree(folder_of(written, stage) / TAG, tmp_path / TAG)
    files = sorted(folder.glob("*optim_states.pt"))
    if len(files) == 1:
        pytest.skip("one rank has no other")
    return folder, files


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_rank_is_refused(stage: int, written: Path, tmp_path: Path) -> None:
    folder, files = copy_of_two_ranks(written, stage, tmp_path)
    files[-1].unlink()
    with pytest.raises(CheckpointError, match="written by 2 processes, but 1"):
        load_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_files_of_two_steps_are_refused(stage: int, written: Path, tmp_path: Path) -> None:
    folder, files = copy_of_two_ranks(written, stage, tmp_path)
    content = torch.load(files[-1], weights_only=False)
    state = content["optimizer_state_dict"]
    base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    for parameter in base["state"].values():
        parameter["step"] += 1
    torch.save(content, files[-1])
    with pytest.raises(CheckpointError, match=r"different steps .*rank_0.*\[1\].*rank_1.*\[2\]"):
        load_checkpoint(folder)


def test_a_tag_without_its_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("iter_8.pth")
    with pytest.raises(FileNotFoundError, match=r"latest: names 'iter_8\.pth'"):
        load_checkpoint(tmp_path)


def test_code_in_an_optimizer_file_is_refused(tmp_path: Path) -> None:
    torch.save({"param_shapes": [], "module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    file = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": 2, "evil": Path("/etc")}}, file)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path)


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    torch.save({"param_shapes": [], "module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": "two"}}, file)
    with pytest.raises(CheckpointError, match="zero_stage is 'two'; expected 1, 2 or 3"):
        load_checkpoint(tmp_path)


def test_released_forms_agree() -> None:
    pth, zero = load_checkpoint(RELEASED_PTH), load_checkpoint(RELEASED_ZERO2)
    assert pth.keys() == zero.keys()
    for name, tensor in pth.items():
        torch.testing.assert_close(zero[name].to(tensor.dtype), tensor, rtol=1e-2, atol=1e-3)
