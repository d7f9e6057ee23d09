"""`xtuner train` on the tiny configs: one process, two, ZeRO-2, resumed, converted, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pallava.modeling.folders import load_connector, load_vision_encoder
from pallava.release.zero import load_checkpoint
from pathcore.files import folder_lock
from pathcore.weights import read_state_dict
from tests.pallava.engine.tiny_run import (
    CONFIGS,
    STAGE1,
    STAGE2,
    losses,
    make_folder,
    run,
)
from tests.pallava.release.test_llm_configs import TWINS
from tests.warm_python import run_module

pytestmark = pytest.mark.slow

SKIPPED = 3
"""Exit code of a run that finished but left samples out: the folder has one missing image."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Path:
    """The work folder of an uninterrupted stage 1."""
    result = run(folder, "train", STAGE1, "--seed", 0)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    (folder / "stage1.log").write_text(result.stdout)
    return folder / "work_dirs" / STAGE1.stem


def resumed(folder: Path, whole: Path, *options: object, processes: int = 1) -> Path:
    """Resumes a copy of a run at iteration 20, as after a kill."""
    work_dir = folder / f"{whole.name}_resumed"
    name = "iter_20.pth"
    work_dir.mkdir()
    copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
    copy(whole / name, work_dir / name)
    arguments = ("--resume", work_dir / name, "--work-dir", work_dir, *options)
    result = run(folder, "train", STAGE1, *arguments, processes=processes)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    return work_dir


def assert_equal_weights(first: Path, second: Path) -> None:
    left, right = load_checkpoint(first), load_checkpoint(second)
    assert left.keys() == right.keys() and left
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:3]}"


