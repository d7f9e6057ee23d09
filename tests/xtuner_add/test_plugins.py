"""An installed third-party package adds parts, data and a sub-command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FIXTURE = Path(__file__).parents[1] / "fixtures" / "plugin_package"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the third-party package is installed beside ours."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(FIXTURE, folder / "source")  # the build writes into its source
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run(
        [*install, "--no-build-isolation", "--target", str(target), str(source)], check=True
    )
    return {**os.environ, "PYTHONPATH": str(target)}


def run(environ: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, check=False
    )


CLI = ("-m", "xtuner_add.cli")


def test_listing_shows_what_the_package_adds(environ: dict[str, str]) -> None:
    result = run(environ, *CLI, "plugins")
    assert result.returncode == 0, result.stderr
    assert "acme_pathology.parts:load_shallow_encoder" in result.stdout
    assert "acme_pathology.parts:MeanConnector" in result.stdout
    assert "acme_mean_again" in result.stdout
    assert "acme_pathology.commands:count (acme-pathology)" in result.stdout
    assert "qformer_mlp" in result.stdout


def test_parts_are_used_by_name_in_the_model_that_xtuner_trains(
    environ: dict[str, str], tmp_path: Path
) -> None:
    code = """
import sys
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM
from pallava.model import LLaVAModel
from pallava.modeling.folders import save_vision_encoder
from pallava.modeling.plip import PLIPVisionEncoder

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
encoder = PLIPVisionEncoder(CLIPVisionConfig(image_size=28, patch_size=14, **sizes))
save_vision_encoder(encoder, sys.argv[1])
model = LLaVAModel(
    llm=LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)),
    visual_encoder=f"acme_shallow:{sys.argv[1]}",
    projector_type="acme_mean",
    freeze_llm=True,
    freeze_visual_encoder=True,
)
input_ids = torch.tensor([[1, -200, 5, 6, 7]])
data = dict(
    input_ids=input_ids,
    labels=input_ids.where(input_ids > 0, -100),
    attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
    pixel_values=[torch.randn(4, 3, 28, 28)],
)
model(data, mode="loss")["loss"].backward()
print(type(model.visual_encoder).__name__, type(model.projector).__name__)
print(bool(model.projector.projection.weight.grad.abs().sum() > 0), *model.state_dict())
"""
    result = run(environ, "-c", code, str(tmp_path / "encoder"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        "ShallowEncoder MeanConnector",
        "True projector.projection.weight projector.projection.bias",
    ]


def test_sub_command_is_listed_and_runs(environ: dict[str, str]) -> None:
    listing = run(environ, *CLI, "--help")
    assert "acme-count" in listing.stdout
    assert "from acme-pathology" in listing.stdout
    result = run(environ, *CLI, "acme-count", "one", "two")
    assert (result.returncode, result.stdout.strip()) == (0, "2 words")
    assert run(environ, *CLI, "acme-count").returncode == 4


def test_sub_command_that_cannot_be_imported_is_an_error_naming_its_package(
    environ: dict[str, str], tmp_path: Path
) -> None:
    info = tmp_path / "lame-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lame\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[xtuner_add.commands]\nlimp = not_there:command\nhop = math:pi\n"
    )
    both = {**environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environ['PYTHONPATH']}"}
    limp = run(both, *CLI, "limp")
    assert limp.returncode == 1
    assert "sub-command 'limp' of lame (not_there:command) cannot be loaded" in limp.stderr
    hop = run(both, *CLI, "hop")
    assert hop.returncode == 1
    assert "math:pi must be a click command, not float" in hop.stderr
    assert run(both, *CLI, "acme-count", "one").returncode == 0


def test_listing_fails_when_a_plugin_is_broken(environ: dict[str, str], tmp_path: Path) -> None:
    info = tmp_path / "lame-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lame\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xtuner_add.plugins]\nlame_parts = not_there\n")
    both = {**environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environ['PYTHONPATH']}"}
    result = run(both, *CLI, "plugins")
    assert result.returncode == 1
    assert "not loaded: lame_parts (not_there): ModuleNotFoundError" in result.stderr
    assert "acme_mean" in result.stdout


def test_datasets_and_evaluation_sets_are_used_by_name(
    environ: dict[str, str], tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "cases.csv").write_text("file,finding\n1.png,Normal mucosa.\n")
    converted = run(
        environ, *CLI, "convert-dataset", "acme-cases", str(tmp_path / "cases.csv"),
        str(tmp_path / "out"),
    )  # fmt: skip
    assert converted.returncode == 0, converted.stderr
    row = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert (row["caption"], row["source"]) == ("Normal mucosa.", "acme cases")

    question = {"question": "Is it normal?", "image": "1.png", "answer": "yes"}
    (tmp_path / "test.json").write_text(json.dumps({"a": {**question, "answer_type": "yes/no"}}))
    (tmp_path / "answers.json").write_text(json.dumps([{"question_id": "a", "answer": "Yes."}]))
    scored = run(
        environ, *CLI, "score", "acme-vqa", "--data-path", str(tmp_path / "test.json"),
        "--answers", str(tmp_path / "answers.json"), "--work-dir", str(tmp_path / "scores"),
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "# acme-vqa" in scored.stdout and "100.00" in scored.stdout


def test_an_encoder_is_one_data_file_of_the_package(
    environ: dict[str, str], tmp_path: Path
) -> None:
    code = """
import sys
import timm
import torch
from pathcore.encoders import create_encoder, get_preset, list_encoders

assert "acme-vit" in list_encoders()
sizes = get_preset("acme-vit").arguments
model = timm.create_model("vit_large_patch16_224", num_classes=0, **sizes).eval()
torch.save(model.state_dict(), sys.argv[1])
encoder = create_encoder(f"acme-vit@{sys.argv[1]}", device="cpu")
pixels = torch.randn(2, 3, 32, 32)
assert torch.equal(encoder.features(pixels), model(pixels).detach())
print(encoder.name, encoder.embed_dim, encoder.mpp, encoder.transform.interpolation)
"""
    result = run(environ, "-c", code, str(tmp_path / "w.pth"))
    assert result.stdout == "acme-vit 24 (1.0,) bicubic\n", result.stderr
    described = run(environ, *CLI, "doctor", "acme-vit")
    assert described.returncode == 1  # its weights are not here
    assert "https://huggingface.co/acme/acme-vit" in described.stdout + described.stderr
