"""README's blocks run as written, in its order, in environments that hold what it says.

The environments are virtual environments into which the distributions are linked that pip would
install: the wheel's requirements with the extras named so far, and theirs in turn, in the versions
of the environment that runs the tests. Nothing else can be imported there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import venv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.reading import blocks, lines_of

SITE = Path(sysconfig.get_paths()["purelib"])
INSTALL = re.compile(r'pip install "?xtuner-add(?:\[([\w,]+)\])?"?$')
EXAMPLES = """
import doctest, sys
test = doctest.DocTestParser().get_doctest(sys.stdin.read(), {}, "README.md", None, 0)
failed, tried = doctest.DocTestRunner().run(test)
sys.exit(bool(failed) or not tried)
"""


def closure(
    requirements: Iterable[str], extras: set[str]
) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that requirements bring, by canonical name.

    Raises:
        PackageNotFoundError: If one of them is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()

    def add(lines: Iterable[str], extras: set[str]) -> None:
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            name = canonicalize_name(requirement.name)
            found[name] = importlib.metadata.distribution(name)
            wanted = {(name, extra) for extra in ("", *requirement.extras)} - asked
            if wanted:
                asked.update(wanted)
                add(found[name].requires or (), set(requirement.extras))

    add(requirements, extras)
    return found


class Environment:
    """A virtual environment with the wheel, to which distributions are linked.

    Args:
        folder: Where to create it.
        wheel: The wheel, which is really installed.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        pip += ["--quiet", "--no-index", "--no-deps", str(wheel)]
        subprocess.run(pip, check=True, env=self._environ())
        (info,) = self.site.glob("xtuner_add-*.dist-info")
        self.requires = importlib.metadata.Distribution.at(info).requires or []
        self._owners = defaultdict(set)
        for distribution in importlib.metadata.distributions(path=[str(SITE)]):
            for file in distribution.files or ():
                self._owners[file.parts[0]].add(canonicalize_name(distribution.name))

    def add(self, extras: set[str]) -> set[str]:
        """Links what the wheel requires with these extras; returns the names of all of it."""
        distributions = closure(self.requires, extras)
        for distribution in distributions.values():
            for file in distribution.files or ():
                # A folder as a whole, unless it also holds files of what is not required.
                whole = self._owners[file.parts[0]] <= distributions.keys()
                name = file.parts[0] if whole else str(file)
                link = self.site / name
                if file.parts[0] == ".." or os.path.lexists(link):
                    continue
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(SITE / name)
        return set(distributions)

    def run(self, arguments: list[str], cwd: Path, text: str = "") -> str:
        """Runs a program of the environment; returns what it prints."""
        done = subprocess.run(
            [str(self.bin / arguments[0]), *arguments[1:]],
            cwd=cwd,
            input=text,
            env=self._environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {shlex.join(arguments)}\n{done.stdout}"
        return done.stdout

    def _environ(self) -> dict[str, str]:
        """The variables of this process without those by which Python finds other packages."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**kept, "PATH": f"{self.bin}:/usr/bin:/bin"}


@pytest.mark.slow
def test_readme_runs_as_written(wheel: Path, tmp_path: Path) -> None:
    environment, folder = Environment(tmp_path / "venv", wheel), tmp_path / "work"
    folder.mkdir()
    extras: set[str] | None = None
    timed: list[tuple[str, float]] = []

    def run(what: str, arguments: list[str], text: str = "") -> None:
        assert extras is not None, f"README runs {what!r} before it says what to install"
        start = time.monotonic()
        print(environment.run(arguments, folder, text))
        timed.append((what, time.monotonic() - start))

    for block in blocks("README.md"):
        if block.language == "pycon":
            run("Python", ["python", "-c", EXAMPLES], block.text)
        for line in lines_of(block.text) if block.language == "sh" else ():
            if found := INSTALL.match(line):
                extras = (extras or set()) | set(filter(None, (found[1] or "").split(",")))
                names = environment.add(extras)
                assert ("torch" in names) == bool(extras)
            elif line.startswith("xtuner-add "):
                run(line, shlex.split(line))
    for what, seconds in timed:
        print(f"{seconds:6.1f} s  {what}")
    assert len(timed) == 6, "README promises a Python block and five commands"
    assert (folder / "embeddings/pictures/painted.jpg").stat().st_size > 1000
