"""Every command and every Python block of the documents runs, on tiny inputs."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests import warm_python
from tests.docs.reading import (
    DOCUMENTS,
    LANGUAGES,
    ROOT,
    blocks,
    lines_of,
    newest,
    reason_not_to_run,
    shell_lines,
    tiny,
)
from tests.docs.table import NAMES, NOT_RUN, OPTIONS, PYTHON_NOT_RUN
from tests.docs.worlds import GROUPS
from tests.pathgen.describer_server import WORDS, DescriberServer, running_server
from xtuner_add.cli import COMMANDS, main

COMMAND = re.compile(r"((xtuner-add|python|mim|bash|make) |[A-Z_]+=\S+ .*(xtuner-add|\\$))")


def test_every_document_is_in_a_group() -> None:
    listed = ["README.md", *(name for documents, _ in GROUPS.values() for name in documents)]
    assert len(listed) == len(set(listed))
    with_code = {
        name
        for name in DOCUMENTS
        if any(block.language in ("sh", "python", "pycon") for block in blocks(name))
    }
    assert with_code <= set(listed), "add the document to GROUPS in tests/docs/worlds.py"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_says_its_language(document: str) -> None:
    for block in blocks(document):
        assert block.language in LANGUAGES, f"{document}:{block.line}"
        commands = [line for line in block.text.splitlines() if COMMAND.match(line)]
        assert block.language == "sh" or not commands, f"{document}:{block.line}: {commands}"
        if block.language == "json":
            for line in block.text.splitlines() if block.text.count("\n{") else [block.text]:
                json.loads(line)


def test_the_list_of_what_is_not_run_is_short_and_used() -> None:
    lines = [line for document in DOCUMENTS for line in shell_lines(document)]
    texts = [
        block.text for name in DOCUMENTS for block in blocks(name) if block.language == "python"
    ]
    assert len(NOT_RUN) <= 12 and len(PYTHON_NOT_RUN) <= 4
    run = [line for line in lines if reason_not_to_run(line) is None]
    assert len(run) >= 45, "more commands run than are listed"
    for pattern, _ in (*NOT_RUN, *PYTHON_NOT_RUN):
        everything = texts if (pattern, _) in PYTHON_NOT_RUN else lines
        assert any(re.search(pattern, text, flags=re.MULTILINE) for text in everything), pattern
    assert all(words.split()[0] in {*COMMANDS, "train"} for words in OPTIONS)
    assert NAMES


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[DescriberServer]:
    """A server that answers as each of the captioning steps, and as a judge."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_server() as server:
        server.write = reply
        yield server


STEP = ""
"""The command that asks."""


def reply(text: str) -> str:
    """What the model says to the command that asks."""
    if STEP == "revise":
        return json.dumps({"usable": True, "problems": [], "caption": f"{WORDS} {len(text)}"})
    if STEP == "summarise":
        return "Atypical epithelial cells in a fibrous stroma."
    if STEP == "score":
        return json.dumps({"score": 7})
    if STEP == "make-instructions":
        return WORDS
    return f"{WORDS} Field {abs(hash(text)) % 1000}."


def run_line(line: str, root: Path, server: DescriberServer) -> str | None:
    """Runs a line; returns what is wrong with it."""
    global STEP
    allowed_to_fail = " || " in line
    line = tiny(line.partition(" || ")[0]).replace("ENDPOINT", server.url)
    line = line.replace("CONFIGS/", f"{ROOT / 'configs'}/").replace("TOOLS/", f"{ROOT / 'tools'}/")
    words = [newest(word, root) for word in shlex.split(line)]
    if words[0] == "xtuner-add":
        STEP = words[1]
        result = CliRunner().invoke(main, words[1:], input="Is there necrosis?\n/quit\n")
        code, output = result.exit_code, result.output
        if result.exception and not isinstance(result.exception, SystemExit):
            output += f"{result.exc_info[0]}: {result.exception}"  # type: ignore[index]
    else:
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(
            words, cwd=root, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        code, output = done.returncode, done.stdout + done.stderr
    if code == 0 or (allowed_to_fail and code == 1):
        return None
    return f"$ {shlex.join(words)}\nexit code {code}\n{output[-1500:]}"


def run_python(text: str, names: dict[str, object], server: DescriberServer) -> str | None:
    """Runs a block; returns what is wrong with it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = tiny(text).replace("ENDPOINT", server.url)
            exec(compile(code, "block", "exec"), names)
    except Exception as error:
        return f"{text}\n{type(error).__name__}: {error}"
    return None


def run_examples(document: str, lines: str, names: dict[str, object]) -> str | None:
    """Runs `>>>` lines; returns what differs from the output that the document prints."""
    test = doctest.DocTestParser().get_doctest(lines, names, document, document, 0)
    output = io.StringIO()
    failed = doctest.DocTestRunner().run(test, out=output.write, clear_globs=False).failed
    names.update(test.globs)
    return output.getvalue() if failed or not test.examples else None


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_documents_run(
    group: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: DescriberServer,
) -> None:
    documents, makers = GROUPS[group]
    for make in makers:
        make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("xtuner_add.launch.run_child", warm_python.run_child)
    problems = []
    for document in (name for name in documents if (ROOT / name).is_file()):
        session: dict[str, object] = {}  # the examples of a document continue each other
        for block in blocks(document):
            if block.not_run:
                continue
            if block.language == "pycon":
                problems.append((document, run_examples(document, block.text, session)))
            elif block.language == "python" and not reason_not_to_run(block.text, python=True):
                names: dict[str, object] = {"__name__": "block"}
                problems.append((document, run_python(block.text, names, endpoint)))
            elif block.language == "sh":
                for line in lines_of(block.text):
                    if not reason_not_to_run(line):
                        problems.append((document, run_line(line, tmp_path, endpoint)))
    found = [f"{document}: {problem}" for document, problem in problems if problem]
    assert not found, "\n\n".join(found)