def test_learns_and_says_what_it_left_out(folder: Path, stage1: Path) -> None:
    output = (folder / "stage1.log").read_text()
    values = losses(output)
    assert sum(values[-5:]) < 0.5 * sum(values[:5])
    (log,) = stage1.glob("*/skipped_samples.jsonl")
    (record,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (record["id"], record["file"]) == ("absent", "absent.png")
    assert "no such image file" in record["reason"] and str(log) in output


def test_one_screen_says_what_trains_and_the_log_file_holds_the_rest(
    folder: Path, stage1: Path
) -> None:
    output = (folder / "stage1.log").read_text()
    head = output.partition("Iter(train)")[0]
    assert len(head.splitlines()) <= 40
    for text in (
        "LLaVAModel, 421,952 parameters",
        "visual_encoder: 150,208, frozen",
        "llm: 16,384 of 133,952 trained",
        "41 samples, 5.4 sub-images a sample",
        "4 x 1 process(es) x accumulation 1 = 4",
        "44 iterations, 11 an epoch",
    ):
        assert text in head
    (log,) = stage1.glob("*/*.log")
    text = log.read_text()
    assert "System environment" in text and "Hooks will be executed" in text
    assert text.count("\n") > 250


def test_checkpoint_holds_what_was_trained(stage1: Path) -> None:
    names = set(read_state_dict(stage1 / "iter_40.pth"))
    assert "projector.model.bert.embeddings.position_ids" in names
    assert any(".crossattention." in name for name in names)
    assert any(name.endswith("lora_A.default.weight") for name in names)
    assert all(name.startswith("projector.") or ".lora_" in name for name in names)


def test_resume_continues_bit_for_bit(folder: Path, stage1: Path) -> None:
    again = resumed(folder, stage1)
    assert_equal_weights(stage1 / "iter_40.pth", again / "iter_40.pth")


def test_resuming_with_other_batches_or_another_model_is_refused(
    folder: Path, stage1: Path
) -> None:
    sampler = "train_dataloader.sampler.per_device_batch_size"
    for options, message in (
        (
            ("train_dataloader.batch_size=8", f"{sampler}=8"),
            "the training had 4 samples an iteration, this one has 8: batch 8 x 1 process",
        ),
        (("model.llm_lora.r=4",), "does not fit the trained part of the model"),
    ):
        arguments = ("--resume", stage1 / "iter_20.pth", "--work-dir", folder / "other")
        result = run(folder, "train", STAGE1, *arguments, "--cfg-options", *options)
        assert result.returncode == 2, result.stdout[-3000:]
        assert message in result.stdout and "Traceback" not in result.stdout


def test_resuming_on_other_data_is_noticed(folder: Path, stage1: Path) -> None:
    rows = (folder / "data/tiny/conversations.jsonl").read_text().splitlines()
    for changed, code, message in (
        (rows + rows[:10], 2, "had 11 iterations of 41 samples, this one has 13 of 51"),
        (rows[::-1], SKIPPED, "its rows are others or in another order"),
    ):
        (folder / "changed.jsonl").write_text("\n".join(changed))
        options = ("--cfg-options", "train_dataloader.dataset.data_path=changed.jsonl")
        arguments = ("--resume", stage1 / "iter_40.pth", "--work-dir", folder / "changed")
        result = run(folder, "train", STAGE1, *arguments, *options)
        assert result.returncode == code, result.stdout[-3000:]
        assert message in result.stdout and "Traceback" not in result.stdout


def test_a_work_dir_in_use_is_refused_and_an_earlier_training_reported(folder: Path) -> None:
    work_dir = folder / "shared"
    work_dir.mkdir()
    with folder_lock(work_dir / ".lock"):
        result = run(folder, "train", STAGE1, "--work-dir", work_dir)
    assert result.returncode == 2, result.stdout[-3000:]
    assert f"--work-dir {work_dir}: another process is working on this" in result.stdout
    (work_dir / "last_checkpoint").write_text(str(work_dir / "iter_40.pth"))
    options = ("--cfg-options", "train_cfg.max_epochs=1", "param_scheduler.1.end=1")
    result = run(folder, "train", STAGE1, "--work-dir", work_dir, *options)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    assert "holds checkpoints of an earlier training, the last is iter_40.pth" in result.stdout


def test_plain_xtuner_trains_the_same(folder: Path, stage1: Path) -> None:
    work_dir = folder / "plain"
    run(folder, "train", STAGE1, "--seed", 0, "--work-dir", work_dir, program="xtuner")
    assert_equal_weights(stage1 / "iter_40.pth", work_dir / "iter_40.pth")


@pytest.mark.multiproc
def test_two_processes(folder: Path) -> None:
    whole = folder / "two"
    result = run(folder, "train", STAGE1, "--seed", 0, "--work-dir", whole, processes=2)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    values = losses(result.stdout)
    assert sum(values[-3:]) < 0.7 * sum(values[:3])
    again = resumed(folder, whole, processes=2)
    assert_equal_weights(whole / "iter_24.pth", again / "iter_24.pth")


@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage: int, folder: Path) -> None:
    whole, options = folder / f"zero{stage}", ("--deepspeed", f"deepspeed_zero{stage}")
    arguments = ("--seed", 0, "--work-dir", whole, *options)
    result = run(folder, "train", STAGE1, *arguments, processes=2)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    assert "LLaVAModel, 421,952 parameters" in result.stdout
    values = losses(result.stdout)
    assert sum(values[-3:]) < 0.7 * sum(values[:3])
    assert (whole / "iter_20.pth").is_dir()
    again = resumed(folder, whole, *options, processes=2)
    assert_equal_weights(whole / "iter_24.pth", again / "iter_24.pth")
    # The folder that DeepSpeed wrote is what `pth-to-hf` reads: fp32 masters of both ranks.
    result = run(folder, "pth-to-hf", STAGE1, whole / "iter_24.pth", whole / "parts", "--fp32")
    assert result.returncode == 0, result.stdout[-3000:]
    adapter = load_file(whole / "parts" / "llm_adapter" / "adapter_model.safetensors")
    # ZeRO-3 has no copy in half precision.
    trained = (read_state_dict if stage == 2 else load_checkpoint)(whole / "iter_24.pth")
    copies = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
    assert len(adapter) == len(copies) > 0
    for name, copy in copies.items():
        master = adapter[name.removeprefix("llm.").replace(".default", "")]
        assert master.dtype == torch.float32 and torch.equal(master.to(copy.dtype), copy), name
    # The folder is a starting point for stage 2 as it is, with its own learning rates kept.
    pretrained = f"model.pretrained_pth={whole / 'iter_24.pth'}"
    work_dir = folder / f"zero{stage}_stage2"
    arguments = ("--cfg-options", pretrained, "train_cfg.max_epochs=1", "--work-dir", work_dir)
    result = run(folder, "train", STAGE2, *options, *arguments)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    assert f"tensors from {whole / 'iter_24.pth'}" in result.stdout


