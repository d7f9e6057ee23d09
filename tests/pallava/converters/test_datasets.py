from __future__ import annotations

import json
from pathlib import Path

import pytest

from pallava.converters.class_sets import write_class_folders
from pallava.converters.conversion import convert
from pallava.converters.joining import join_sets
from pallava.records.class_folders import read_class_folders
from pallava.registry import CONVERTERS
from pallava.text.encoding import check_row
from pathcore.image_sets import load_image_set
from pathcore.rows import pair_fault
from tests.pallava.converters import published
from tests.pallava.converters.published import read_lines, save_image, write_csv, write_lines


def run(name: str, data: Path, out: Path, **options: str) -> tuple[dict, list[dict]]:
    report = convert(CONVERTERS.get(name)(data, **options), out)
    rows = read_lines(out / f"{report['kind']}.jsonl")
    fault = pair_fault if report["kind"] == "pairs" else check_row
    assert [fault(row) for row in rows] == [None] * report["num_rows"]
    for row in rows:
        assert row["source"] and row["licence"]
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        assert all((Path(report["image_folder"]) / name).is_file() for name in names)
    return report, rows


def test_pubmedvision(tmp_path: Path) -> None:
    data = published.pubmedvision(tmp_path / "data")
    report, rows = run("pubmedvision-alignment", data, tmp_path / "each")
    assert [row["id"] for row in rows] == [
        "PubMedVision_1", "PubMedVision_2-1", "PubMedVision_2-2", "PubMedVision_3"
    ]  # fmt: skip
    assert rows[0]["caption"].endswith("Number 1.") and rows[0]["body_part"] == "Colon"
    options = {"modality": "microscopy images", "several": "skip"}
    report, rows = run("pubmedvision-alignment", data, tmp_path / "skip", **options)
    assert [row["id"] for row in rows] == ["PubMedVision_1"]
    assert report["num_excluded"] == 2 and report["num_skipped"] == 0
    _, rows = run("pubmedvision-alignment", data, tmp_path / "talk", to="conversations")
    assert len(rows[1]["image"]) == 2
    assert rows[1]["conversations"][0]["value"] == "<image>\n<image>\nWhat do you see?"
    with pytest.raises(ValueError, match="several=each"):
        CONVERTERS.get("pubmedvision-alignment")(data, several="all")


def test_pmc_oa(tmp_path: Path) -> None:
    _, rows = run("pmc-oa", published.pmc_oa(tmp_path / "data"), tmp_path / "out")
    assert [row["id"] for row in rows] == ["pmc-oa-1", "pmc-oa-2", "pmc-oa-3"]
    assert rows[0]["pmcid"] == "PMC100" and rows[0]["image"] == "PMC100_Fig1_0.jpg"


def test_quilt(tmp_path: Path) -> None:
    data = published.quilt(tmp_path / "data")
    report, rows = run("quilt-1m", data, tmp_path / "out", subsets="quilt, OpenPath")
    assert [row["subset"] for row in rows] == ["quilt", "openpath"]
    assert report["num_excluded"] == 1
    assert rows[0]["pathology"] == "['Breast pathology']" and rows[0]["magnification"] == "1.0"


def test_pathvqa_archive(tmp_path: Path) -> None:
    _, rows = run("pathvqa", published.pathvqa(tmp_path / "data"), tmp_path / "out")
    assert rows[1]["id"] == "pathvqa-train-1" and rows[1]["image"] == "train_0001.jpg"
    assert rows[1]["conversations"] == [
        {"from": "human", "value": "<image>\nQuestion 1?"},
        {"from": "gpt", "value": "in the glands"},
    ]


