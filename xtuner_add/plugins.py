"""Loads and lists what third-party packages add.

Packages declare two groups of entry points. `xtuner_add.plugins` names modules (or functions
without arguments) that register encoders, connectors and other parts with `pallava.registry`;
`xtuner_add.commands` names click commands that become sub-commands of `xtuner-add`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import click

from xtuner_add.commands.options import example

if TYPE_CHECKING:
    from pallava.registry import Registry

COMMAND_GROUP = "xtuner_add.commands"

REGISTRIES = {
    "encoders": "pallava.registry:ENCODERS",
    "connectors": "pallava.registry:CONNECTORS",
    "text encoders": "pallava.registry:TEXT_ENCODERS",
    "converters": "pallava.registry:CONVERTERS",
    "evaluations": "pallava.registry:EVALUATIONS",
}
"""Registries that plug-ins can add to, by the plural that the listing shows."""


def load_target(target: str) -> object:
    """Imports and returns the object `module:name`."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def load_registry(plural: str) -> Registry:
    """Returns a registry by its plural, such as `"encoders"`."""
    return load_target(REGISTRIES[plural])  # type: ignore[return-value]


def plugin_commands() -> dict[str, EntryPoint]:
    """Returns the sub-commands that other packages declare, by name, without importing them."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=COMMAND_GROUP)}


def load_command(entry_point: EntryPoint) -> click.Command:
    """Imports a sub-command of another package.

    Raises:
        click.ClickException: If it cannot be imported, or is not a click command.
    """
    source = f"sub-command {entry_point.name!r} of {distribution_name(entry_point)}"
    try:
        command = entry_point.load()
    except Exception as error:  # third-party code can raise anything
        raise click.ClickException(
            f"{source} ({entry_point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(command, click.Command):
        raise click.ClickException(
            f"{source}: {entry_point.value} must be a click command, not {type(command).__name__}"
        )
    return command


def distribution_name(entry_point: EntryPoint) -> str:
    """Returns the name of the package that declares an entry point."""
    return entry_point.dist.name if entry_point.dist else "an unknown package"


@click.command("plugins", epilog=example("plugins"))
def command() -> None:
    """List the encoders, connectors and sub-commands that can be used by name.

    Ends with exit code 1 if a plug-in could not be loaded.
    """
    from pallava.registry import load_plugins

    failures = load_plugins()
    for plural in REGISTRIES:
        _echo_section(plural, load_registry(plural).origins())
    _echo_section(
        "sub-commands of other packages",
        {
            name: f"{entry_point.value} ({distribution_name(entry_point)})"
            for name, entry_point in sorted(plugin_commands().items())
        },
    )
    for failure in failures:
        click.echo(f"not loaded: {failure}", err=True)
    if failures:
        raise SystemExit(1)


def _echo_section(title: str, rows: dict[str, str]) -> None:
    click.echo(f"{title}:")
    width = max(map(len, rows), default=0)
    for name, origin in rows.items():
        click.echo(f"  {name:<{width}}  {origin}")
    if not rows:
        click.echo("  none")
