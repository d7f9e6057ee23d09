"""Questions about slides: the data set, and `xtuner-add train` to answers on the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.pallava import goldens
from tests.pallava.bags import write_bag
from tests.pallava.engine.tiny_run import CONFIGS, losses, run

CONFIG = CONFIGS / "pallava_slide_questions_tiny.py"
SKIPPED = 3
PLACES = np.stack(np.meshgrid(np.arange(8), np.arange(6)), axis=-1).reshape(-1, 2)


def row(slide: str | list[str] | None, answer: str = "yes", **changes: Any) -> dict[str, Any]:
    marks = "<image>\n" * (len(slide) if isinstance(slide, list) else slide is not None)
    turns = [{"from": "human", "value": f"{marks}Is it red?"}, {"from": "gpt", "value": answer}]
    found: dict[str, Any] = {"id": f"row of {slide}", "conversations": turns}
    return found | ({"slide": slide} if slide is not None else {}) | changes


def dataset(root: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    from xtuner.dataset.map_fns import template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    from pallava.engine.slide_questions import SlideQuestionDataset

    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments: dict[str, Any] = {
        "features_folder": root / "features",
        "in_features": 32,
        "data_path": root / "rows.jsonl",
        "tokenizer": goldens.tokenizer(),
        "template_map_fn": template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat),
        "skip_log": root / "skipped.jsonl",
    }
    return SlideQuestionDataset(**(arguments | changes))


def skipped(root: Path) -> dict[str, str]:
    from pallava.skipping import SkipLog

    return {sample.id: sample.reason for sample in SkipLog(root / "skipped.jsonl").read()}


def test_rows_with_one_slide_none_and_two(tmp_path: Path) -> None:
    from pallava.default_collate_fn import default_collate_fn
    from pallava.text.encoding import IMAGE_TOKEN_INDEX

    for number in (5, 9):
        write_bag(tmp_path / "features" / f"case{number}.h5", num_tiles=number)
    rows = [row("case5"), row(None), row(["case9", "case5.h5"]), {**row(None), "slide": ""}]
    data = dataset(tmp_path, rows)
    assert data.num_sub_images == [5, 0, 14, 0]
    assert [length > 0 for length in data.modality_length] == [True, False, True, False]
    batch = default_collate_fn([data[index] for index in range(4)])["data"]
    assert [bag.features.shape for bag in batch["pixel_values"]] == [(5, 32), (9, 32), (5, 32)]
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist() == [1, 0, 2, 0]
    assert skipped(tmp_path) == {}


def test_bad_slides_are_recorded_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    names = [f"case{number}" for number in range(60)]
    for number, name in enumerate(names):
        write_bag(folder / f"{name}.h5", seed=number)
    nan = np.full((12, 32), np.nan, np.float16)
    write_bag(folder / "nan.h5", features=nan)
    write_bag(folder / "narrow.h5", width=16)
    whole = write_bag(folder / "half.h5", num_tiles=300).read_bytes()
    (folder / "half.h5").write_bytes(whole[: len(whole) // 2])
    bad = ["nan", "absent", "../rows", "narrow", "half"]
    rows = [row(name) for name in [*names[:30], *bad, *names[30:]]]
    data = dataset(tmp_path, [*rows, row("case1", conversations=[]), {**row("case2"), "slide": 7}])
    # Features are read when they are used; the headers are known before.
    assert len(data) == len(names) + 1
    found = [data[index]["pixel_values"][0].features for index in range(len(data))]
    assert len(found) == 61 and all(features.isfinite().all() for features in found)
    reasons = {
        "nan": "12 of 12 tiles hold NaN",
        "absent": "no such file",
        "../rows": "resolves to a path outside",
        "narrow": "16 wide, the model takes 32",
        "half": "half-written or damaged",
    }
    recorded = skipped(tmp_path)
    for name, reason in reasons.items():
        assert reason in recorded[f"row of {name}"]
    assert "list of {from, value}" in recorded["row of case1"]
    assert "slide: expected a file name or a list of them, found 7" in recorded["row of case2"]


def test_a_wrong_folder_stops_the_run(tmp_path: Path) -> None:
    write_bag(tmp_path / "features" / "case1.h5")
    with pytest.raises(ValueError, match="rows cannot be used, more than a tenth"):
        dataset(tmp_path, [row(f"absent{number}") for number in range(12)])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        dataset(tmp_path, [row("case1")], features_folder=tmp_path / "nowhere")


def test_texts_tokenised_before_keep_their_slides(tmp_path: Path) -> None:
    from pallava.engine.tokenised import settings_from_config, tokenise

    shutil.copytree(goldens.TINY_LLAMA, tmp_path / "llama")
    text = CONFIG.read_text().replace("data/tiny/llama", str(tmp_path / "llama"))
    config = tmp_path / "configs" / CONFIG.name
    shutil.copytree(CONFIG.parent, config.parent)
    config.write_text(text)
    write_bag(tmp_path / "features" / "case1.h5")
    rows = [row("case1"), row(None)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = tokenise(tmp_path / "rows.jsonl", tmp_path / "text", settings_from_config(config))
    assert (report["num_rows"], report["num_skipped"]) == (2, 0)
    offline = {"offline_processed_text_folder": tmp_path / "text", "data_path": None}
    data = dataset(tmp_path, rows, **offline)
    assert [len(data[index]["pixel_values"]) for index in range(2)] == [1, 0]


def test_slide_embeddings_come_with_the_tiles(tmp_path: Path) -> None:
    write_bag(tmp_path / "features" / "a.h5")
    write_bag(tmp_path / "slides" / "a.h5", features=np.ones(8), coords=None)
    data = dataset(tmp_path, [row("a")], slide_embedding_folder=tmp_path / "slides")
    assert data[0]["pixel_values"][0].slide_embedding.shape == (8,)


def test_the_hook_asks_about_slides(tmp_path: Path) -> None:
    from pallava.engine.slide_questions import EvaluateSlideHook
    from pallava.slide_bags import SlideBagError

    path = str(write_bag(tmp_path / "a.h5"))
    tokenizer = {"type": goldens.tokenizer}
    hook = EvaluateSlideHook(tokenizer, ["Is it red?", "Is it blue?"], path, in_features=32)
    assert [bag.features.shape for bag in hook.evaluation_images] == [(12, 32)] * 2
    with pytest.raises(SlideBagError, match="the model takes 8"):
        EvaluateSlideHook(tokenizer, ["Is it red?"], path, in_features=8)
    with pytest.raises(ValueError, match="2 evaluation_slides for 3 evaluation_inputs"):
        EvaluateSlideHook(tokenizer, ["a", "b", "c"], [path, path])


def test_the_hook_takes_the_preparation_of_the_data_set(tmp_path: Path) -> None:
    from pallava.engine.slide_questions import EvaluateSlideHook
    from pallava.slide_bags import SlideBagError

    def asked(**dataset: Any) -> Any:
        return hook._prepared({"train_dataloader": {"dataset": {"features_folder": "", **dataset}}})

    path = write_bag(tmp_path / "a.h5", attributes={"encoder": "uni", "patch_size_level0": 512})
    hook = EvaluateSlideHook({"type": goldens.tokenizer}, ["Is it red?"], str(path))
    with pytest.raises(SlideBagError, match="the model takes 8"):
        asked(in_features=8)
    with pytest.raises(SlideBagError, match="trained on prov-gigapath"):
        asked(tile_encoder="prov-gigapath")
    with pytest.raises(SlideBagError, match=r"a\.embedding\.h5: no such file"):
        asked(slide_embedding_folder="slides")
    write_bag(tmp_path / "a.embedding.h5", features=np.ones(8), coords=None)
    (bag,) = asked(slide_embedding_folder="slides", tile_size_level0=7)
    assert bag.slide_embedding.shape == (8,)
    assert torch.equal(bag.positions * 7, asked()[0].positions * 512)


def test_starts_from_a_stage_on_images(tmp_path: Path) -> None:
    from pallava.model import LLaVAModel
    from pallava.modeling.slide_tokens import SlideTokenEncoder
    from pathcore.weights import CheckpointError, read_state_dict

    def build(checkpoint: Path) -> LLaVAModel:
        encoder = SlideTokenEncoder(in_features=32, hidden_size=64, num_attention_heads=4)
        return LLaVAModel(
            goldens.llm(r=0),
            encoder,
            freeze_llm=True,
            pretrained_pth=checkpoint,
            num_hidden_layers=2,
            llm_lora=goldens.lora_config(),
        )

    images = read_state_dict(goldens.CROSSATTN_STATE)
    model = build(goldens.CROSSATTN_STATE)
    state_dict = model.state_dict()
    assert {n for n in state_dict if n not in images} == {
        f"visual_encoder.{name}" for name in model.visual_encoder.state_dict()
    }
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in images.items())
    odd = {**images, "visual_encoder.vision_model.x": torch.zeros(1)}
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="1 unexpected"):
        build(tmp_path / "odd.pth")


def make_folder(root: Path) -> None:
    """Slides of two kinds of tiles; the answer is whether the second kind is on the left."""
    data = root / "data" / "tiny"
    data.mkdir(parents=True)
    shutil.copytree(goldens.TINY_LLAMA, data / "llama")
    rows = []
    for number in range(120):
        name, answer = f"case{number}", number % 2
        write_slide(data / "features" / f"{name}.h5", number, on_left=bool(answer))
        rows.append(row(name, "yes" if answer else "no"))
    rows += [row("absent"), row(None, "I cannot see an image.")]
    (data / "slide_conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_slide(path: Path, seed: int, *, on_left: bool) -> Path:
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(99).standard_normal((2, 32))
    is_left = PLACES[:, 0] < 4
    features = kinds[(is_left == on_left).astype(int)] + 0.7 * rng.standard_normal((48, 32))
    corner = rng.integers(0, 50, 2)
    return write_bag(path, features=features.astype(np.float16), coords=(PLACES + corner) * 512)


@pytest.mark.slow
def test_trains_converts_and_answers_by_what_lies_where(tmp_path: Path) -> None:
    make_folder(tmp_path)
    options = ("train_dataloader.batch_size=8", "train_dataloader.sampler.per_device_batch_size=8")
    result = run(tmp_path, "train", CONFIG, "--seed", 0, "--cfg-options", *options)
    assert result.returncode == SKIPPED, result.stdout[-3000:]
    assert "absent.h5: no such file" in result.stdout
    values = losses(result.stdout)
    assert sum(values[-5:]) < 0.3 * sum(values[:5])

    checkpoint = tmp_path / (tmp_path / "work_dirs" / CONFIG.stem / "last_checkpoint").read_text()
    result = run(tmp_path, "convert", "pth_to_hf", CONFIG, checkpoint, "hf", "--fp32")
    assert (tmp_path / "hf" / "visual_encoder" / "model.safetensors").is_file(), result.stdout
    truths = [number % 3 == 0 for number in range(12)]
    asked = tmp_path / "asked"
    for number, truth in enumerate(truths):
        write_slide(asked / f"{number:02d}.h5", 1000 + number, on_left=truth)
    answers = ask(tmp_path, asked)
    right = [
        given == ("yes" if truth else "no") for given, truth in zip(answers, truths, strict=True)
    ]
    assert sum(right) >= 11
    check_slidebench(tmp_path, asked, truths)
    check_one_folder(tmp_path, checkpoint, asked)
    check_evidence(tmp_path, asked)
    # The same tiles mirrored: the answers must turn round.
    for path in asked.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            coords = file["coords"][:]
            coords[:, 0] = -coords[:, 0]
            file["coords"][:] = coords
    mirrored = ask(tmp_path, asked)
    assert sum(a != b for a, b in zip(answers, mirrored, strict=True)) >= 10


def ask(root: Path, folder: Path) -> list[str]:
    """Answers about every slide of a folder, through the command line."""
    from click.testing import CliRunner

    from xtuner_add.commands.evaluate import answer

    arguments = [root / "data/tiny/llama", "--llava", root / "hf", folder, "-q", "Is it red?"]
    arguments += ["--max-new-tokens", 4, "--output", root / "answers.jsonl", "--device", "cpu"]
    result = CliRunner().invoke(answer, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = (root / "answers.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def check_one_folder(root: Path, checkpoint: Path, asked: Path) -> None:
    """The exported folder computes what the trained parts compute, and names its tiles."""
    from click.testing import CliRunner

    from pallava import load_model
    from pallava.modeling.folders import load_slide_encoder
    from pallava.modeling.slide_tokens import SlideTokenEncoder
    from xtuner_add.cli import main

    done = run(root, "pth-to-hf", CONFIG, checkpoint, "parts", "--fp32")
    assert done.returncode == 0, done.stdout
    done = run(root, "export", "data/tiny/llama", "parts", "model", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    assert "model = load_model(folder)" in (root / "model/README.md").read_text()
    trained = load_model(root / "data/tiny/llama", root / "hf", device="cpu")
    exported = load_model(root / "model", device="cpu")
    assert exported.prompt_template == trained.prompt_template
    ids = torch.tensor([trained.encode("Is it red?", has_image=True)])
    for path in sorted(asked.glob("*.h5")):
        bag = [trained.pixel_values(path)]
        logits = [model.model(ids, bag)["logits"] for model in (trained, exported)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        replies = [m.answer(path, "Is it red?", max_new_tokens=4) for m in (trained, exported)]
        assert replies[0] == replies[1]
    result = CliRunner().invoke(
        main, ["pth-to-hf", str(CONFIG), str(checkpoint), str(root / "x"), "--visual-encoder", "."]
    )
    assert result.exit_code == 1 and "encoder is in the checkpoint" in result.output
    encoder: SlideTokenEncoder = load_slide_encoder(root / "model/visual_encoder")
    assert encoder.config.tile_encoder == ""


def check_evidence(root: Path, asked: Path) -> None:
    """Without the squares of the file, the model itself answers otherwise."""
    from click.testing import CliRunner

    from pallava import load_model
    from pallava.slide_bags import read_squares
    from xtuner_add.cli import main

    arguments = ["answer", root / "model", asked, "-q", "Is it red?", "--evidence", root / "shown"]
    arguments += ["--max-new-tokens", 4, "--output", root / "rows.jsonl", "--device", "cpu"]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = load_model(root / "model", device="cpu")
    prompt = model.encode("Is it red?", has_image=True)
    num_told = 0
    for line in (root / "rows.jsonl").read_text().splitlines():
        found = json.loads(line)
        path, told = Path(found["image"]), found["evidence"]["told"]
        assert found["answer"] == model.answer(path, "Is it red?", max_new_tokens=4)
        file = root / "shown" / f"{path.stem}.geojson"
        features = json.loads(file.read_text())["features"]
        assert len(features) == found["evidence"]["tiles"]
        assert ("evidence: cannot be told" in result.output) or told
        if not told:
            continue
        num_told += 1
        coords, side = read_squares(path)
        rings = [feature["geometry"]["coordinates"][0] for feature in features]
        cited = {(*min(ring), *max(ring)) for ring in rings}
        rest = torch.tensor([(x, y, x + side, y + side) not in cited for x, y in coords.tolist()])
        assert int((~rest).sum()) == len(features) <= len(coords) // 2
        bag = model.pixel_values(path).part(rest)
        assert model.answer_encoded([prompt], [bag], max_new_tokens=4) != [found["answer"]]
    assert num_told >= 2
    several = [*map(str, arguments)]
    several[several.index(str(root / "shown"))] = str(root / "one.geojson")
    result = CliRunner().invoke(main, several)
    assert result.exit_code == 1 and "one file for 12 slides; name a folder" in result.output


def check_slidebench(root: Path, folder: Path, truths: list[bool]) -> None:
    """The same slides as a table in SlideBench's format, through `evaluate`."""
    from click.testing import CliRunner

    from xtuner_add.cli import main

    options = {"A": "no", "B": "yes", "C": "nan", "D": ""}  # as pandas writes absent options
    rows = [
        {"Slide": f"{number:02d}", "Task": "colour", "Question": "Is it red?", **options,
         "Answer": ("B" if number % 2 else "yes") if truth else "A. no"}
        for number, truth in enumerate(truths)
    ]  # fmt: skip
    rows.append({**rows[0], "Slide": "absent"})
    with (root / "SlideBench-VQA-BCNB.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    out = root / "slidebench"
    arguments = ["evaluate", "slidebench-bcnb", root / "data/tiny/llama", "--llava", root / "hf"]
    arguments += ["--data", root, "--image-folder", folder, "--work-dir", out, "--audit"]
    arguments += ["--option", "prompt={question} {options}", "--max-new-tokens", 4]
    arguments += ["--device", "cpu"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == SKIPPED, result.output
    skipped = (out / "skipped_samples.jsonl").read_text()
    assert "slide absent: neither absent.h5 nor a picture" in skipped
    assert json.loads((out / "metrics.json").read_text())["by_task"]["colour"]["count"] == 12
    audit = json.loads((out / "audit.json").read_text())
    assert audit["missing"] == {}
    accuracy = audit["parts"]["choice"]["accuracy"]
    assert "blank" not in accuracy  # there is no empty glass among tile features
    # Without its options the question is worded as in training.
    assert accuracy["no_options"]["value"] >= 100 * 11 / 12 - 1e-3
