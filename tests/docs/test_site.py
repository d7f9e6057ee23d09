"""The documentation site builds strictly, and a reader finds what the reference should hold."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from tests.docs.reading import ROOT
from xtuner_add.cli import COMMANDS
from xtuner_add.modes import MODES

PACKAGES = ("wsi", "pathcore", "gigapath", "pathgen", "cite", "pallava")
TERMS = (
    *("slide", "level-0", "mpp", "patch", "tile", "bag", "embedding", "encoder", "slide-encoder"),
    *("caption", "pair", "shard", "clip", "zero-shot", "visual-prompt", "mil", "linear-probe"),
    *("plip", "connector", "lora", "llm", "token", "domain-alignment", "instruction-tuning"),
    *("vqa", "config", "manifest", "exit-code", "bootstrap"),
)

pytestmark = pytest.mark.slow


@dataclass
class Page:
    """A page of the site: its ids, and where its links lead."""

    ids: set[str]
    links: list[tuple[str, str]]  # path of a file of the site, fragment
    loaded: list[str]  # addresses of other hosts that a browser would load from


class Site:
    """The built site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {
            path.relative_to(folder).as_posix(): self._read(path)
            for path in folder.rglob("*.html")
            if path.name != "404.html"  # its links are absolute, for a site at the root
        }

    def _read(self, path: Path) -> Page:
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        page = Page({str(tag["id"]) for tag in soup.find_all(id=True)}, [], [])
        for tag in soup.find_all(["a", "img", "script", "link", "source"]):
            address = str(tag.get("href") or tag.get("src") or "")
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag.name != "a" and parts.scheme != "data":
                    page.loaded.append(address)
                continue
            if not parts.path and not parts.fragment:
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            if target.is_dir() or parts.path.endswith("/"):
                target /= "index.html"
            name = os.path.relpath(target, self.folder)
            page.links.append((name, unquote(parts.fragment)))
        return page

    def two_clicks(self) -> Iterator[tuple[str, str]]:
        """Yields pages with fragments that one or two links lead to from the front page."""
        for link in self.pages["index.html"].links:
            yield link
            if link[0] in self.pages:
                yield from self.pages[link[0]].links


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return Site(folder)


def test_every_internal_link_resolves(site: Site) -> None:
    broken = [
        f"{name}: {target}#{fragment}"
        for name, page in site.pages.items()
        for target, fragment in page.links
        if not (site.folder / target).is_file()
        or (fragment and target in site.pages and fragment not in site.pages[target].ids)
    ]
    assert len(site.pages) > 50 and not broken, broken[:20]


def test_every_command_is_two_clicks_from_the_front_page(site: Site) -> None:
    reached = set(site.two_clicks())
    for name in (*COMMANDS, *MODES):
        anchor = f"xtuner-add-{name}".replace(" ", "-").replace("_", "-")
        pages = [page for page, fragment in reached if fragment == anchor]
        assert pages and all(anchor in site.pages[page].ids for page in pages), name


def test_every_export_is_in_the_api_reference(site: Site) -> None:
    reached = set(site.two_clicks())
    for package in PACKAGES:
        page = f"reference/api/{package}/index.html"
        names = importlib.import_module(package).__all__
        functions = [name for name in names if not (ROOT / package / f"{name}.py").is_file()]
        assert len(functions) >= 5
        for name in functions:
            assert f"{package}.{name}" in site.pages[page].ids, name
            assert (page, f"{package}.{name}") in reached, name


def test_the_glossary_has_each_term_once_with_a_link(site: Site) -> None:
    html = (site.folder / "concepts/glossary/index.html").read_text(encoding="utf-8")
    article = BeautifulSoup(html, "html.parser").article
    assert article is not None
    terms = [str(tag["id"]) for tag in article.find_all("h3")]
    assert len(terms) == len(set(terms)) and set(TERMS) <= set(terms)
    for heading in article.find_all("h3"):
        text = heading.find_next_sibling("p")
        assert text is not None and text.find("a"), f"{heading['id']}: no link"


def test_a_browser_loads_nothing_from_elsewhere(site: Site) -> None:
    loaded = {address for page in site.pages.values() for address in page.loaded}
    assert not loaded
