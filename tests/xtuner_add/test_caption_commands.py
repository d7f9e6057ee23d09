"""The caption commands, as users type them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.pathgen.describer_server import WORDS, DescriberServer, running_server
from xtuner_add import cli


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DescriberServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_server() as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(tmp_path / f"images/{number}.png")
        row = {"id": f"p{number}", "image": f"images/{number}.png", "caption": f"case {number}"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path / "pairs.jsonl"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_patches_to_instructions(server: DescriberServer, rows: Path) -> None:
    folder, whom = rows.parent, ("--endpoint", server.url, "--model", "m")
    result = run("describe", rows, folder / "long.jsonl", *whom)
    assert result.exit_code == 0, result.output
    assert "6 written" in result.output
    server.write = lambda text: json.dumps(
        {"usable": True, "problems": [], "caption": f"{WORDS} Seen: {text.split('Field ')[1][:1]}"}
    )
    revised = folder / "revised.jsonl"
    result = run("revise", folder / "long.jsonl", revised, *whom, "--image-folder", folder)
    assert result.exit_code == 0, result.output
    result = run("filter-captions", revised, folder / "clean.jsonl", "--steps", "length,exact")
    assert result.exit_code == 0, result.output
    assert "exact: 0 of 6 dropped" in result.output
    server.write = lambda _: "Atypical epithelial cells in a fibrous stroma."
    result = run("summarise", folder / "clean.jsonl", folder / "short.jsonl", *whom)
    assert result.exit_code == 0, result.output
    server.write = lambda _: WORDS
    out = folder / "conversations.jsonl"
    result = run("make-instructions", folder / "clean.jsonl", out, *whom, "--kinds", "detail")
    assert result.exit_code == 0, result.output
    assert [row["id"] for row in read(out)] == [f"p{n}-detail" for n in range(6)]
    assert {row["caption"] for row in read(folder / "short.jsonl")} == {
        "Atypical epithelial cells in a fibrous stroma."
    }


def test_what_was_left_out_shows(server: DescriberServer, rows: Path) -> None:
    rows.write_text(rows.read_text() + '{"id": "bad", "image": "absent.png"}\n')
    out = rows.with_name("out.jsonl")
    whom = ("--endpoint", server.url, "--model", "m")
    result = run("describe", rows, out, *whom)
    assert result.exit_code == 3, result.output
    assert "1 failed" in result.output
    assert "absent.png" in result.output
    assert len(read(out)) == 6
    prices = ("--price-in", "1", "--price-out", "1", "--max-cost", "0.0000001")
    result = run("describe", rows, out, *whom, *prices, "--temperature", "1")
    assert result.exit_code == 3
    assert "6 not asked" in result.output
    server.refuse = 401
    result = run("describe", rows, out, *whom, "--temperature", "0.5")
    assert result.exit_code == 1
    assert "m at http" in result.output
    assert "secret" not in result.output


def test_wrong_usage(server: DescriberServer, rows: Path) -> None:
    out = rows.with_name("out.jsonl")
    assert run("describe", rows, out).exit_code == 2
    assert run("describe", rows, out, "--endpoint", server.url).exit_code == 2
    assert run("describe", rows, out, "--endpoint", "u", "--local", "v").exit_code == 2
    assert run("filter-captions", rows, out, "--steps", "song").exit_code == 2
    whom = ("--endpoint", server.url, "--model", "m")
    for arguments in (
        ("describe", rows, out, *whom, "--max-words", "10"),
        ("revise", rows, out, *whom, "--min-words", "300"),
        ("summarise", rows, out, *whom, "--max-words", "2"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and "words: expected minimum <= maximum" in result.output
    assert not out.exists()
    result = run("make-instructions", rows, out, "--kinds", "open=much", "--local", "v")
    assert result.exit_code == 2
    assert "NAME=WEIGHT" in result.output
    good = rows.read_text()
    rows.write_text("{broken\n")
    assert run("filter-captions", rows, out).exit_code == 1  # nothing is left to write
    rows.write_text(good + "{broken\n")
    assert run("filter-captions", rows, out).exit_code == 3


def test_a_file_without_rows_is_a_failure(server: DescriberServer, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    out = tmp_path / "out.jsonl"
    options = ("--endpoint", server.url, "--model", "m")
    result = run("summarise", tmp_path / "empty.jsonl", out, *options)
    assert result.exit_code == 1 and "empty.jsonl: holds no rows" in result.output
    assert not out.exists()
