"""``xtuner-add list-cfg`` and ``copy-cfg``: as XTuner's, for its configs and for ours, at once.

XTuner's own commands know only its configs, which stand in one file each; ours inherit, so that a
copy needs the files it inherits from.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import click

from xtuner_add.commands.options import example
from xtuner_add.paths import find_config, own_configs, xtuner_configs


@click.command("list-cfg", epilog=example("list-cfg", "--pattern pallava"))
@click.option("-p", "--pattern", default="", help="Show the names that contain this text.")
def list_cfg(pattern: str) -> None:
    """List the configs known by name: this project's, then XTuner's."""
    try:
        sections = {"xtuner-add": own_configs(), "XTuner": xtuner_configs()}
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    for title, configs in sections.items():
        names = [name for name in sorted(configs) if pattern.lower() in name.lower()]
        click.echo(f"{title}: {len(names)} configs")
        for name in names:
            click.echo(f"  {name}")


@click.command("copy-cfg", epilog=example("copy-cfg", "pallava_domain_alignment my_configs"))
@click.argument("name")
@click.argument("save_dir", type=click.Path(file_okay=False, path_type=Path))
def copy_cfg(name: str, save_dir: Path) -> None:
    """Copy a config known by NAME into SAVE_DIR, with the files it inherits from.

    The copy is called NAME_copy.py. Files that are there already are kept.
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
    """Return the files that a config inherits from, bases of bases too.

    Knows both of MMEngine's styles: ``read_base()``, and a list or text called ``_base_``.
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
