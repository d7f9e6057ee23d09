"""Wrong inputs of a training are reported in one line before torch and XTuner start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pathcore.names import WrongArgumentError
from tests.pallava.engine.tiny_run import STAGE1, make_folder
from tests.pallava.goldens import RELEASED_PTH
from xtuner_add.training_check import TrainingInputError, check_training

DATA = "train_dataloader.dataset"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("check"), num_images=12)
    turns = [{"from": "human", "value": "<image>\nRed?"}, {"from": "gpt", "value": "yes"}]
    wrong_roles = [{"from": "user", "value": "Red?"}, {"from": "assistant", "value": "yes"}]
    rows = {
        "roles": [{"id": i, "conversations": wrong_roles} for i in range(12)],
        "schema": [{"id": i, "caption": "A gland."} for i in range(12)],
        "absent": [{"id": i, "image": f"no{i}.png", "conversations": turns} for i in range(12)],
        "empty": [],
    }
    for name, values in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (root / "text.jsonl").write_text("These are\nno rows\n" * 10)
    state = torch.load(RELEASED_PTH, weights_only=True)
    torch.save(state, root / "rank4.pth")
    broken = state.get("state_dict", state)
    next(iter(broken.values())).fill_(float("nan"))
    torch.save(broken, root / "nan.pth")
    whole = (root / "rank4.pth").read_bytes()
    (root / "half.pth").write_bytes(whole[: len(whole) // 2])
    (root / "zero2.pth").mkdir()
    (root / "zero2.pth" / "mp_rank_00_model_states.pt").touch()
    (root / "broken_config.py").write_text("from mmengine.config import read_base\nmodel = dict(\n")
    return root


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_sound_training_passes_without_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from xtuner_add.training_check import check_training\n"
        "check_training(Path(sys.argv[1]), ['--seed', '1', '--deepspeed', 'deepspeed_zero2'])\n"
        "assert not {'torch', 'deepspeed', 'xtuner', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(STAGE1)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_dataloder.batch_size=2", "did you mean train_dataloader"),
        ("model.pretraind_pth=x.pth", "pretraind_pth.*did you mean pretrained_pth"),
        (f"{DATA}.max_lenght=9", "did you mean max_length"),
        ("model.pretrained_pth=nope.pth", "pretrained_pth: nope.pth: no such checkpoint"),
        ("model.pretrained_pth=data/tiny/images/0.png", "pretrained_pth: .*0.png"),
        ("model.pretrained_pth=rank4.pth", "LoRA rank 4, but model.llm_lora.r is 8; set r=4"),
        ("model.pretrained_pth=nan.pth", "nan.pth"),
        (f"{DATA}.data_path=nope.jsonl", "data_path nope.jsonl: no such file"),
        (f"{DATA}.data_path=data/tiny/plip/config.json", "expected an array of rows"),
        (f"{DATA}.data_path=roles.jsonl", "expected roles 'human' and 'gpt'"),
        (f"{DATA}.data_path=schema.jsonl", "expected a list of .from, value."),
        (f"{DATA}.data_path=text.jsonl", "row 1: not an object"),
        (f"{DATA}.data_path=empty.jsonl", "no rows"),
        (f"{DATA}.data_path=absent.jsonl", "image_folder data/tiny/images: 12 of 12"),
        (f"{DATA}.image_folder=nope", "image_folder nope: no such folder"),
        (f"{DATA}.image_folder=roles.jsonl", "expected a folder, found a file"),
        (f"{DATA}.offline_processed_text_folder=data/tiny", "tokenise"),
        ("model.visual_select_layer=-5", r"expected -4 to 3, since .* has 3 layers, found -5"),
        ("load_from=nope.pth", "load_from nope.pth: no such checkpoint"),
        ("load_from=zero2.pth", "training with DeepSpeed; add --deepspeed"),
        ("model.visual_encoder=nope", "PLIP folder nope: no such folder"),
        ("model.visual_encoder=data/tiny/llama", "expected a CLIP vision encoder, found llama"),
        ("model.visual_encoder=data/tiny/images", "no config.json in this folder"),
        ("model.llm.pretrained_model_name_or_path=./nope", "./nope: no such folder"),
        ("model.llm.pretrained_model_name_or_path=data/tiny/nope", "nope: no such folder"),
        ("model.llm.pretrained_model_name_or_path=data/tiny/plip", "causal language model"),
        ("tokenizer.pretrained_model_name_or_path=data/tiny/images", "no tokenizer files"),
        (
            "train_dataloader.batch_size=0",
            "batch_size: expected a whole number of at least 1, found 0",
        ),
        ("train_dataloader.batch_size=four", "batch_size: .*found 'four'"),
        ("train_cfg.max_epochs=0", "max_epochs: .*found 0"),
        ("optim_wrapper.optimizer.lr=-1", "lr: expected at least 0, found -1"),
        ("param_scheduler.0.end=0.3", r"is 1 iteration.*set param_scheduler.0.end=0.5 "),
        ("train_dataloader.batch_size=12", "Below 2 iterations the learning rate stays"),
        ("no_value", "expected KEY=VALUE"),
    ],
)
def test_wrong_options(option: str, message: str) -> None:
    with pytest.raises(TrainingInputError, match=message) as found:
        check_training(STAGE1, ["--cfg-options", option])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deepspeed", "zero9"], "neither a file nor one of XTuner's; known: .*deepspeed_zero2"),
        (["--resume", "iter_9.pth"], "--resume iter_9.pth: no such checkpoint"),
        (["--resume", "half.pth"], "half.pth: no checkpoint, or one that was not written to its"),
        (["--resume", "data/tiny"], "expected a checkpoint, such as iter_500.pth, found another"),
        (["--resume", "zero2.pth"], "a training with DeepSpeed; add --deepspeed deepspeed_zero2"),
        (
            ["--resume", "rank4.pth", "--deepspeed", "deepspeed_zero2"],
            "a training without DeepSpeed; leave --deepspeed out",
        ),
        (["--work-dir", "roles.jsonl"], "expected a folder, found a file"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(TrainingInputError, match=message):
        check_training(STAGE1, arguments)


def test_deepspeed_resumes_with_as_many_processes_only(folder: Path) -> None:
    for rank in range(2):
        (folder / "zero2.pth" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    arguments = ["--resume", "zero2.pth", "--deepspeed", "deepspeed_zero2"]
    check_training(
        STAGE1, [*arguments, "--cfg-options", "param_scheduler.0.end=1"], {"NPROC_PER_NODE": "2"}
    )
    with pytest.raises(TrainingInputError, match=r"written by 2 process.*this training has 1"):
        check_training(STAGE1, arguments, {})
    with pytest.raises(TrainingInputError, match=r"written by 2 process.*this training has 4"):
        check_training(STAGE1, arguments, {"RANK": "0", "WORLD_SIZE": "4"})


def test_an_unreadable_config_names_the_line() -> None:
    with pytest.raises(WrongArgumentError, match=r"broken_config\.py, line 2: cannot be read"):
        check_training(Path("broken_config.py"), [])


@pytest.mark.parametrize("module", ["my_parts", "pallava.engin"])
def test_a_config_that_imports_what_is_not_there_is_named(tmp_path: Path, module: str) -> None:
    config = tmp_path / "mine.py"
    config.write_text(f"__import__({module!r})\n")
    with pytest.raises(WrongArgumentError, match=rf"mine\.py: cannot be read.*named '{module}'"):
        check_training(config, [])
    config.write_text("raise ModuleNotFoundError(name='lifelines')\n")
    with pytest.raises(ModuleNotFoundError):  # the command says how to install it
        check_training(config, [])


def test_the_number_of_processes_counts_for_the_warm_up() -> None:
    check_training(STAGE1, [], {})
    with pytest.raises(TrainingInputError, match=r"2 iteration.* an epoch \(2 process"):
        check_training(STAGE1, [], {"NPROC_PER_NODE": "2"})


def test_the_command_ends_with_one_line_and_code_2(folder: Path) -> None:
    command = [sys.executable, "-m", "xtuner_add.cli", "train", str(STAGE1)]
    command += ["--cfg-options", f"{DATA}.data_path=nope.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "Error: train_dataloader.dataset: data_path nope.jsonl: no such file"
    ]
    done = subprocess.run([*command, "--debug"], cwd=folder, capture_output=True, text=True)
    assert "Traceback" in done.stderr
