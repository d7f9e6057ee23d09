"""Local models as describers: an exported PA-LLaVA, and the stock LLaVA of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from pathcore.chat_backends import Request, Sampling
from pathcore.chat_local import LocalBackend
from pathcore.weights import CheckpointError
from pathgen.agents.captions import describe
from pathgen.agents.steps import run_step
from tests.pallava.goldens import CROSSATTN_STATE, TINY_LLAMA, tokenizer
from tests.pallava.tiny_vlms import write_llava
from tests.pathgen.conftest import patch_rows, read_rows, write_rows


@pytest.fixture(scope="module")
def pallava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pallava.release.export import export
    from pallava.release.pth_to_hf import convert_checkpoint
    from tests.pallava.release.test_pth_to_hf import recipe

    root = tmp_path_factory.mktemp("pallava")
    save = tokenizer().save_pretrained
    convert_checkpoint(
        CROSSATTN_STATE, recipe(root), root / "converted", save_tokenizer=save, fp32=True
    )
    export(TINY_LLAMA, root / "converted", root / "model", progress=False)
    return root / "model"


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava") / "model")


def requests(folder: Path) -> list[Request]:
    found = []
    for number, size in enumerate([(40, 40), (64, 20), (20, 64)]):
        Image.new("RGB", size, (80 * number, 90, 30)).save(folder / f"{number}.png")
        question = "What is it? " * (number + 1)
        found.append(Request("Look.", question, folder / f"{number}.png", str(number)))
    return [*found, Request("", "Shorten it.")]


@pytest.mark.parametrize("kind", ["pallava", "llava"])
def test_a_batch_equals_one_by_one(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    backend = LocalBackend(
        str(folder), Sampling(12), device="cpu", trust_remote_code=kind == "pallava"
    )
    asked = requests(tmp_path)
    batch = backend.ask(asked)
    assert [backend.ask([one])[0] for one in asked] == batch
    assert len({reply.text for reply in batch}) > 1
    assert all(reply.text and reply.reply_tokens == 12 for reply in batch)
    assert all("cut off" in (reply.fault or "") for reply in batch), "12 tokens, no end"
    (tmp_path / "1.png").write_bytes(b"no image")
    again = backend.ask(asked)
    assert again[1].blame == "image"
    assert [again[0], *again[2:]] == [batch[0], *batch[2:]]


def test_describing_by_a_local_model(llava_folder: Path, tmp_path: Path, patches: Path) -> None:
    backend = LocalBackend(str(llava_folder), Sampling(8), batch_size=2, device="cpu")
    settings = backend._model.generation_config
    settings.forced_eos_token_id = settings.eos_token_id  # random weights never end a reply
    source = write_rows(tmp_path / "rows.jsonl", patch_rows("a", "b", "c"))
    out = tmp_path / "out.jsonl"
    step = describe(min_words=1)
    report = run_step(step, backend, source, out, images=patches, progress=False)
    assert report.counts == {"rows": 3, "written": 3}, report.examples
    for row in read_rows(out):
        (origin,) = row["provenance"]
        assert origin["backend"] == "local"
        assert origin["model"].startswith("model@")
    tokens = report.spent.tokens
    report = run_step(step, backend, source, out, images=patches, progress=False)
    assert (report.counts["from cache"], report.spent.tokens) == (3, tokens)


def test_no_model_no_describer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        LocalBackend(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="batch size"):
        LocalBackend("x", batch_size=0)


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_weights_are_complete_or_refused(fault: str, llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "multi_modal_projector.linear_1.weight" in name)
    tensor = weights.pop(name)
    if fault == "other shape":
        weights[name] = tensor[:, :-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{fault}: .*multi_modal_projector.linear_1"):
        LocalBackend(str(tmp_path / "model"), device="cpu")


def test_the_command_takes_a_local_model(llava_folder: Path, tmp_path: Path, patches: Path) -> None:
    from click.testing import CliRunner

    from xtuner_add import cli

    source = write_rows(tmp_path / "rows.jsonl", patch_rows("a"))
    arguments = [
        "describe", source, tmp_path / "out.jsonl", "--image-folder", patches,
        "--local", llava_folder,
        "--device", "cpu", "--max-reply-tokens", 4, "--attempts", 1,
    ]  # fmt: skip
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 3, result.output
    assert "cut off at the maximum number of tokens" in result.output