def test_stage2_converts_merges_and_answers(folder: Path, stage1: Path) -> None:
    result = run(folder, "train", STAGE2, "--seed", 0)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    checkpoint = folder / "work_dirs" / STAGE2.stem / "iter_44.pth"
    groups = torch.load(checkpoint, weights_only=False)["optimizer"]["param_groups"]
    rates = sorted(group["initial_lr"] for group in groups)
    assert rates == [1e-3, 2e-3], "the connector learns at half the rate of LoRA"

    for program in ("xtuner", "xtuner-add"):
        out = folder / f"hf_{program}"
        result = run(folder, "convert", "pth_to_hf", STAGE2, checkpoint, out, program=program)
        assert (out / "projector" / "config.json").is_file(), result.stdout[-3000:]
        record = json.loads((out / "conversion.json").read_bytes())
        assert "<|start_header_id|>user" in record["prompt_template"]["INSTRUCTION"]
        assert record["ties"] == "largest_scale"
        arguments = ("data/tiny/llama", out / "llm_adapter", out / "merged", "--device", "cpu")
        if program == "xtuner":  # the script that `xtuner convert merge` starts
            script = "xtuner.tools.model_converters.merge"
            result = run_module(script, list(map(str, arguments)), cwd=folder)
        else:
            result = run(folder, "convert", "merge", *arguments)
        assert (out / "merged" / "config.json").is_file(), result.stdout[-3000:]
    assert answers(folder, out) == ["yes", "no"] * 4


def answers(folder: Path, out: Path) -> list[str]:
    """Asks the merged model about images it has not seen, in one batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pallava.anyres import AnyRes
    from pallava.modeling.llava import PALLaVA
    from pallava.text.encoding import encode_prompt
    from pathcore.images import load_image
    from tests.pallava.engine.tiny_run import save_image

    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    model = PALLaVA(
        AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32),
        load_vision_encoder(folder / "data/tiny/plip"),
        load_connector(out / "projector").float(),
    ).eval()
    prompt = encode_prompt(
        tokenizer,
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nIs it red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    images = []
    for index in range(101, 109):
        save_image(folder / "unseen.png", index)
        images.append(AnyRes(tile_px=32)(load_image(folder / "unseen.png")))
    ids = torch.tensor([prompt] * len(images))
    new = model.generate(ids, images, max_new_tokens=4, do_sample=False, pad_token_id=4)
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def test_failure_is_an_exit_code(folder: Path) -> None:
    option = "train_dataloader.dataset.image_folder=data/tiny/nowhere"
    result = run(folder, "train", STAGE1, "--cfg-options", option)
    assert result.returncode not in (0, SKIPPED)
    assert "image_folder data/tiny/nowhere: no such folder" in result.stdout


def test_every_recipe_has_a_tiny_twin() -> None:
    names = {path.stem for path in CONFIGS.glob("*.py")}
    full = {name for name in names if not name.endswith("_tiny") and not name.startswith("demo")}
    # Recipes that differ in the language model alone have their twins in test_llm_configs.py.
    full -= {name for name in names if any(f"_{llm}_" in name for llm in (*TWINS, "qlora"))}
    assert full and {f"{name}_tiny" for name in full} <= names
