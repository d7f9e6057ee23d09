from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from tests.pallava.converters import published
from tests.pallava.converters.published import read_lines
from xtuner_add.cli import main

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_convert_dataset(tmp_path: Path) -> None:
    data, out = published.quilt(tmp_path / "data"), tmp_path / "out"
    arguments = ["convert-dataset", "quilt-1m", data, out, "--option", "subsets=quilt,laion"]
    result = call(*arguments, "--licence", "agreed by letter")
    assert result.exit_code == 0 and "2 pairs" in result.output, result.output
    assert {row["licence"] for row in read_lines(out / "pairs.jsonl")} == {"agreed by letter"}
    result = call(*arguments)
    assert result.exit_code == 1 and "other data or options" in result.output


def test_convert_dataset_says_what_was_skipped(tmp_path: Path) -> None:
    data, out = published.pmc_oa(tmp_path / "data"), tmp_path / "out"
    (data / "images" / "PMC101_Fig1_1.jpg").unlink()
    for _ in range(2):
        result = call("convert-dataset", "pmc-oa", data, out, "--max-skipped", 0.5)
        assert result.exit_code == 3 and "1 row was skipped" in result.output, result.output
    assert [row["id"] for row in read_lines(out / "skipped_samples.jsonl")] == ["2"]


def test_convert_dataset_to_class_folders(tmp_path: Path) -> None:
    data, out = published.bach(tmp_path / "data"), tmp_path / "out"
    result = call("convert-dataset", "bach", data, out, "--link", "copy")
    assert result.exit_code == 0 and "4 classes" in result.output, result.output
    assert (out / "InSitu" / "in001.tif").is_file()
    assert json.loads((out / "conversion.json").read_bytes())["num_by_class"]["Normal"] == 1
    result = call("convert-dataset", "bach", data, tmp_path / "no", "--max-skipped", 0)
    assert result.exit_code == 2 and "--max-skipped has no effect for bach" in result.output
    result = call("convert-dataset", "pmc-oa", published.pmc_oa(tmp_path), "no", "--link", "copy")
    assert result.exit_code == 2 and "--link has no effect for pmc-oa" in result.output


def test_convert_dataset_errors_are_one_line(tmp_path: Path) -> None:
    data = published.pmc_oa(tmp_path / "data")
    result = call("convert-dataset", "pmc_oa", data, tmp_path / "out")
    assert result.exit_code == 1 and "did you mean pmc-oa" in result.output
    result = call("convert-dataset", "pmc-oa", data, tmp_path / "out", "--option", "colour=red")
    assert result.exit_code == 1 and "colour" in result.output
    assert "Traceback" not in result.output
    assert call("convert-dataset", "pmc-oa", data, tmp_path / "out", "--option", "x").exit_code == 2


def test_dataformat(tmp_path: Path) -> None:
    data = published.pmc_oa(tmp_path / "data")
    assert call("convert-dataset", "pmc-oa", data, tmp_path / "pairs").exit_code == 0
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    (tmp_path / "own.txt").write_text("Describe it.\n")
    result = call(
        "dataformat", pairs, tmp_path / "out", "--image-folder", data / "images",
        "--instructions", tmp_path / "own.txt",
    )  # fmt: skip
    assert result.exit_code == 0 and "3 conversations" in result.output, result.output
    rows = read_lines(tmp_path / "out" / "conversations.jsonl")
    assert rows[0]["conversations"][0]["value"] == "<image>\nDescribe it."
    assert rows[0]["pmcid"] == "PMC100" and rows[0]["source"] == "PMC-OA"


def test_clean_pairs(tmp_path: Path) -> None:
    data, out = published.pmc_oa(tmp_path / "data"), tmp_path / "out"
    with (data / "pmc_oa.jsonl").open("a") as file:
        file.write(json.dumps({"image": "PMC100_Fig1_0.jpg", "caption": "Mouse. " * 30}) + "\n")
    assert call("convert-dataset", "pmc-oa", data, tmp_path / "pairs").exit_code == 0
    pairs, images = tmp_path / "pairs" / "pairs.jsonl", data / "images"
    arguments = ["clean-pairs", pairs, out, "--image-folder", images, "--steps", "words,human,size"]
    assert call(*arguments, "--shard", "1/2").exit_code == 0
    assert call(*arguments, "--shard", "0/2").exit_code == 0
    assert not (out / "pairs.jsonl").exists()
    result = call(*arguments)
    assert result.exit_code == 0 and "human: 1 of 4 dropped" in result.output, result.output
    assert len(read_lines(out / "pairs.jsonl")) == 3
    (tmp_path / "index.txt").write_text("PMC102_Fig1_2.jpg\nelsewhere.jpg\n")
    index = ["--image-folder", images, "--index", tmp_path / "index.txt"]
    result = call("clean-pairs", pairs, tmp_path / "indexed", *index)
    assert result.exit_code == 0 and "1 entries of" in result.output, result.output
    assert [row["pmcid"] for row in read_lines(tmp_path / "indexed" / "pairs.jsonl")] == ["PMC102"]


