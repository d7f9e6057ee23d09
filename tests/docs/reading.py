"""Shell lines and Python blocks of the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.table import NAMES, NOT_RUN, OPTIONS, PYTHON_NOT_RUN

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("README.md"),
    )
)
LANGUAGES = ("sh", "python", "pycon", "json", "yaml", "toml", "text")
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```\s*$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str
    not_run: str = ""  # the reason, said in the document: ```python no-run: needs gated weights


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    content = (ROOT / document).read_text(encoding="utf-8")
    for found in _FENCE.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        yield Block(document, line, found[1], found[3], found[2].partition("no-run:")[2].strip())


def lines_of(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments and `[optional]` parts cut."""
    lines = []
    for raw in re.sub(r"\\\n\s*", "", text).splitlines():
        line = re.sub(r"\s#\s.*$", "", re.sub(r"\s\[[^\]]*\]", "", raw)).strip()
        if line and not line.startswith("#"):
            lines.append(re.sub(r"\s+", " ", line))
    return lines


def shell_lines(document: str) -> list[str]:
    """The commands of a document."""
    found = (lines_of(block.text) for block in blocks(document) if block.language == "sh")
    return [line for lines in found for line in lines]


def reason_not_to_run(text: str, *, python: bool = False) -> str | None:
    """Why a line or block is not run; None if it is."""
    for pattern, reason in PYTHON_NOT_RUN if python else NOT_RUN:
        if re.search(pattern, text, flags=re.MULTILINE):
            return reason
    return None


def tiny(text: str) -> str:
    """A line or block with tiny inputs in place of full-size names."""
    for pattern, replacement in NAMES:
        text = re.sub(pattern, replacement, text)
    if text.startswith("xtuner-add "):
        command = text.removeprefix("xtuner-add ")
        for start, options in OPTIONS.items():
            if command == start or command.startswith(f"{start} "):
                if "--endpoint " in command:  # which takes no device
                    options = options.replace("--device cpu ", "")
                text = f"{text} {options}"
    return text


def newest(pattern: str, folder: Path) -> str:
    """A word with a `*` in a file name, as the newest file that matches; others as they are."""
    if "*" not in pattern or " " in pattern:
        return pattern
    prefix, equals, name = pattern.rpartition("=")
    found = sorted(folder.glob(name), key=lambda path: path.stat().st_mtime)
    return f"{prefix}{equals}{found[-1].relative_to(folder)}" if found else pattern
