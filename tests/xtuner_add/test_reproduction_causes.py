"""`reproduce` names the planted cause: prompt, scoring, decoding, resize, subset, template."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from tests.fake_server import FakeServer, running
from tests.pallava.evaluation.tiny_benchmark import make_data
from tests.pallava.tiny_folders import make_folders
from xtuner_add import cli

NUM_TEST, NUM_TINY = 40, 20


class Reader(FakeServer):
    """A model whose number of right answers depends on how it is asked."""

    def reply(self, key: str, number: int) -> tuple[int, Any]:
        del number
        body = json.loads(key)
        image, text = body["messages"][-1]["content"]
        question = int(re.search(r"case (\d+)", text["text"])[1])  # type: ignore[index]
        encoded = base64.b64decode(image["image_url"]["url"].split(",")[1])
        width, height = Image.open(io.BytesIO(encoded)).size
        right = 12
        if "given choices directly" not in text["text"]:
            right = 20
        elif body["temperature"] > 0:
            right = 28
        elif width == height:
            right = 34
        said = "B" if question < right or question >= NUM_TEST else "C"
        if question >= NUM_TEST - 4 and said == "C":
            said = "C B"  # two letters: unreadable here, the last one for the published parser
        return 200, {
            "choices": [
                {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 1},
        }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running(Reader()) as found:
        yield found


def write_pathmmu(folder: Path) -> Path:
    """`data.json` as published: 40 questions in `test`, 20 others in `test_tiny`."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(NUM_TEST + NUM_TINY):
        name = hashlib.sha256(str(number).encode()).hexdigest() + ".png"
        Image.new("RGB", (40, 20), (number, 0, 0)).save(folder / "images" / name)
        rows.append(
            {"No": number, "img": name, "question": f"What does case {number} show?",
             "options": ["A) fibrosis", "B) oedema", "C) mucin"], "answer": "B) oedema",
             "explanation": ""}
        )  # fmt: skip
    content = {"PubMed": {"test": rows[:NUM_TEST], "test_tiny": rows[NUM_TEST:]}}
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json"


def attributed(card: Path, inputs: dict[str, str], out: Path, figure: float) -> dict[str, Any]:
    given = [f"{name}={value}" for name, value in inputs.items()]
    result = CliRunner().invoke(
        cli.main,
        ["reproduce", str(card), *given, "--published", str(figure), "--work-dir", str(out)],
    )
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((out / "reproduction.json").read_text())
    return report


def test_each_planted_cause_is_named(server: Reader, tmp_path: Path) -> None:
    shipped = Path(cli.__file__).parent / "reproduction_cards/pathmmu-gpt-4v.yml"
    content = yaml.safe_load(shipped.read_text())
    letters = "metrics.json:scores > letters > accuracy > value"
    content |= {
        "tolerance": 0.5,
        "choices": {
            "scoring": {"ours": [], "published": {"figure": "metrics.json:published > pathmmu > "
                                                            "accuracy"}},
            "prompt": {"llava": ["--option", "prompt=pathmmu-llava"],
                       "letter": ["--option", "prompt=letter"]},
            "decoding": {"greedy": [], "sampled": ["--decoding", "temperature=0.9"]},
            "resize": {"as they are": [], "squashed": ["--image-resize", "squash:16"]},
            "subset": {"test": ["--option", "split=test"], "all": ["--option", "split=all"]},
        },
    }  # fmt: skip
    assert content["figure"] == letters
    card = tmp_path / "card.yml"
    card.write_text(yaml.safe_dump(content, sort_keys=False))
    inputs = {"model": "reader", "endpoint": server.url,
              "data": str(write_pathmmu(tmp_path / "pathmmu"))}  # fmt: skip

    planted = {
        "scoring=published": 100 * 16 / 40,
        "prompt=letter": 100 * 20 / 40,
        "decoding=sampled": 100 * 28 / 40,
        "resize=squashed": 100 * 34 / 40,
        "subset=all": 100 * 32 / 60,
    }
    for cause, figure in planted.items():
        report = attributed(card, inputs, tmp_path / "out", figure)
        assert report["measured"] == pytest.approx(100 * 12 / 40)
        assert report["explained_by"] == [cause]
    # Each question was asked once per way of asking; later figures cost nothing.
    assert sum(server.requests.values()) == 4 * NUM_TEST + NUM_TEST + NUM_TINY
    report = attributed(card, inputs, tmp_path / "out", 30.2)
    assert (report["state"], report["explained_by"]) == ("reproduced", [])


def test_the_template_is_named(tmp_path: Path) -> None:
    """The references are the answers that the model gives under another template."""
    root = make_folders(tmp_path / "model")
    data = make_data(tmp_path / "data", 6)
    words = ["--llava", str(root / "llava"), "--visual-encoder", str(root / "plip"),
             "--device", "cpu", "--max-new-tokens", "5"]  # fmt: skip
    asked = ["pathvqa", str(root / "llama"), *words, "--data", str(data)]
    first = tmp_path / "first"
    result = CliRunner().invoke(
        cli.main,
        ["evaluate", *asked, "--prompt-template", "vicuna", "--work-dir", str(first)],
    )
    assert result.exit_code == 0, result.output
    answers = json.loads((first / "pathvqa_result.json").read_text())
    rows = json.loads(data.read_text())
    for answer in answers:
        rows[answer["question_id"]] |= {"answer": answer["answer"], "answer_type": "other"}
    data.write_text(json.dumps(rows))
    card = tmp_path / "card.yml"
    card.write_text(
        yaml.safe_dump(
            {
                "title": "a template",
                "published": {"value": 100, "source": "made up"},
                "tolerance": 0.5,
                "scale": 100,
                "command": ["evaluate", *asked, "--work-dir", "{out}"],
                "inputs": {},
                "figure": "metrics.json:scores > open > exact match > value",
                "items": "details.jsonl:question_id:correct",
                "choices": {
                    "template": {
                        "llama3_chat": ["--prompt-template", "llama3_chat"],
                        "vicuna": ["--prompt-template", "vicuna"],
                    },
                    "bos": {"single": [], "double": ["--bos", "double"]},
                },
            },
            sort_keys=False,
        )
    )
    report = attributed(card, {}, tmp_path / "out", 100.0)
    assert report["measured"] < 100
    assert report["explained_by"] == ["template=vicuna"]