def test_pathvqa_parquet_writes_each_image_once(tmp_path: Path) -> None:
    data = published.pathvqa_parquet(tmp_path / "data")
    report, rows = run("pathvqa", data, tmp_path / "out")
    assert Path(report["image_folder"]) == tmp_path / "out" / "images"
    assert rows[0]["image"] == rows[1]["image"] != rows[2]["image"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_pathvqa_files_name_their_split(tmp_path: Path) -> None:
    """The shards of the Hub are train-, validation- and test-NUMBER-of-COUNT.parquet."""
    shard = published.pathvqa_parquet(tmp_path / "data") / "train-00000-of-00001.parquet"
    for split in ("test", "validation"):
        file = shard.rename(shard.with_name(f"{split}-00000-of-00003.parquet"))
        _, rows = run("pathvqa", file, tmp_path / split)
        assert rows[0]["id"] == f"pathvqa-{split}-0"
        shard = file
    _, rows = run("pathvqa", file, tmp_path / "val", split="val")
    assert rows[0]["id"] == "pathvqa-val-0"
    with pytest.raises(ValueError, match="expected a file of split=test, found one of validation"):
        CONVERTERS.get("pathvqa")(file, split="test")
    _, rows = run("pathvqa", file.rename(file.with_name("latest.parquet")), tmp_path / "out")
    assert rows[0]["id"] == "pathvqa-train-0"


def test_pmcvqa(tmp_path: Path) -> None:
    data = published.pmcvqa(tmp_path / "data")
    _, rows = run("pmc-vqa", data, tmp_path / "out", answer="both")
    question, answer = rows[0]["conversations"]
    assert question["value"].startswith("<image>\nWhat is shown? {x}\nA: fat\nB: glands")
    assert answer["value"] == "B: glands"
    _, rows = run("pmc-vqa", data, tmp_path / "second", split="test")
    assert rows[0]["conversations"][1]["value"] == "B"
    assert rows[0]["caption"] == "Mouse colon." and rows[0]["pmcid"] == "PMC7"


@pytest.mark.parametrize(
    ("name", "num_images"), [("bach", (1, 1, 1, 1)), ("oscc", (2, 2)), ("colonpath", (1, 2))]
)
@pytest.mark.parametrize("link", ["hard", "symbolic", "copy"])
def test_class_folders_read_back(
    tmp_path: Path, name: str, num_images: tuple[int, ...], link: str
) -> None:
    data, out = getattr(published, name)(tmp_path / "data"), tmp_path / "out"
    conversion = CONVERTERS.get(name)(data)
    report = write_class_folders(conversion, out, link=link)  # type: ignore[arg-type]
    assert tuple(report["num_by_class"].values()) == num_images
    class_set = load_image_set(out / "classes.json", "question")
    found = read_class_folders(out, class_set)
    answers = [question.answer for question in found.questions]
    assert tuple(answers.count(item) for item in class_set.names) == num_images
    assert class_set.wordings == conversion.class_set.wordings
    assert write_class_folders(conversion, out, link=link) == report  # type: ignore[arg-type]


def test_bad_rows_are_recorded_and_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    data = published.pmc_oa(tmp_path / "data", count=30)
    secret = save_image(tmp_path / "data" / "secret.jpg")
    with (data / "pmc_oa.jsonl").open("ab") as file:
        for image in ("../secret.jpg", str(secret), "a\0b.jpg"):
            line = json.dumps({"image": image, "caption": published.CAPTION})
            file.write(line.encode() + b"\n")
        file.write(b'{"image": "broken\n')
    with pytest.raises(ValueError, match="4 of 34 rows cannot be used"):
        convert(CONVERTERS.get("pmc-oa")(data), tmp_path / "strict", max_skipped_fraction=0.1)
    for check in (True, False):
        out = tmp_path / f"out{check}"
        conversion = CONVERTERS.get("pmc-oa")(data)
        report = convert(conversion, out, check_images=check, max_skipped_fraction=0.2)
        assert report["num_rows"] == 30 and report["num_skipped"] == 4
        reasons = [row["reason"] for row in read_lines(out / "skipped_samples.jsonl")]
        assert "resolves to a path" in reasons[0] and "outside" in reasons[1]


def test_wrong_image_folder_is_an_error_at_once(tmp_path: Path) -> None:
    data = published.pmc_oa(tmp_path / "data", count=5)
    (tmp_path / "empty").mkdir()
    conversion = CONVERTERS.get("pmc-oa")(data, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"5 of 5 rows(.|\n)*no such image file"):
        convert(conversion, tmp_path / "out", part_rows=5)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def test_halves_of_surrogates_are_bad_rows(tmp_path: Path) -> None:
    data = published.pmc_oa(tmp_path / "data", count=20)
    write_lines(tmp_path / "data" / "more.jsonl", [{"image": "x.jpg", "caption": "\ud800 word"}])
    with (data / "pmc_oa.jsonl").open("ab") as file:
        file.write((tmp_path / "data" / "more.jsonl").read_bytes())
    report = convert(CONVERTERS.get("pmc-oa")(data), tmp_path / "out", check_images=False)
    assert report["num_skipped"] == 1


@pytest.mark.parametrize(
    "name",
    ["quilt-instruct", "slide-instruction", "pubmedvision-alignment", "pmc-oa", "join"],
)
def test_a_field_of_another_type_costs_its_row_only(tmp_path: Path, name: str) -> None:
    """pandas, for example, writes NaN for a missing value."""
    data = tmp_path / "data"
    maker = "quilt_instruct" if name == "join" else name.removesuffix("-alignment")
    getattr(published, maker.replace("-", "_"))(data)
    source = next(path for path in data.iterdir() if path.suffix in (".json", ".jsonl"))
    rows = read_lines(source) if source.suffix == ".jsonl" else json.loads(source.read_bytes())
    good = rows[-1] if name == "slide-instruction" else rows[0]
    strange = []
    for value in (float("nan"), 5, True, [["a.png"]], [None], {"bytes": ""}, "x" * 5000):
        strange.append({**good, "image": value})
        strange += [{**good, field: value} for field in ("id", "caption", "conversations")]
        for key in ("from", "value"):
            turn = {"from": "human", "value": "Why?", key: value}
            strange.append({**good, "conversations": [turn, *good.get("conversations", ())[1:]]})
    write_lines(data / "conversations.jsonl", [*[good] * 3, *strange])
    joined = f"{data / 'conversations.jsonl'}={data / 'quilt_1m'}"
    conversion = (
        join_sets([joined])
        if name == "join"
        else CONVERTERS.get(name)(data / "conversations.jsonl")
    )
    report = convert(conversion, tmp_path / "out", max_skipped_fraction=0.9)
    assert report["num_rows"] >= 3
    skipped = read_lines(tmp_path / "out" / "skipped_samples.jsonl")
    assert sum("image" in row["reason"] or "slide" in row["reason"] for row in skipped) >= 7


def test_missing_captions_of_pandas_are_no_captions(tmp_path: Path) -> None:
    data = published.quilt(
        tmp_path / "quilt",
    )
    table = data / "quilt_1M_lookup.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    lines += [lines[1].replace(published.CAPTION, "nan").replace("0,", "9,", 1)]
    table.write_text("\n".join(lines), encoding="utf-8")
    report, rows = run("quilt-1m", data, tmp_path / "out")
    assert report["num_skipped"] == 1 and len(rows) == 3
    data = published.pmc_oa(tmp_path / "pmc", count=12)
    with (data / "pmc_oa.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"image": "PMC100_Fig1_0.jpg", "caption": NaN}\n')
    report, rows = run("pmc-oa", data, tmp_path / "pmc_out")
    assert report["num_skipped"] == 1 and not [row for row in rows if "nan" in row["caption"]]


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    data = published.quilt(tmp_path / "data")
    table = data / "quilt_1M_lookup.csv"
    text = table.read_text(encoding="utf-8").replace(published.CAPTION, "5 \u00b5m, na\u00efve")
    table.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 0xb5\).*iconv -f latin1"):
        run("quilt-1m", data, tmp_path / "out")


def test_metadata_of_macos_is_no_image(tmp_path: Path) -> None:
    data = published.bach(tmp_path / "data")
    for folder in (data / "Photos").iterdir():
        (folder / "._no001.tif").write_bytes(b"Mac OS X")
    report = write_class_folders(CONVERTERS.get("bach")(data), tmp_path / "out")
    assert tuple(report["num_by_class"].values()) == (1, 1, 1, 1)


@pytest.mark.parametrize("form", ["list", "object"])
def test_pathcap(tmp_path: Path, form: str) -> None:
    _, rows = run("pathcap", published.pathcap(tmp_path / "data", form), tmp_path / "out")
    assert [row["image"] for row in rows] == ["0_fig.jpg", "1_fig.jpg", "2_fig.jpg"]
    assert rows[2]["caption"].endswith("Part 2.") and len({row["id"] for row in rows}) == 3


def test_openpath_pictures_are_named_after_their_posts(tmp_path: Path) -> None:
    _, rows = run("openpath", published.openpath(tmp_path / "data"), tmp_path / "out")
    assert [row["image"] for row in rows] == ["150.jpg", "151.jpg", "152.jpg"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_that_cannot_be_read_is_no_caption(tmp_path: Path, suffix: str) -> None:
    """Pictures may be named by numbers, as the rows are."""
    for number in range(12):
        save_image(tmp_path / "images" / f"{number}.jpg")
    rows = [{"image": f"{number}.jpg", "caption": published.CAPTION} for number in range(11)]
    data = tmp_path / f"captions{suffix}"
    if suffix == ".csv":
        write_csv(data, "image,caption", [tuple(row.values()) for row in rows])
        data.write_text(data.read_text() + "11.jpg\n")
    else:
        write_lines(data, rows)
        data.write_text(data.read_text() + '{"image": "11.jpg", "cap\n')
    report, rows = run("pathcap", data, tmp_path / "out")
    assert (report["num_rows"], report["num_skipped"]) == (11, 1)
    assert {row["caption"] for row in rows} == {published.CAPTION}


def test_arch_has_two_sets_and_captions_without_images(tmp_path: Path) -> None:
    data = published.arch(tmp_path / "data")
    report, rows = run("arch", data, tmp_path / "out")
    assert report["num_rows"] == 20 and report["num_skipped"] == 2
    assert rows[0]["image"] == "books_set/images/books_set-0001.png"
    assert (rows[0]["letter"], rows[-1]["subset"]) == ("Single", "pubmed_set")
    report, _ = run("arch", data / "pubmed_set", tmp_path / "one")
    assert report["num_rows"] == 10
    with pytest.raises(FileNotFoundError, match=r"no captions\.json in books_set, pubmed_set"):
        CONVERTERS.get("arch")(tmp_path)


def test_quilt_instruct_keeps_its_turns(tmp_path: Path) -> None:
    data = published.quilt_instruct(tmp_path / "data")
    report = convert(CONVERTERS.get("quilt-instruct")(data), tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "conversations.jsonl")
    assert report["num_rows"] == 3 and [check_row(row) for row in rows] == [None] * 3
    assert len(rows[0]["conversations"]) == 4
    # The image token moves to the front, wherever the file has it.
    assert rows[1]["conversations"][0]["value"] == "<image>\nDescribe."
    assert "image" not in rows[2]


def test_slide_instruction_rows_name_slides(tmp_path: Path) -> None:
    data = published.slide_instruction(tmp_path / "data")
    report = convert(CONVERTERS.get("slide-instruction")(data), tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "conversations.jsonl")
    assert (report["num_rows"], report["num_skipped"]) == (10, 1)
    assert [check_row(row, "slide") for row in rows] == [None] * 10
    assert rows[0]["slide"] == "TCGA-XX-0001-01Z-00-DX1"
    assert rows[0]["conversations"][0]["value"] == "<image>\nName the organ."
    every = CONVERTERS.get("slide-instruction")(data)
    unchecked = convert(every, tmp_path / "all", check_images=False)
    assert unchecked["num_rows"] == 11
    with pytest.raises(ValueError, match="stage=1"):
        CONVERTERS.get("slide-instruction")(data, stage="3")


def test_sets_with_their_own_image_folders_are_joined(tmp_path: Path) -> None:
    """PathVQA and PMC-VQA, on which stage 2 trains."""
    run("pathvqa", published.pathvqa(tmp_path / "pathvqa"), tmp_path / "out" / "pathvqa")
    pmc = published.pmcvqa(tmp_path / "pmc_vqa")
    run("pmc-vqa", pmc, tmp_path / "out" / "pmc")
    sets = [tmp_path / "out" / "pathvqa", tmp_path / "out" / "pmc"]
    report = convert(join_sets(sets), tmp_path / "out" / "stage2")
    rows = read_lines(tmp_path / "out" / "stage2" / "conversations.jsonl")
    assert report["image_folder"] == str(tmp_path)
    assert [row["image"] for row in rows] == [
        "pathvqa/images/train/train_0000.jpg", "pathvqa/images/train/train_0001.jpg",
        "pmc_vqa/images/PMC7_Fig1.jpg",
    ]  # fmt: skip
    assert [row["source"] for row in rows] == ["PathVQA", "PathVQA", "PMC-VQA"]
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert [check_row(row) for row in rows] == [None] * 3

    named = f"{tmp_path / 'out' / 'pmc' / 'conversations.jsonl'}={pmc / 'images'}"
    again = convert(join_sets([sets[0], named]), tmp_path / "again")
    assert again["num_rows"] == 3
    run("pmc-oa", published.pmc_oa(tmp_path / "oa"), tmp_path / "out" / "oa")
    with pytest.raises(ValueError, match=r"found conversations, pairs"):
        join_sets([sets[0], tmp_path / "out" / "oa"])
    with pytest.raises(FileNotFoundError, match=r"no conversion\.json in it"):
        join_sets([sets[0], tmp_path])
    with pytest.raises(ValueError, match="not inside"):
        join_sets(sets, pmc)
    with pytest.raises(ValueError, match="only the root of the file system"):
        join_sets(sets, "/")


def test_joined_sets_about_slides_keep_their_slides(tmp_path: Path) -> None:
    sets = []
    for name in ("first", "second"):
        data = published.slide_instruction(tmp_path / name)
        convert(CONVERTERS.get("slide-instruction")(data), tmp_path / "out" / name)
        sets.append(tmp_path / "out" / name)
    report = convert(join_sets(sets), tmp_path / "joined")
    rows = read_lines(tmp_path / "joined" / "conversations.jsonl")
    assert (report["num_rows"], report["num_skipped"]) == (20, 0)
    assert [check_row(row, "slide") for row in rows] == [None] * 20
    root = Path(report["image_folder"])
    assert all((root / f"{row['slide']}.h5").is_file() for row in rows)
    run("pathvqa", published.pathvqa(tmp_path / "pathvqa"), tmp_path / "out" / "pathvqa")
    with pytest.raises(ValueError, match="all about images or all about slides"):
        join_sets([*sets, tmp_path / "out" / "pathvqa"])


def test_joined_shards_have_different_ids(tmp_path: Path) -> None:
    """Each shard of PathVQA that is converted alone starts from the same number."""
    sets = []
    for name in ("first", "second"):
        data = published.pathvqa_parquet(tmp_path / name)
        run("pathvqa", data / "train-00000-of-00001.parquet", tmp_path / "out" / name)
        sets.append(tmp_path / "out" / name)
    convert(join_sets(sets), tmp_path / "joined")
    ids = [row["id"] for row in read_lines(tmp_path / "joined" / "conversations.jsonl")]
    assert ids[:3] == [row["id"] for row in read_lines(sets[0] / "conversations.jsonl")]
    assert ids[3:] == [f"1:{name}" for name in ids[:3]]
