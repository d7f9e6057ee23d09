"""`xtuner-add doctor`: shows installed packages, accelerators, and which encoders can be loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from pathcore.exit_codes import EXIT_FAILED
from pathcore.extras import DISTRIBUTION, NOT_FOR_USERS
from xtuner_add.commands.options import example

_GIB = 1 << 30


@click.command("doctor", epilog=example("doctor", "", "prov-gigapath"))
@click.argument("names", nargs=-1, metavar="[ENCODER]...")
@click.option("--all", "every", is_flag=True, help="Report on every known encoder.")
@click.pass_context
def doctor(ctx: click.Context, names: tuple[str, ...], every: bool) -> None:
    """Show what is installed, and whether each ENCODER can be loaded.

    Prints one fact per line. The exit code is 1 if a given ENCODER cannot be loaded. Uses no
    network and downloads nothing.
    """
    from pathcore.encoders import list_encoders
    from pathcore.encoders.availability import availability
    from pathcore.encoders.presets import UnknownEncoderError

    if not names:
        for fact in _facts():
            click.echo(fact)
    found = []
    for name in list_encoders() if every else names:
        try:
            found.append(availability(name))
        except UnknownEncoderError as error:
            raise click.BadParameter(str(error), param_hint="ENCODER") from error
    for entry in found:
        click.echo(f"{'ready   ' if entry.ready else 'missing '} {entry.name}: {entry.reason}")
    if not names and not every:
        known = [availability(name) for name in list_encoders()]
        ready = [entry.name for entry in known if entry.ready]
        click.echo(
            f"encoders: {len(ready)} of {len(known)} can be loaded"
            f"{': ' + ', '.join(ready) if ready else ''}; --all shows why the others cannot"
        )
    if names and not all(entry.ready for entry in found):
        ctx.exit(EXIT_FAILED)


def _facts() -> Iterator[str]:
    yield f"xtuner-add {_version(DISTRIBUTION)}, Python {platform.python_version()}"
    yield from _extras()
    yield from _accelerators()
    yield f"memory: {_available_memory() / _GIB:.1f} GiB available, {os.cpu_count()} cores"
    usage = shutil.disk_usage(Path.cwd())
    yield f"disk: {usage.free / _GIB:.1f} GiB free here, of {usage.total / _GIB:.1f}"
    yield f"hub: {_hub()}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _extras() -> Iterator[str]:
    """Yields one line per extra, with the requirements that are missing or have a wrong version."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    requirements = [Requirement(line) for line in lines]
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra in NOT_FOR_USERS:
            continue
        lacking = []
        for requirement in requirements:
            marker = requirement.marker
            if (
                marker is None
                or "extra" not in str(marker)
                or not marker.evaluate({"extra": extra})
            ):
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                lacking.append(str(requirement.name))
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                lacking.append(f"{requirement.name} {version} (expected {requirement.specifier})")
        state = "complete" if not lacking else f"lacks {', '.join(lacking)}"
        hint = "" if not lacking else f": pip install '{DISTRIBUTION}[{extra}]'"
        yield f"extra {extra}: {state}{hint}"


def _accelerators() -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        yield "torch: not installed; only the slide commands work without it"
        return
    import torch  # takes two seconds, but only torch knows its accelerators

    yield from _torchvision()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            kind = "bf16" if torch.cuda.is_bf16_supported() else "fp16 only"
            yield (
                f"torch {torch.__version__}: cuda:{index} {about.name}, "
                f"{about.total_memory / _GIB:.0f} GiB, {kind}"
            )
    elif torch.backends.mps.is_available():
        yield f"torch {torch.__version__}: Apple GPU (not tested by this project)"
    else:
        yield f"torch {torch.__version__}: no GPU, {torch.get_num_threads()} CPU threads"


def _torchvision() -> Iterator[str]:
    """Yields a line if torch and torchvision come from different builds, which pip does not see."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError, ImportError) as error:
        versions = [f"{name} {_version(name)}" for name in ("torch", "torchvision")]
        yield (
            f"torchvision cannot be imported ({error}): {' and '.join(versions)} do not belong "
            "together; install both in one command from one index, as docs/install.md says"
        )


def _available_memory() -> int:
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", path.read_text()) if path.is_file() else None
    if found is not None:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _hub() -> str:
    if importlib.util.find_spec("huggingface_hub") is None:
        return "huggingface-hub not installed"
    from huggingface_hub import constants, get_token

    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    token = (
        "a token is set"
        if get_token()
        else "no token (HF_TOKEN), so gated weights cannot be downloaded"
    )
    return f"{token}{offline}; cache {constants.HF_HUB_CACHE}"
