"""Whole evaluations of the recorded model: batched, resumed, reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pallava import load_model
from pallava.evaluation import generation, image_digests
from pallava.evaluation.answers import AnswerLog, read_answers
from pallava.evaluation.audit import read_audits
from pallava.evaluation.benchmarks import pathvqa, pmc_vqa, zero_shot
from pallava.evaluation.generation import (
    answer_digests,
    generate_answers,
    image_identities,
    make_batches,
)
from pallava.evaluation.image_digests import ImageDigests, content_digest
from pallava.evaluation.models import NoAnswer
from pallava.evaluation.report import read_scores, write_report
from pallava.evaluation.runs import evaluate
from pallava.evaluation.scoring import score_vqa
from pallava.inference.assistant import Assistant
from pallava.records.questions import NO_IMAGES, Question
from pallava.registry import EVALUATIONS
from pallava.skipping import SkippedSample
from pathcore import files
from pathcore.files import FolderInUseError
from tests.pallava import goldens
from tests.pallava.evaluation.scripted_model import ScriptedModel
from tests.pallava.evaluation.tiny_benchmark import TEXTS, make_data
from tests.pallava.tiny_folders import make_folders

TOKENS = 6
REPORT = ("pathvqa_result.json", "metrics.json", "metrics.md", "details.jsonl")


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    root = make_folders(tmp_path_factory.mktemp("model"), goldens.CROSSATTN_STATE)
    return load_model(root / "llama", root / "llava", root / "plip", device="cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


def run(assistant: Assistant, data: Path, work_dir: Path, **changes: Any) -> dict[str, Any]:
    settings = {"batch_size": 4, "max_new_tokens": TOKENS} | changes
    metrics = evaluate("pathvqa", assistant, work_dir, data=data, **settings)
    assert metrics is not None
    return metrics


def test_a_benchmark_by_name_needs_its_data_and_a_known_name(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="unknown evaluation 'pathvqua'; did you mean pathvqa"):
        evaluate("pathvqua", assistant, tmp_path / "out", data=data)
    with pytest.raises(ValueError, match="'pathvqa': expected its data"):
        evaluate("pathvqa", assistant, tmp_path / "out")
    with pytest.raises(ValueError, match="belong to a benchmark given by name"):
        evaluate(pathvqa(data), assistant, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def report(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in REPORT}


def test_batches_answer_as_questions_do_alone(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    run(assistant, data, tmp_path / "together")
    found = read_answers(tmp_path / "together" / "pathvqa_result.json")[0]
    questions = pathvqa(data).questions.questions
    assert list(found) == [question.id for question in questions]
    for question in questions:
        assert question.image is not None
        alone = assistant.answer(question.image.load(), question.text, max_new_tokens=TOKENS)
        assert found[question.id] == alone
    assert len(set(found.values())) > 3


def test_a_report_holds_scores_and_intervals(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    metrics = run(assistant, data, tmp_path / "run")
    on_disk = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert on_disk == json.loads(json.dumps(metrics))
    assert metrics["num_questions"] == metrics["num_answers"] == 11
    assert metrics["scores"]["open"]["count"] == 7
    score = metrics["scores"]["open"]["token f1"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100
    assert set(metrics["published"]) == {"exact", "token recall"}
    tables = (tmp_path / "run" / "metrics.md").read_text()
    assert "| open | BLEU-4 |" in tables
    assert tables.index("## Scores") < tables.index("original's tools")
    details = (tmp_path / "run" / "details.jsonl").read_text().splitlines()
    assert len(details) == 11
    assert str(tmp_path) not in tables + json.dumps(on_disk)


class Counted:
    """Counts what reaches the model, which stays the real one."""

    def __init__(self, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        original = assistant.answer_encoded

        def counted(prompts: Any, pixels: Any, **kwargs: Any) -> list[str]:
            self.batches.append(len(prompts))
            return original(prompts, pixels, **kwargs)

        monkeypatch.setattr(assistant, "answer_encoded", counted)


def test_nothing_is_asked_twice(
    assistant: Assistant, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(assistant, monkeypatch)
    run(assistant, data, tmp_path / "run")
    assert counted.batches == [4, 4, 3]
    first = report(tmp_path / "run")
    run(assistant, data, tmp_path / "run")
    assert counted.batches == [4, 4, 3]
    assert report(tmp_path / "run") == first


def test_a_torn_line_is_asked_again_with_its_neighbours(
    assistant: Assistant, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(assistant, data, tmp_path / "run")
    first = report(tmp_path / "run")
    file = tmp_path / "run" / "answers" / "rank000.jsonl"
    content = file.read_bytes()
    counted = Counted(assistant, monkeypatch)
    for cut in (2, 30, len(content) // 2, len(content) - 5, len(content)):
        file.write_bytes(content[: len(content) - cut])
        counted.batches.clear()
        run(assistant, data, tmp_path / "run")
        assert counted.batches[-1] in (3, 4)  # whole batches: neighbours stay the same
        assert report(tmp_path / "run") == first
        answered = [json.loads(line)["question_id"] for line in file.read_text().splitlines()
                    if line.endswith("}")]  # fmt: skip
        assert len(set(answered)) == 11


def test_another_prompt_or_picture_is_asked_anew(
    assistant: Assistant, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(assistant, data, tmp_path / "run")
    counted = Counted(assistant, monkeypatch)
    rows = json.loads(data.read_text())
    rows["q0"]["question"] = "Is necrosis shown?"
    data.write_text(json.dumps(rows))
    run(assistant, data, tmp_path / "run")
    assert sum(counted.batches) in (3, 4)
    counted.batches.clear()
    run(assistant, data, tmp_path / "run", max_new_tokens=TOKENS - 1)
    assert sum(counted.batches) == 11


def bitmaps(root: Path, num_images: int = 6, side_px: int = 40) -> Path:
    """Uncompressed pictures: all files have one size, whatever is in them."""
    (root / "images").mkdir(parents=True)
    rows = {}
    for number in range(num_images):
        pixels = np.random.default_rng(number).integers(0, 256, (side_px, side_px, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.bmp")
        rows[f"q{number}"] = {"question": "What?", "image": f"{number}.bmp", "answer": "liver"}
    path = root / "test.json"
    path.write_text(json.dumps(rows))
    return path


def swap_by_content(first: Path, second: Path) -> None:
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def swap_by_content_keeping_times(first: Path, second: Path) -> None:
    times = [(path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (first, second)]
    swap_by_content(first, second)
    for path, both in zip((first, second), times, strict=True):
        os.utime(path, ns=both)


def swap_by_name(first: Path, second: Path) -> None:
    first.rename(first.with_suffix(".tmp"))
    second.rename(first)
    first.with_suffix(".tmp").rename(second)


@pytest.mark.parametrize(
    "swap", [swap_by_content, swap_by_content_keeping_times, swap_by_name], ids=lambda f: f.__name__
)
def test_swapped_pictures_of_one_size_are_asked_anew(
    assistant: Assistant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path, Path], None],
) -> None:
    data = bitmaps(tmp_path / "data")
    images = sorted((data.parent / "images").iterdir())
    assert len({path.stat().st_size for path in images}) == 1
    for path in images:  # as archives are unpacked: one time for all
        os.utime(path, (1_600_000_000, 1_600_000_000))
    run(assistant, data, tmp_path / "run", batch_size=1)
    counted = Counted(assistant, monkeypatch)
    swap(images[1], images[4])
    run(assistant, data, tmp_path / "run", batch_size=1)
    assert counted.batches == [1, 1]
    run(assistant, data, tmp_path / "fresh", batch_size=1)
    assert report(tmp_path / "run") == report(tmp_path / "fresh")
    # The same picture under another name, or touched, is still the same picture.
    counted.batches.clear()
    images[2].touch()
    rows = json.loads(data.read_text())
    images[3].rename(images[3].with_name("moved.bmp"))
    rows["q3"]["image"] = "moved.bmp"
    data.write_text(json.dumps(rows))
    run(assistant, data, tmp_path / "run", batch_size=1)
    assert counted.batches == []


def test_pictures_are_digested_once_while_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, cache = tmp_path / "a.bmp", tmp_path / "cache" / "digests.json"
    picture.write_bytes(b"one")
    read: list[Path] = []
    original = image_digests.content_digest

    def counted(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(image_digests, "content_digest", counted)
    now = time.time()
    monkeypatch.setattr(image_digests.time, "time", lambda: now + 3600)  # long after the change
    digests = ImageDigests(cache)
    first = digests(picture)
    assert digests(picture) == first
    digests.save()
    assert ImageDigests(cache)(picture) == first
    assert len(read) == 1
    cache.write_text('{"cut off by')
    assert ImageDigests(cache)(picture) == first
    assert len(read) == 2


def test_a_digest_taken_within_the_clock_of_a_change_is_not_kept(tmp_path: Path) -> None:
    """A second change in the same tick of the file system's clock would not be seen."""
    picture, cache = tmp_path / "a.bmp", tmp_path / "digests.json"
    picture.write_bytes(b"one")
    digests = ImageDigests(cache)
    digests(picture)
    digests.save()
    assert json.loads(cache.read_text()) == {}


