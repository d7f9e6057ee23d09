"""``xtuner-add setup-host``: installs XTuner, which no extra can depend on."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import click

from xtuner_add.commands.options import example

XTUNER = "xtuner==0.2.0"
"""The last release with the MMEngine trainer. Its metadata pins transformers 4.48.0, mmengine
0.10.6 and bitsandbytes 0.45.0, which break with current torch and triton; the extra `train`
requires versions that it trains with, so XTuner is installed without its dependencies."""


@click.command("setup-host", epilog=example("setup-host"))
def setup_host() -> None:
    """Install XTuner into this environment, without the outdated versions that it pins.

    Needed once after `pip install "xtuner-add[train]"`. `pip check` then reports that XTuner asks
    for other versions; training was tested with those that the extra brought.
    """
    if importlib.util.find_spec("mmengine") is None:
        raise click.ClickException(
            'MMEngine is not installed: first pip install "xtuner-add[train]"'
        )
    if importlib.util.find_spec("pip") is not None:
        installer = [sys.executable, "-m", "pip", "install"]
    elif (uv := shutil.which("uv")) is not None:  # environments of uv have no pip
        installer = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise click.ClickException("neither pip nor uv was found in this environment")
    done = subprocess.run([*installer, "--no-deps", XTUNER], check=False)
    if done.returncode:
        raise click.ClickException(f"{XTUNER} could not be installed; the lines above say why")
    click.echo(f"Installed {XTUNER}. Try: xtuner-add list-cfg pallava")
