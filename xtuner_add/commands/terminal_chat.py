"""Chat in the terminal or from a pipe; each line is a question."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pallava.inference.assistant import Assistant
    from pallava.inference.streaming import Sampling

HELP = """\
/image PATH   add an image to the next question; may be repeated
/reset        clear the conversation and the images
/help         show this text
/quit         quit (also Ctrl-D); Ctrl-C stops an answer"""


class TerminalChat:
    """Reads questions line by line and prints the answers.

    Args:
        assistant: Model.
        sampling: Sampling parameters.
        system: System prompt.
    """

    def __init__(self, assistant: Assistant, sampling: Sampling, system: str | None = None) -> None:
        from pallava.text.turns import Turn

        self.assistant = assistant
        self.sampling = sampling
        self.num_errors = 0
        self._start = [Turn("system", system)] if system else []
        self._turns = list(self._start)
        self._images: list[Any] = []

    def run(self, images: Sequence[Path] = ()) -> int:
        """Chats until the input ends; returns the number of lines that failed.

        Raises:
            ImageError: If one of `images` cannot be read.
        """
        self._images = [self.assistant.pixel_values(image) for image in images]
        for line in self._lines():
            text = line.strip()
            if text == "/quit":
                break
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._answer(text)
            except ValueError as error:
                self.num_errors += 1
                click.echo(f"error: {error}", err=True)
        return self.num_errors

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        import readline  # noqa: F401  (lines can be edited)

        click.echo(f"{HELP}\n")
        while True:
            mark = f"[{len(self._images)} image(s)] " if self._images else ""
            try:
                yield input(f"{mark}> ")
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/image" and argument.strip():
            path = Path(argument.strip()).expanduser()
            self._images.append(self.assistant.pixel_values(path))
        elif name == "/reset":
            self._turns, self._images = list(self._start), []
        elif name == "/help":
            click.echo(HELP)
        else:
            raise ValueError(f"{text!r:.80}: no such command\n{HELP}")

    def _answer(self, question: str) -> None:
        from pallava.inference.streaming import converse
        from pallava.text.turns import Turn

        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()

        turns = [*self._turns, Turn("user", question, tuple(self._images))]
        try:
            converse(self.assistant, turns, self.sampling, on_text=show)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        click.echo()
        # A question that was stopped before the first word is forgotten, but its images stay for
        # the next one.
        if pieces:
            self._turns, self._images = [*turns, Turn("assistant", "".join(pieces))], []