def test_a_picture_that_vanished_is_skipped_and_the_others_answered(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    benchmark = pathvqa(data)
    (data.parent / "images" / "tall_3.png").unlink()  # after the questions were read
    metrics = evaluate(benchmark, assistant, tmp_path / "run", max_new_tokens=TOKENS)
    assert metrics is not None
    assert (metrics["num_answers"], metrics["num_skipped"]) == (8, 3)


def test_digests_depend_on_all_that_answers_depend_on(assistant: Assistant, data: Path) -> None:
    questions = pathvqa(data).questions.questions
    images = image_identities(questions, content_digest)
    first = answer_digests(assistant, questions, 6, images)
    assert answer_digests(assistant, questions, 6, images) == first
    assert not set(answer_digests(assistant, questions, 7, images).values()) & set(first.values())
    double = Assistant(
        assistant.model, assistant.tokenizer, assistant.anyres, bos="double",
        fingerprint=assistant.fingerprint,
    )  # fmt: skip
    assert not set(answer_digests(double, questions, 6, images).values()) & set(first.values())


def test_a_damaged_picture_is_skipped_and_said(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    picture = data.parent / "images" / "tall_3.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    metrics = run(assistant, data, tmp_path / "run")
    assert (metrics["num_answers"], metrics["num_skipped"]) == (8, 3)
    skipped = (tmp_path / "run" / "skipped_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in skipped] == ["q1", "q5", "q9"]
    picture.write_bytes(whole)
    assert run(assistant, data, tmp_path / "run")["num_skipped"] == 0
    assert not (tmp_path / "run" / "skipped_samples.jsonl").exists()


def test_batches_are_cut_from_the_whole_list(data: Path) -> None:
    questions = pathvqa(data).questions.questions
    batches = make_batches(questions, 4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert {q.id for batch in batches for q in batch} == {q.id for q in questions}
    lengths = [len(q.text) for batch in batches for q in batch]
    assert lengths == sorted(lengths)


def test_compat_puts_the_published_scores_first(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    run(assistant, data, tmp_path / "run", compat="original")
    tables = (tmp_path / "run" / "metrics.md").read_text()
    assert tables.index("original's tools") < tables.index("## Scores")


@pytest.mark.parametrize("name", ["mixed", "no_number_type"])
def test_a_report_of_recorded_answers_holds_the_recorded_scores(tmp_path: Path, name: str) -> None:
    benchmark = pathvqa(goldens.GOLDEN / "eval" / f"{name}_gt.json", NO_IMAGES)
    answers = read_answers(goldens.GOLDEN / "eval" / f"{name}_pred.json")[0]
    metrics = write_report(benchmark, answers, [], tmp_path, tokenizer=goldens.tokenizer())
    expected = goldens.read_json(f"eval/{name}_expected_exact.json")["accuracy"]
    assert metrics["published"]["exact"] == expected
    if name == "mixed":
        recall = goldens.read_json("eval/mixed_expected_recall.json")["accuracy"]
        assert metrics["published"]["token recall"] == recall
    # "No, it is not." is a no, "the liver" is the liver; "2" is not "two".
    ours = metrics["scores"]["overall"]["correct"]["value"]
    assert ours > expected["overall"]
    assert metrics["scores"]["closed (yes/no)"]["accuracy"]["value"] == 100


def test_an_audit_shares_the_answers_of_the_run(
    assistant: Assistant, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(assistant, data, tmp_path / "run")
    first = report(tmp_path / "run")
    counted = Counted(assistant, monkeypatch)
    run(assistant, data, tmp_path / "run", audited=True)
    # Exchanged, no and blank image, asked again, and three prompts.
    assert counted.batches == [4, 4, 3] * 7
    assert report(tmp_path / "run") == first
    names = ("audit.json", "audit.jsonl", "audit.html")
    written = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    content = json.loads(written["audit.json"])
    assert set(content["parts"]) == {"yes/no", "open"}
    assert content["missing"] == {}
    # Decoding is greedy, and other neighbours in the batch change nothing in fp32.
    assert content["parts"]["open"]["repeat"]["answers that change"]["value"] == 0
    assert written["audit.html"].count(b"data:image/jpeg;base64,") == 8

    answers = tmp_path / "run" / "answers" / "rank000.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-20]))  # interrupted in the last two arms
    counted.batches.clear()
    run(assistant, data, tmp_path / "run", audited=True)
    assert counted.batches == [4, 4, 3] * 2
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == written


def test_a_verdict_belongs_to_its_model(assistant: Assistant, data: Path, tmp_path: Path) -> None:
    run(assistant, data, tmp_path / "run", audited=True)
    metrics = tmp_path / "run" / "metrics.json"
    found = read_audits([metrics])
    assert set(found["pathvqa"]) == {"yes/no", "open"}
    assert found["pathvqa"]["yes/no"].startswith("No fault shown. Undecided with 4 questions: ")
    run(assistant, data, tmp_path / "run", max_new_tokens=TOKENS - 1)
    with pytest.raises(ValueError, match=r"audit\.json: expected the settings of metrics\.json"):
        read_audits([metrics])


def test_a_model_card_takes_the_scores_of_runs(
    assistant: Assistant, data: Path, tmp_path: Path
) -> None:
    run(assistant, data, tmp_path / "run")
    by_hand = tmp_path / "mine.json"
    by_hand.write_text('{"BACH": {"accuracy": 0.5}}')
    scores = read_scores([tmp_path / "run" / "metrics.json", by_hand])
    assert scores["BACH"] == {"accuracy": 0.5}
    assert scores["pathvqa"]["overall, count"] == "11"
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", scores["pathvqa"]["overall, correct"])
    by_hand.write_text("[1]")
    with pytest.raises(ValueError, match=r"mine\.json: expected metrics\.json of an evaluation"):
        read_scores([by_hand])


def test_letters_and_classes_are_reported(tmp_path: Path) -> None:
    rows = goldens.read_json("eval/pmc_labels.json")
    data = tmp_path / "pmc.json"
    data.write_text(
        json.dumps({k: v | {"question": "Which?", "image": "x"} for k, v in rows.items()})
    )
    answers = read_answers(goldens.GOLDEN / "eval" / "pmc_pred.json")[0]
    metrics = write_report(pmc_vqa(data, NO_IMAGES), answers, [], tmp_path / "pmc")
    assert metrics["published"]["pa-llava"] == {"correct": 3, "wrong": 3, "accuracy": 50.0}
    assert metrics["scores"]["letters"]["accuracy"]["value"] == 100
    assert "## Confusion" in (tmp_path / "pmc" / "metrics.md").read_text()

    labels = goldens.GOLDEN / "eval" / "f1_labels.json"
    data.write_text(
        json.dumps(
            {key: {"question": "Which?", "image": "x"} for key in json.loads(labels.read_text())}
        )
    )
    answers = read_answers(goldens.GOLDEN / "eval" / "f1_pred.jsonl")[0]
    benchmark = zero_shot(data, NO_IMAGES, classes="oscc", labels=labels)
    metrics = write_report(benchmark, answers, [], tmp_path / "f1")
    printed = goldens.read_json("eval/f1_expected.json")["stdout"]
    assert metrics["published"]["report"] in printed
    assert f"macro-f1 =  {metrics['published']['macro_f1']}\n" in printed
    assert metrics["scores"]["classes"]["macro f1"]["value"] == pytest.approx(73.3333)
    answers["s2"] = "It is a carcinoma."  # the published tool ends with a KeyError
    metrics = write_report(benchmark, answers, [], tmp_path / "f1")
    assert metrics["scores"]["classes"]["accuracy"]["value"] == 75
    assert "accepts only" in metrics["published"]["error"]


def test_answers_without_references_are_written_unscored(tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    data.write_text(json.dumps({"a": {"question": "Which?", "image": "x"}}))
    metrics = write_report(zero_shot(data, NO_IMAGES), {"a": "fat"}, [], tmp_path / "run")
    assert "scores" not in metrics
    assert "nothing was scored" in (tmp_path / "run" / "metrics.md").read_text()


def test_questions_about_one_image_give_no_interval(tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    rows = {name: {"question": f"Is it {name}?", "image": "x", "answer": "yes"} for name in "ab"}
    data.write_text(json.dumps(rows))
    answers = {"a": "yes", "b": "no"}
    metrics = write_report(pathvqa(data, NO_IMAGES), answers, [], tmp_path / "one")
    assert metrics["scores"]["overall"]["correct"] == {"value": 50.0}
    assert "| overall | correct | 50.00 |" in (tmp_path / "one" / "metrics.md").read_text()
    rows["b"]["image"] = "y"
    data.write_text(json.dumps(rows))
    metrics = write_report(pathvqa(data, NO_IMAGES), answers, [], tmp_path / "two")
    assert metrics["scores"]["overall"]["correct"] == {"value": 50.0, "low": 0.0, "high": 100.0}


def test_a_run_without_any_answer_says_so(tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    data.write_text(json.dumps({"a": {"question": "Why?", "image": "x", "answer": "yes"}}))
    skipped = [SkippedSample("a", "x", "timeout")]
    write_report(pathvqa(data, NO_IMAGES), {}, skipped, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.md").read_text()
    assert "No question has an answer: nothing was scored." in text


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    benchmark = pathvqa(goldens.GOLDEN / "eval" / "mixed_gt.json", NO_IMAGES)
    with pytest.raises(ValueError, match="belong to no question"):
        write_report(benchmark, {"zz": "yes"}, [], tmp_path)


def test_an_unreadable_answer_is_wrong_whatever_the_reference() -> None:
    question = Question("q", "Left or right?", None, "left", answer_type="yes/no")
    table = score_vqa([question], {"q": "right"})
    closed = table["scores"]["closed (yes/no)"]
    assert (closed["accuracy"]["value"], closed["neither yes nor no"]) == (0, 1)


def test_questions_without_an_answer_are_wrong_unless_they_are_not_to_count(
    tmp_path: Path,
) -> None:
    rows = {
        f"q{i}": {"question": "Is it?", "image": "x", "answer": "yes", "answer_type": "yes/no",
                  "question_type": "other"}
        for i in range(10)
    }  # fmt: skip
    data = tmp_path / "test.json"
    data.write_text(json.dumps(rows))
    benchmark = pathvqa(data, NO_IMAGES)
    answers = {"q0": "yes", "q1": "no"}
    metrics = write_report(benchmark, answers, [], tmp_path / "wrong")
    assert metrics["num_missing"] == 8
    assert metrics["scores"]["closed (yes/no)"]["accuracy"]["value"] == 10
    assert "8 missing (counted as wrong)" in (tmp_path / "wrong" / "metrics.md").read_text()
    assert metrics["published"]["exact"]["overall"] == 10
    metrics = write_report(benchmark, answers, [], tmp_path / "skip", missing="skip")
    assert metrics["num_missing"] == 8
    assert metrics["scores"]["closed (yes/no)"]["accuracy"]["value"] == 50
    assert "8 missing (not counted)" in (tmp_path / "skip" / "metrics.md").read_text()
    unreadable = [SkippedSample(f"q{i}", "x", "truncated") for i in range(2, 10)]
    metrics = write_report(benchmark, answers, unreadable, tmp_path / "images")
    assert (metrics["num_missing"], metrics["num_skipped"]) == (0, 8)
    assert metrics["scores"]["closed (yes/no)"]["accuracy"]["value"] == 50


def test_a_second_run_in_one_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_PATIENCE_S", 0.1)
    folder = tmp_path / "run" / "answers"
    with AnswerLog(folder, rank=0) as log:
        log.append({"q": ("0af3", "yes")})
        with pytest.raises(FolderInUseError, match=r"run: another process is working"):
            AnswerLog(folder, rank=0).__enter__()
        with AnswerLog(folder, rank=1):  # another process of the same run
            pass
    with AnswerLog(folder, rank=0) as again:
        assert again.read({"q": "0af3"}) == ({"q": "yes"}, {})


def test_answers_by_position_are_told_from_answers_by_id(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    file.write_text('[{"answer": "yes"}, {"question_id": "7", "answer": "no"}]')
    assert read_answers(file) == ({"0": "yes", "7": "no"}, 1)
    file.write_text('[{"question_id": "7", "answer": "\\ud800"}]')
    with pytest.raises(ValueError, match=r"answers\.json, '7': the answer holds half a surrogate"):
        read_answers(file)
    file.write_text('{"0": {"answer": "yes"}, "1": "no"}')
    assert read_answers(file) == ({"0": "yes", "1": "no"}, 0)
    file = file.with_suffix(".jsonl")  # of a run that was killed while it wrote
    file.write_text('{"question_id": "0", "answer": "yes"}\n{"question_id": "1", "ans')
    with pytest.raises(ValueError, match="'1': no JSON: Unterminated string"):
        read_answers(file)


def test_built_in_benchmarks_have_names() -> None:
    assert {"pathvqa", "pmc-vqa", "zero-shot"} <= set(EVALUATIONS.names())


def test_a_batch_size_below_one_is_refused(assistant: Assistant, data: Path) -> None:
    questions = pathvqa(data).questions.questions
    with pytest.raises(ValueError, match="batch size"):
        generate_answers(assistant, questions, data.parent, batch_size=0)


def test_logs_of_other_processes_are_read(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0) as log:
        log.append({"a": ("1", "yes"), "b": ("2", "line\nbreak \u2028 end")})
    with AnswerLog(tmp_path, 1) as log:
        log.append({"c": ("3", "no"), "a": ("old", "never")})
    found = AnswerLog(tmp_path, 5).read({"a": "1", "b": "2", "c": "3", "d": "4"})
    assert found == ({"a": "yes", "b": "line\nbreak \u2028 end", "c": "no"}, {})
    assert generation._is_done([], found[0])
    shutil.rmtree(tmp_path)


def test_a_refusal_is_kept_and_an_outage_is_asked_again(data: Path, tmp_path: Path) -> None:
    def reply(text: str, image: Any, number: int) -> str | NoAnswer:
        assert isinstance(image, Image.Image)
        if text == "What?":
            return NoAnswer("I will not.", is_refusal=True)
        return NoAnswer("timeout") if text.startswith("How") and number == 1 else "Yes."

    model = ScriptedModel(reply)
    metrics = evaluate(pathvqa(data), model, tmp_path, batch_size=4)
    assert metrics is not None
    assert (metrics["num_answers"], metrics["num_refused"], metrics["num_skipped"]) == (8, 4, 3)
    assert metrics["scores"]["open"]["count"] == 4  # refusals count, outages do not
    assert "4 refused" in (tmp_path / "metrics.md").read_text()
    details = [json.loads(row) for row in (tmp_path / "details.jsonl").read_text().splitlines()]
    assert {row.get("refusal") for row in details} == {None, "I will not."}
    num_asked = len(model.asked)
    again = evaluate(pathvqa(data), model, tmp_path, batch_size=4)
    assert again is not None
    assert (again["num_answers"], again["num_refused"], again["num_skipped"]) == (11, 4, 0)
    # Neighbours do not matter to this model, so only the questions without an answer are asked.
    assert model.asked[num_asked:] == [TEXTS[2][0]] * 3


def test_variants_share_the_answers_of_the_folder(data: Path, tmp_path: Path) -> None:
    questions = pathvqa(data).questions.questions
    model = ScriptedModel(lambda text, image, number: f"{text} {image and image.size}")
    first = generate_answers(model, questions, tmp_path)
    blind = [question.variant("no image", image=None) for question in questions]
    both = generate_answers(model, [*questions, *blind], tmp_path)
    assert first is not None and both is not None
    assert len(model.asked) == 22
    assert both.answers["q0"] == first.answers["q0"] != both.answers["q0 [no image]"]
    assert [question.cluster for question in blind] == [question.cluster for question in questions]
