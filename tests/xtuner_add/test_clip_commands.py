"""The command lines of CLIP as users type them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.pathgen.histology import KINDS, patch, write_class_folders, write_pairs
from tests.warm_python import run_module
from xtuner_add.cli import main
from xtuner_add.paths import configs_dir


def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    words = list(map(str, arguments))
    return run_module("xtuner_add.cli", words, cwd=Path.cwd(), environ={**os.environ, **environ})


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_processes_train_a_clip_above_chance_that_cite_reads(
    tmp_path: Path,
) -> None:
    pairs = write_pairs(tmp_path / "all", 30)
    with pairs.open("a") as file:
        file.write('{"id": "gone", "image": "images/gone.png", "caption": "x"}\n')
    recipe = tmp_path / "recipe.yml"
    ours = configs_dir() / "pathgen"
    recipe.write_text(
        f"_base_: {ours}/pathgen_clip_tiny.yml\nmodel: {ours}/tiny_clip.json\n"
        "stages: [{name: only, data: unset, options: {epochs: 12, lr: 1.0e-3, warmup: 10}}]\n"
    )
    found = run(
        *("train-clip", recipe, "--output", tmp_path / "out", "--device", "cpu"),
        *("--data", f"only={pairs}", "--option", "batch-size=8", "--option", "workers=1"),
        NPROC_PER_NODE="2",
    )
    assert found.returncode == 3, found.stdout[-3000:]
    assert "1 skipped" in found.stdout and "only: 120 pairs" in found.stdout
    log = (tmp_path / "out/only/out.log").read_text()
    assert "total 2" in log and "backend" not in found.stdout.splitlines()[-1]

    import open_clip
    import torch

    from cite.encoders import open_encoder
    from cite.prompted import PromptedEncoder

    folder = tmp_path / "out/only/open_clip"
    classes = [{"name": kind, "folders": [kind], "prompts": [kind]} for kind in KINDS]
    content = {"name": "kinds", "templates": ["The image shows {}."], "classes": classes}
    (tmp_path / "kinds.json").write_text(json.dumps(content))
    data = write_class_folders(tmp_path / "test", 20)
    scored = CliRunner().invoke(
        main,
        ["clip-zero-shot", str(folder), "--benchmark", str(tmp_path / "kinds.json"),
         "--data-path", str(data), "--output", str(tmp_path / "scores"), "--device", "cpu"],
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert metrics["balanced_accuracy"]["low"] > 0.5  # chance is 0.25
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    encoder = PromptedEncoder(open_encoder(str(folder))).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.encode_image(pixels))


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    import torch

    from pathgen.clip.export import export_open_clip, model_config

    folder = tmp_path_factory.mktemp("model")
    config = model_config(str(configs_dir() / "pathgen/tiny_clip.json"))
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "random.pt")
    pre = {"mean": [0.5] * 3, "std": [0.2] * 3}
    return export_open_clip(folder / "random.pt", folder / "clip", config=config, preprocessing=pre)


def test_zero_shot_and_retrieval_say_what_was_left_out(random_clip: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "Photos", tmp_path / "out"
    for kind, name in zip(("Normal", "Benign", "InSitu", "Invasive"), KINDS, strict=True):
        (data / kind).mkdir(parents=True)
        patch(name, 1).save(data / kind / "1.tif")
    (data / "Benign/2.tif").write_bytes(b"cut")
    found = CliRunner().invoke(
        main,
        ["clip-zero-shot", str(random_clip), "--benchmark", "bach", "--data-path", str(tmp_path),
         "--output", str(out), "--device", "cpu"],
    )  # fmt: skip
    assert found.exit_code == 3, found.output
    assert "# bach: zero-shot classification" in found.output and "1 skipped" in found.output
    assert json.loads((out / "metrics.json").read_text())["num_images"] == 4

    pairs = write_pairs(tmp_path / "pairs", 2)
    found = CliRunner().invoke(
        main,
        ["clip-retrieval", str(random_clip), "--pairs", str(pairs), "--output", str(out), "--k",
         "3", "--device", "cpu"],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "image to text, recall@3" in found.output


def test_retrieval_of_images_and_its_wrong_uses(random_clip: Path, tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "data", 2)
    content = {"name": "kinds", "classes": [{"name": kind} for kind in KINDS]}
    (tmp_path / "kinds.json").write_text(json.dumps(content))
    place = ["--data-path", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    chosen = ["--benchmark", str(tmp_path / "kinds.json")]
    found = CliRunner().invoke(
        main, ["clip-retrieval", str(random_clip), *chosen, *place, "--k", "1"]
    )
    assert found.exit_code == 0, found.output
    assert "majority vote@1" in found.output and "8 queries among 8 images" in found.output
    for arguments, message in (
        ([str(random_clip), *place], "one of --pairs, --benchmark and --labels"),
        ([str(random_clip), *chosen, "--output", "o"], "require --data-path"),
        (["none", *chosen, *place], "the MODEL none is for --labels"),
    ):
        found = CliRunner().invoke(main, ["clip-retrieval", *arguments])
        assert found.exit_code == 2 and message in found.output, found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-clip", "nothing", "--output", "o"], "neither a file nor a known name"),
        (["train-clip", "pathgen_clip_tiny", "--output", "o", "--data", "x"], "NAME=VALUE"),
        (["train-clip", "pathgen_clip_tiny", "--output", "o", "--option", "a=1"], "it has no a"),
        (["train-clip", "pathgen_clip_tiny", "--output", "o"], "neither pairs in JSON lines"),
        (
            ["clip-zero-shot", "x", "--benchmark", "bach", "--data-path", ".", "--output", "o"],
            "neither a preset nor a folder",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, arguments)
    expected = 2 if message == "NAME=VALUE" else 1
    assert found.exit_code == expected and message in found.output