def test_clean_pairs_by_models(tmp_path: Path) -> None:
    from tests.pallava.converters.tiny_scorers import save_classifier, save_hf_clip

    published.pmc_oa(tmp_path)
    rows = [{"id": n, **row} for n, row in enumerate(read_lines(tmp_path / "pmc_oa.jsonl"))]
    pairs = published.write_lines(tmp_path / "pairs.jsonl", rows)
    result = call(
        "clean-pairs", pairs, tmp_path / "out", "--image-folder", tmp_path / "images",
        "--steps", "classifier,clip-classes,clip-score", "--device", "cpu", "--batch-size", 2,
        "--classifier", save_classifier(tmp_path / "vit"), "--label", "pathology",
        "--label", "radiology", "--label", "chart", "--clip",
        f"hf:{save_hf_clip(tmp_path / 'clip')}", "--min-probability", 0.001, "--min-score", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "classifier: 0 of 3 dropped" in result.output
    assert "clip-score: 3 of 3 dropped" in result.output


def test_clean_pairs_needs_what_its_steps_need(tmp_path: Path) -> None:
    pairs = published.write_lines(tmp_path / "pairs.jsonl", [])
    for steps, message in (
        ("words,colour", "colour"),
        ("classifier", "--label"),
        ("clip-score", "--clip"),
    ):
        result = call("clean-pairs", pairs, tmp_path / "out", "--steps", steps)
        assert result.exit_code == 2 and message in result.output, result.output
    result = call("clean-pairs", pairs, tmp_path / "out")
    assert result.exit_code == 1 and "holds no rows" in result.output


def test_tokenise(tmp_path: Path) -> None:
    from tests.pallava import goldens

    data = published.pmcvqa(tmp_path / "data")
    assert call("convert-dataset", "pmc-vqa", data, tmp_path / "talk").exit_code == 0
    rows = tmp_path / "talk" / "conversations.jsonl"
    assert call("tokenise", rows, tmp_path / "out").exit_code == 2
    named = ("--config", "pallava_domain_alignment_tiny", "--max-length", 9)
    result = call("tokenise", rows, tmp_path / "out", *named)
    assert result.exit_code == 2 and "omit --max-length, or change the config" in result.output
    for option in ("--max-length", "--workers"):
        named = ("--tokenizer", goldens.TINY_LLAMA, option, 0)
        assert call("tokenise", rows, tmp_path / "out", *named).exit_code == 2
    result = call("tokenise", rows, tmp_path / "out", "--tokenizer", goldens.TINY_LLAMA)
    assert result.exit_code == 0 and "1 rows" in result.output, result.output
    assert (tmp_path / "out" / "state.json").is_file()


def test_tokenise_counts_every_row_that_it_loses(tmp_path: Path) -> None:
    from tests.pallava import goldens

    def row(number: object, question: str) -> str:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        return json.dumps({"id": number, "conversations": turns}) + "\n"

    rows = tmp_path / "conversations.jsonl"
    good = [row(number, "Is it red?") for number in range(30)]
    rows.write_text("".join([*good, *[row("long", "Is it red? " * 40)] * 2]))
    named = ("--tokenizer", goldens.TINY_LLAMA, "--max-length")
    result = call("tokenise", rows, tmp_path / "out", *named, 60)
    assert result.exit_code == 3 and "2 rows were skipped" in result.output, result.output
    log = (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in log] == ["long", "long (row 32)"]
    result = call("tokenise", rows, tmp_path / "short", *named, 5)
    assert result.exit_code == 1 and "32 of 32 rows cannot be used" in result.output
    rows.write_text("".join([*good, *[row("long", "Is it red? " * 40)] * 5]))
    result = call("tokenise", rows, tmp_path / "few", *named, 60)
    assert result.exit_code == 1 and "5 of 35 rows cannot be used, more than a te" in result.output
    assert "no word of the answer is within max_length 60" in result.output
