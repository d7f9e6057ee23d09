"""`xtuner-add chat` from a pipe, and in a terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pallava import load_model
from pallava.inference.assistant import Assistant
from pallava.inference.streaming import Sampling, converse
from pallava.text.turns import Turn
from tests.pallava import goldens
from tests.pallava.tiny_folders import make_folders
from xtuner_add import cli

MODEL = ("llama", "--llava", "llava", "--visual-encoder", "plip", "--device", "cpu")
SHORT = Sampling(max_new_tokens=12)
IMAGES = ("sq_big.png", "tall_3.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folders(tmp_path_factory.mktemp("chat"), goldens.CROSSATTN_STATE)
    for name in IMAGES:
        shutil.copy(goldens.GOLDEN / "anyres" / name, root / name)
    return root


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return load_model(folder / "llama", folder / "llava", folder / "plip", device="cpu")


def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], *options: str) -> Any:
    monkeypatch.chdir(folder)
    arguments = ["chat", *MODEL, "--max-new-tokens", "12", *options]
    return CliRunner().invoke(cli.main, arguments, input="".join(f"{line}\n" for line in lines))


def expected(assistant: Assistant, folder: Path, *turns: tuple[str, tuple[str, ...]]) -> list[str]:
    """The answers of a conversation whose questions show these images."""
    spoken: list[Turn] = []
    for question, images in turns:
        spoken.append(Turn("user", question, tuple(folder / name for name in images)))
        spoken.append(Turn("assistant", converse(assistant, spoken, SHORT).text))
    return [turn.text for turn in spoken[1::2]]


def test_lines_of_a_pipe_are_one_conversation(
    folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = chat(folder, monkeypatch, ["What?", "", "Why?"], "--image", "sq_big.png")
    answers = expected(assistant, folder, ("What?", ("sq_big.png",)), ("Why?", ()))
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{text}\n" for text in answers)


def test_images_are_shown_with_the_next_question_and_forgotten_on_reset(
    folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/image sq_big.png", "/image tall_3.png", "What?", "/reset", "What?", "/quit", "No?"]
    result = chat(folder, monkeypatch, lines)
    both = expected(assistant, folder, ("What?", IMAGES))
    none = expected(assistant, folder, ("What?", ()))
    assert result.stdout == f"{both[0]}\n{none[0]}\n"
    assert both != none


def test_a_system_text_and_a_seed_reach_the_model(
    folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--system", "Be short.", "--temperature", "1.5", "--seed", "3"]
    result = chat(folder, monkeypatch, ["What?"], *options)
    turns = [Turn("system", "Be short."), Turn("user", "What?")]
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    assert result.stdout == converse(assistant, turns, sampling).text + "\n"


def test_a_line_that_fails_is_said_and_the_next_one_is_answered(
    folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/image none.png", "/dance", "/image", "<image> What?", "What?", "/help"]
    result = chat(folder, monkeypatch, lines)
    assert result.exit_code == 1
    assert expected(assistant, folder, ("What?", ()))[0] in result.stdout
    assert "no such image file" in result.stderr
    assert "'/dance': no such command" in result.stderr
    assert "1 <image> mark(s) for 0 image(s)" in result.stderr
    assert "/image PATH" in result.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--temperature", "9"], 2, "temperature"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--image", "none.png"], 1, "none.png"),
    ],
)
def test_wrong_settings_are_said_before_the_first_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, message: str
) -> None:
    result = chat(folder, monkeypatch, ["What?"], *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_a_terminal_shows_a_prompt_and_ctrl_c_stops_an_answer(folder: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "xtuner_add.cli", "chat", *MODEL, "--max-new-tokens", "400"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    seen = ""

    def wait_for(mark: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while mark not in seen and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 4096).decode("utf-8", "replace")
        assert mark in seen, seen
        seen = seen.partition(mark)[2]

    try:
        wait_for("/quit")
        wait_for("\n> ")
        os.write(leader, b"/image sq_big.png\n")
        wait_for("[1 image(s)] > ")
        os.write(leader, b"What?\n")
        wait_for("What?\r\n")
        while not seen:
            seen += os.read(leader, 4096).decode("utf-8", "replace")
        process.send_signal(2)
        wait_for("[stopped]")
        wait_for("> ")
        os.write(leader, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)
