"""`xtuner-add list-cfg` and `copy-cfg`, for XTuner's configs and ours.

XTuner's own commands only know its configs, which are single files. Ours inherit, so a copy needs
the base files too.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import click

from xtuner_add.commands.options import counted, example
from xtuner_add.paths import find_config, own_configs, xtuner_configs


@click.command("list-cfg", epilog=example("list-cfg", "--pattern pallava"))
@click.option("-p", "--pattern", default="", help="Show only names that contain this text.")
def list_cfg(pattern: str) -> None:
    """List the configs that have a name: this project's, then XTuner's."""
    try:
        sections = {"xtuner-add": own_configs(), "XTuner": xtuner_configs()}
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    for title, configs in sections.items():
        names = [name for name in sorted(configs) if pattern.lower() in name.lower()]
        click.echo(f"{title}: {counted(len(names), 'config')}")
        for name in names:
            click.echo(f"  {name}")


@click.command("copy-cfg", epilog=example("copy-cfg", "pallava_domain_alignment my_configs"))
@click.argument("name")
@click.argument("save_dir", type=click.Path(file_okay=False, path_type=Path))
def copy_cfg(name: str, save_dir: Path) -> None:
    """Copy the config NAME to SAVE_DIR, with the files that it inherits from.

    The copy is called NAME_copy.py. Existing files are not overwritten.
    """
    try:
        config = find_config(name)
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    copies = {config: save_dir / f"{config.stem}_copy.py"}
    for base in inherited_files(config):
        if not base.is_relative_to(config.parent):
            raise click.ClickException(f"{config} inherits from {base}, outside its folder")
        copies[base] = save_dir / base.relative_to(config.parent)
    for source, target in copies.items():
        if target.is_file():
            click.echo(f"Kept {target}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        click.echo(f"Copied {target}")


def inherited_files(config: Path) -> list[Path]:
    """Returns all files that a config inherits from, directly or indirectly.

    Supports both styles of MMEngine: `read_base()`, and a string or list `_base_`.
    """
    found: list[Path] = []
    for statement in ast.walk(ast.parse(config.read_text(encoding="utf-8"))):
        for base in _bases_of(statement, config):
            found += [base, *inherited_files(base)]
    return list(dict.fromkeys(found))


def _bases_of(statement: ast.AST, config: Path) -> list[Path]:
    if isinstance(statement, ast.ImportFrom) and statement.level:
        folder = config.parents[statement.level - 1]
        return [folder.joinpath(*(statement.module or "").split(".")).with_suffix(".py")]
    if isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "_base_" for target in statement.targets
    ):
        names = ast.literal_eval(statement.value)
        return [config.parent / name for name in ([names] if isinstance(names, str) else names)]
    return []
