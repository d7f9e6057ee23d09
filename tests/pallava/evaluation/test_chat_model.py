"""Hugging Face models and endpoints under evaluation: the same prompts, answers and resumption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pallava.evaluation.benchmarks import pathvqa
from pallava.evaluation.chat_model import ChatModel, is_hugging_face_model
from pallava.evaluation.comparison import compare, markdown
from pallava.evaluation.generation import generate_answers
from pallava.evaluation.runs import evaluate
from pathcore.chat_backends import AgentError, OpenAIBackend, Sampling
from pathcore.chat_budget import Budget
from pathcore.chat_local import LocalBackend
from tests.pallava.evaluation.tiny_benchmark import TEXTS, make_data
from tests.pallava.tiny_folders import make_folders
from tests.pallava.tiny_vlms import write_llava, write_qwen2_vl
from tests.pathgen.describer_server import DescriberServer, running_server
from xtuner_add import cli


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DescriberServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running_server() as found:
        found.write = lambda text: "Yes." if text.startswith("Is") else "liver"
        yield found


def endpoint(server: DescriberServer, folder: Path, **budget: Any) -> ChatModel:
    sampling = Sampling(8, cut_is_fault=False)
    backend = OpenAIBackend(server.url, "tiny-vlm", sampling, concurrency=2, max_retries=0)
    return ChatModel(backend, folder / "replies.sqlite", Budget(**budget))


def data(root: Path, *moods: str) -> Path:
    """PathVQA's file; the questions of `q0`, `q1`, ... end with the moods of the server."""
    path = make_data(root / "data", 6)
    rows = json.loads(path.read_text())
    for name, mood in zip(rows, moods, strict=False):
        rows[name]["question"] += f" [{mood}]"
    path.write_text(json.dumps(rows))
    return path


def test_an_endpoint_answers_and_its_refusals_are_verdicts(
    server: DescriberServer, tmp_path: Path
) -> None:
    path = data(tmp_path, "declined", "always500", "filter400", "cut")
    made, run = pathvqa(path), tmp_path / "run"
    metrics = evaluate(made, endpoint(server, run), run, batch_size=4, max_new_tokens=8)
    assert metrics is not None
    # A refusal counts as a wrong answer; what the endpoint could not do is asked again.
    assert (metrics["num_answers"], metrics["num_refused"], metrics["num_skipped"]) == (5, 2, 1)
    assert metrics["settings"]["model"] == "tiny-vlm"
    assert "secret" not in (run / "metrics.json").read_text()
    rows = [json.loads(line) for line in (run / "details.jsonl").read_text().splitlines()]
    answers = {row["question_id"]: (row["answer"], row["correct"]) for row in rows}
    assert answers["q3"][0] == "Yes."  # cut off at the maximum length, an answer all the same
    assert answers["q4"] == ("liver", 1.0) and answers["q0"] == ("", 0.0)
    content = server.bodies[0]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert server.bodies[0]["temperature"] == 0.0 and server.bodies[0]["max_tokens"] == 8

    before = server.requests.copy()
    again = evaluate(made, endpoint(server, run), run, batch_size=4, max_new_tokens=8)
    assert again is not None and again["num_refused"] == 2
    asked = server.requests - before
    assert list(asked) == [f"{TEXTS[1][0]} [always500]"]


def test_replies_that_the_provider_did_not_finish_are_no_answers(
    server: DescriberServer, tmp_path: Path
) -> None:
    path, run = data(tmp_path, "broken", "hidden", "safety"), tmp_path / "run"
    for _ in range(2):
        metrics = evaluate(pathvqa(path), endpoint(server, run), run, max_new_tokens=8)
        assert metrics is not None
        counts = [metrics[f"num_{name}"] for name in ("answers", "refused", "skipped")]
        assert counts == [4, 1, 2]
        skipped = (run / "skipped_samples.jsonl").read_text()
        assert "broke the reply off (insufficient_system_resource)" in skipped
        assert "cut off at the maximum number of tokens" in skipped
    asked = sorted(text.partition("[")[2] for text, number in server.requests.items() if number > 1)
    assert asked == ["broken]", "hidden]"], "asked again by the next run"


