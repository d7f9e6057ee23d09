"""Hooks of MkDocs: pages generated from the code, and pages outside `docs/`.

The pages of commands come from `xtuner_add.cli`, those of the API from what the packages export, so
that neither can miss an entry. CONTRIBUTING, CHANGELOG and the READMEs of `configs/` become pages
as they are. Links between all of these are written as for a reader of the repository, and are
changed here to the paths of the site.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any, cast

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `mkdocs` is a script, and the checkout may not be installed

from xtuner_add.cli import COMMANDS, GROUPS, ForwardedCommand, main  # noqa: E402
from xtuner_add.modes import read_arguments  # noqa: E402

OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "configs/README.md": "configs/index.md",
    "configs/cite/gastric/README.md": "configs/cite/gastric.md",
    "configs/gigapath/README.md": "configs/gigapath.md",
    "configs/pallava/README.md": "configs/pallava.md",
    "configs/pathgen/README.md": "configs/pathgen.md",
}
"""Documents outside `docs/`, and their paths on the site."""

PACKAGES = {
    "wsi": "Slides",
    "pathcore": "Encoders and weights",
    "gigapath": "Prov-GigaPath",
    "pathgen": "Captions and CLIP",
    "cite": "CITE",
    "pallava": "PA-LLaVA",
}
MODES = "XTuner's modes"

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.MULTILINE | re.DOTALL)
_log = logging.getLogger("mkdocs.plugins.docs_site")


class ExampleSections(griffe.Extension):
    """Reads `Example:` in docstrings as the section that griffe calls `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object before it is parsed."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces COMMANDS and PACKAGES of the navigation by the generated pages."""
    titles = [*GROUPS, MODES]
    generated = {
        "COMMANDS": [{title: command_page(title)} for title in titles],
        "PACKAGES": [{f"{name}: {title}": api_page(name)} for name, title in PACKAGES.items()],
    }

    def fill(entries: list[Any]) -> list[Any]:
        filled: list[Any] = []
        for entry in entries:
            if isinstance(entry, dict):
                entry = {
                    key: fill(value) if isinstance(value, list) else value
                    for key, value in entry.items()
                }
            filled += generated.get(entry, [entry]) if isinstance(entry, str) else [entry]
        return filled

    config.nav = fill(cast(list[Any], config.nav))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated and those outside `docs/`."""
    pages = {site: (ROOT / name).read_text(encoding="utf-8") for name, site in OUTSIDE.items()}
    pages |= {command_page(title): commands_markdown(title) for title in [*GROUPS, MODES]}
    pages |= {api_page(name): api_markdown(name) for name in PACKAGES}
    pages["reference/index.md"] = index_markdown()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes links of the repository to links of the site, outside code."""
    path = page.file.src_uri
    source = {site: name for name, site in OUTSIDE.items()}.get(path, f"docs/{path}")

    def change(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        if site == target and not target.startswith("docs/"):
            _log.warning("%s links to %s, which is not on the site", source, found[1])
        relative = posixpath.relpath(site, posixpath.dirname(path) or ".")
        return relative + (found[2] or "")

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(change, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes links of notebooks, which MkDocs gets as HTML, to links of the site."""
    path = page.file.src_uri
    if not path.endswith(".ipynb"):
        return html

    def change(found: re.Match[str]) -> str:
        target = files.get_file_from_path(
            posixpath.normpath(posixpath.join(posixpath.dirname(path), found[1]))
        )
        if target is None:
            _log.warning("docs/%s links to %s, which is not on the site", path, found[1])
            return found[0]
        return f'href="{target.url_relative_to(page.file)}{found[2] or ""}"'

    return re.sub(r'href="(?![a-z]+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"', change, html)


def slug(title: str) -> str:
    """Returns a title as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().replace("'", "")).strip("-")


def command_page(title: str) -> str:
    """Returns the path of the page of a group of commands."""
    return f"reference/commands/{slug(title)}.md"


def api_page(package: str) -> str:
    """Returns the path of the page of a package."""
    return f"reference/api/{package}.md"


def group_commands(title: str) -> dict[str, click.Command]:
    """Returns the commands of a group by name; XTuner's nested modes have names of two words."""
    if title in GROUPS:
        context = click.Context(main)
        commands = ((name, main.get_command(context, name)) for name in GROUPS[title])
        return {name: cast(click.Command, command) for name, command in commands}
    modes: dict[str, click.Command] = {}
    for name, command in sorted(main.commands.items()):
        nested = command.commands if isinstance(command, click.Group) else {"": command}
        modes |= {f"{name} {word}".strip(): found for word, found in nested.items()}
    return modes


def commands_markdown(title: str) -> str:
    """Returns the page of a group of commands."""
    parts = [
        f"# {title}\n",
        "[All commands](../index.md#commands), [exit codes](../../commands.md#exit-codes).\n",
    ]
    for name, command in group_commands(title).items():
        program = f"xtuner-add {name}"
        context = click.Context(command, info_name=program, **command.context_settings)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [
            f"## {program} {{ #{slug(program)} }}\n",
            _description(command.help or ""),
            f"```text\n{program} {usage}\n```\n",
        ]
        if rows := [row for row in _parameters(command, context) if row[0] != "--help"]:
            cells = (f"| `{name}` | {_cell(text)} |" for name, text in rows)
            parts += ["| option | |\n|---|---|", *cells, ""]
        if example := (command.epilog or "").replace("\b", "").strip():
            label, *lines = (line.strip() for line in example.splitlines())
            parts.append(f"{label}\n\n```sh\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def _description(text: str) -> str:
    """Returns the paragraphs of a help text; those that click leaves as they are become code."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    for index, paragraph in enumerate(paragraphs):
        if paragraph.startswith("\b"):
            paragraphs[index] = f"```text\n{paragraph.removeprefix(chr(8)).strip(chr(10))}\n```"
    return "\n\n".join(paragraphs) + "\n"


def _parameters(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    """Returns names and help of what a command takes, as its own `--help` shows them."""
    if isinstance(command, ForwardedCommand):
        return read_arguments(command.mode)
    options = (found for found in command.get_params(context) if isinstance(found, click.Option))
    records = (option.get_help_record(context) for option in options)
    return [record for record in records if record]


def _cell(text: str) -> str:
    return re.sub(r"([|<*_\[\]])", r"\\\1", " ".join(text.split()))


def api_markdown(package: str) -> str:
    """Returns the page of a package: everything that it exports."""
    module = importlib.import_module(package)
    purpose = (module.__doc__ or "").strip()
    exports = "\n".join(f"::: {package}.{name}\n" for name in api_exports(package))
    return f"# {package}\n\n{purpose}\n\n[Python](../../python.md) has examples.\n\n{exports}"


def api_exports(package: str) -> list[str]:
    """Returns the names that a package exports, without its sub-modules."""
    module = importlib.import_module(package)
    names = [*module.__all__]
    return [name for name in names if not (ROOT / package / f"{name}.py").is_file()]


def index_markdown() -> str:
    """Returns the index of the reference: every command and every export, linked."""
    parts = [
        "# Reference\n",
        "[File formats](files.md), [exit codes](../commands.md#exit-codes), "
        "[configs](../../configs/README.md).\n",
        "## Commands\n",
    ]
    for title in [*GROUPS, MODES]:
        page = posixpath.relpath(command_page(title), "reference")
        parts += [f"### [{title}]({page})\n", "| command | |\n|---|---|"]
        for name, command in group_commands(title).items():
            summary = COMMANDS[name][1] if name in COMMANDS else command.get_short_help_str(100)
            parts.append(f"| [`{name}`]({page}#{slug(f'xtuner-add {name}')}) | {summary} |")
        parts.append("")
    parts.append("## Python\n")
    for package, title in PACKAGES.items():
        page = posixpath.relpath(api_page(package), "reference")
        links = ", ".join(f"[`{name}`]({page}#{package}.{name})" for name in api_exports(package))
        parts.append(f"**[{package}]({page})**, {title}: {links}\n")
    return "\n".join(parts)