def test_an_endpoint_that_stops_answering_ends_the_run(
    server: DescriberServer, tmp_path: Path
) -> None:
    """Each batch is smaller than the number of silent requests that is waited for."""
    path = make_data(tmp_path / "data", 60)
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows.values()):  # longer questions are asked later
        row["question"] = "Is it?" if number < 8 else "Is it seen now? [always500]"
    path.write_text(json.dumps(rows))
    with pytest.raises(AgentError, match="25 requests in a row without a reply"):
        evaluate(pathvqa(path), endpoint(server, tmp_path), tmp_path / "run", batch_size=4)
    assert server.requests.total() < 8 + 25 + 4 + 1
    assert len((tmp_path / "run" / "answers" / "rank000.jsonl").read_text().splitlines()) == 8


def test_paid_replies_survive_the_loss_of_the_answers(
    server: DescriberServer, tmp_path: Path
) -> None:
    made, run = pathvqa(data(tmp_path)), tmp_path / "run"
    evaluate(made, endpoint(server, run), run, batch_size=4, max_new_tokens=8)
    (run / "answers" / "rank000.jsonl").unlink()
    before = server.requests.total()
    evaluate(made, endpoint(server, run), run, batch_size=4, max_new_tokens=8)
    assert server.requests.total() == before == 6
    # The same text with another id is asked again: an audit measures the noise so.
    one = made.questions.questions[0]
    twice = [one, one.variant("again")]
    generate_answers(endpoint(server, run), twice, run / "answers", max_new_tokens=8)
    assert server.requests.total() == before + 1


def test_the_cost_ceiling_leaves_questions_for_later(
    server: DescriberServer, tmp_path: Path
) -> None:
    made, run = pathvqa(data(tmp_path)), tmp_path / "run"
    model = endpoint(server, run, price_in=1.0, price_out=1.0, max_cost=0.0035, image_tokens=3000)
    metrics = evaluate(made, model, run, batch_size=8, max_new_tokens=8)
    assert metrics is not None
    assert 0 < metrics["num_answers"] < 6
    assert metrics["num_answers"] + metrics["num_skipped"] == 6
    assert "budget is exhausted" in (run / "skipped_samples.jsonl").read_text()


def test_a_refused_key_ends_the_run(server: DescriberServer, tmp_path: Path) -> None:
    server.refuse = 401
    with pytest.raises(AgentError, match="tiny-vlm at http"):
        evaluate(pathvqa(data(tmp_path)), endpoint(server, tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="requires a cache_path"):
        ChatModel(endpoint(server, tmp_path).backend)


def test_models_of_every_kind_are_measured_in_one_way(
    server: DescriberServer, llava_folder: Path, tmp_path: Path
) -> None:
    """PA-LLaVA in parts, stock models of transformers, an endpoint, and the comparison."""
    path, folders = data(tmp_path), make_folders(tmp_path / "parts")
    parts = [folders / "llama", "--llava", folders / "llava", "--visual-encoder", folders / "plip"]
    models = {
        "ours": [*parts, "--device", "cpu"],
        "llava": [llava_folder, "--device", "cpu"],
        "qwen": [write_qwen2_vl(tmp_path / "qwen2_vl"), "--device", "cpu"],
        "endpoint": ["--endpoint", server.url, "--model", "tiny-vlm"],
    }
    for name, arguments in models.items():
        result = CliRunner().invoke(
            cli.main,
            ["evaluate", "pathvqa", *map(str, arguments), "--data", str(path),
             "--work-dir", str(tmp_path / name), "--max-new-tokens", "4"],
        )  # fmt: skip
        assert result.exit_code == 0, (name, result.output)
    beams = ["--decoding", "temperature=0.9,num_beams=2", "--work-dir", str(tmp_path / "beams")]
    arguments = ["evaluate", "pathvqa", *map(str, models["llava"]), "--data", str(path), *beams]
    result = CliRunner().invoke(cli.main, [*arguments, "--max-new-tokens", "4"])
    assert result.exit_code == 0 and "'num_beams': 2" in result.output, result.output
    settings = json.loads((tmp_path / "llava" / "metrics.json").read_text())["settings"]
    assert settings["model"].startswith("model@") and settings["endpoint"] == "local"
    runs = [f"{name}={tmp_path / name}" for name in models]
    output = tmp_path / "comparison.json"
    result = CliRunner().invoke(cli.main, ["compare-scores", *runs, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "difference from ours" in result.output
    found = json.loads(output.read_text())
    assert found["num_questions"] == 6 and found["num_clusters"] == 4
    scores = found["models"]["endpoint"]
    assert scores["correct"]["value"] == pytest.approx(100 * 4 / 6)
    gap = scores["difference"]
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert scores["gains"] - scores["loses"] == pytest.approx(gap["value"] * 6 / 100)


def test_files_of_a_run_hold_no_secrets_of_the_address(
    server: DescriberServer, tmp_path: Path
) -> None:
    address = server.url.replace("//", "//user:password@") + "?key=hidden"
    arguments = ["--endpoint", address, "--model", "tiny-vlm", "--data", str(data(tmp_path))]
    run = tmp_path / "run"
    arguments = ["evaluate", "pathvqa", *arguments, "--work-dir", str(run)]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((run / "run.json").read_text())["arguments"]
    assert found["endpoint"] == server.url and found["model"] == "tiny-vlm"
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(word in content for word in (b"password", b"hidden", b"secret")), path


def test_answers_belong_to_the_data_type_of_the_weights(llava_folder: Path) -> None:
    def settings(dtype: str) -> dict[str, Any]:
        return ChatModel(LocalBackend(str(llava_folder), device="cpu", dtype=dtype)).settings

    assert settings("auto") == settings("float32") != settings("bfloat16")
    assert settings("bfloat16")["dtype"] == "bfloat16"


def test_only_evaluations_of_the_same_questions_are_compared(tmp_path: Path) -> None:
    def finished(
        name: str, benchmark: str, rows: dict[str, float], reference: str = "A", ask: str = "Which?"
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"benchmark": benchmark}))
        lines = [
            json.dumps({"question_id": key, "cluster": key[0], "reference": reference,
                        "question": f"{ask} {key}", "correct": value})
            for key, value in rows.items()
        ]  # fmt: skip
        (folder / "details.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    one = finished("one", "pathmmu", {"a1": 1.0, "a2": 1.0, "b1": 0.0, "c1": 1.0})
    two = finished("two", "pathmmu", {"a1": 0.0, "a2": 0.0, "b1": 0.0})
    found = compare({"one": one, "two": two})
    assert found["not_shared"] == {"one": 1, "two": 0}
    gap = found["models"]["two"]["difference"]
    assert gap["value"] == pytest.approx(-200 / 3)
    assert (gap["low"], gap["high"]) == (-100, 0)  # two images only
    assert found["worded_differently"] == [] and "worded" not in markdown(found)
    other = finished("other", "pathmmu", {"a2": 1.0, "b1": 1.0}, ask="Which one?")
    found = compare({"one": one, "two": two, "other": other})
    assert found["worded_differently"] == ["a2", "b1"]
    assert "2 of these questions were worded differently" in markdown(found)
    with pytest.raises(ValueError, match="one: pathmmu, three: pathvqa"):
        compare({"one": one, "three": finished("three", "pathvqa", {"a1": 1.0})})
    with pytest.raises(ValueError, match="different versions of the data"):
        compare({"one": one, "four": finished("four", "pathmmu", {"a1": 1.0}, "B")})
    with pytest.raises(ValueError, match="no question was asked to all"):
        compare({"one": one, "five": finished("five", "pathmmu", {"z": 1.0})})
    with pytest.raises(FileNotFoundError, match=r"is .* a finished evaluation"):
        compare({"one": one, "six": tmp_path})


@pytest.mark.parametrize(
    "given",
    [
        ["--prompt-template", "vicuna"],
        ["--bos", "double"],
        ["--compat", "original"],
        ["--visual-select-layer", "-1"],
    ],
)
def test_options_of_pallava_are_refused_for_other_models(
    given: list[str], llava_folder: Path, tmp_path: Path
) -> None:
    ending = ["--data", str(tmp_path), "--work-dir", str(tmp_path / "run"), *given]
    result = CliRunner().invoke(cli.main, ["evaluate", "pathvqa", str(llava_folder), *ending])
    assert result.exit_code == 2, result.output
    assert f"a Hugging Face model takes no {given[0]}; omit it" in result.output
    arguments = ["--endpoint", "http://localhost/v1", "--model", "x", *ending]
    result = CliRunner().invoke(cli.main, ["evaluate", "pathvqa", *arguments])
    assert result.exit_code == 2, result.output
    assert f"an endpoint takes no {given[0]}; omit it" in result.output


@pytest.mark.parametrize(
    "given", [["--max-cost", "1"], ["--concurrency", "2"], ["--model", "x"], ["--timeout", "9"]]
)
def test_options_of_endpoints_are_refused_for_local_models(given: list[str]) -> None:
    arguments = ["evaluate", "pathvqa", "absent", "--data", "absent.json", *given]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2, result.output
    assert f"a model on this machine takes no {given[0]}; omit it" in result.output


@pytest.mark.parametrize("given", [["--torch-dtype", "bf16"], ["--device", "cpu"]])
def test_options_of_local_models_are_refused_for_endpoints(given: list[str]) -> None:
    arguments = ["evaluate", "pathvqa", "--endpoint", "http://localhost/v1", "--model", "x"]
    result = CliRunner().invoke(cli.main, [*arguments, "--data", "absent.json", *given])
    assert result.exit_code == 2, result.output
    assert f"an endpoint takes no {given[0]}; omit it" in result.output


def test_concurrency_is_not_limited_by_the_batch_size(
    server: DescriberServer, tmp_path: Path
) -> None:
    path = data(tmp_path, *["slow"] * 6)
    arguments = ["--endpoint", server.url, "--model", "tiny-vlm", "--data", str(path)]
    sizes = ["--batch-size", "1", "--concurrency", "6", "--work-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.main, ["evaluate", "pathvqa", *arguments, *sizes])
    assert result.exit_code == 0, result.output
    assert 1 < server.most_running <= 6


def test_kinds_of_models_are_told_apart(llava_folder: Path, tmp_path: Path) -> None:
    folders = make_folders(tmp_path)
    assert is_hugging_face_model(str(llava_folder))
    assert not is_hugging_face_model(str(folders / "llama"))
    assert not is_hugging_face_model(str(tmp_path / "absent"))


def test_slides_need_a_model_of_slides(
    server: DescriberServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "12.h5").write_bytes(b"features")
    columns = "Slide,Task,Question,A,B,Answer\n"
    (tmp_path / "SlideBench-VQA-BCNB.csv").write_text(f"{columns}12,ER,ER status?,yes,no,A\n")
    result = CliRunner().invoke(
        cli.main,
        ["evaluate", "slidebench-bcnb", "--endpoint", server.url, "--model", "tiny-vlm",
         "--data", str(tmp_path), "--work-dir", str(tmp_path / "run")],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "1 questions are about tile features of slides" in result.output
    assert "overview pictures" in result.output
    result = CliRunner().invoke(cli.main, ["evaluate", "pathvqa", "--data", str(tmp_path)])
    assert result.exit_code == 2 and "expected either MODEL, or --endpoint" in result.output
