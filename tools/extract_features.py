#!/usr/bin/env python
"""Compute the features of a dataset once: ``python tools/extract_features.py CONFIG OUT``.

Linear and zero-shot baselines then train from OUT, see cite/mm/features.py.
"""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--split", default="train", show_default=True, help="train, val or test.")
@click.option("--checkpoint", type=click.Path(exists=True), help="Of a classifier.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--num-workers", default=0, show_default=True, help="Processes that read images.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU, if any.")
@click.option("--cfg-options", multiple=True, help="Changes of the config: NAME=VALUE.")
def main(
    config: str,
    out: str,
    split: str,
    checkpoint: str | None,
    batch_size: int,
    num_workers: int,
    device: str | None,
    cfg_options: tuple[str, ...],
) -> None:
    """Write the features of every patch of a split of CONFIG to the safetensors file OUT.

    A killed run continues when started again. Images that cannot be read are left out; the command
    then ends with exit code 3.
    """
    from mmengine.config import DictAction

    from cite.mm.feature_extraction import extract_features

    changes = dict(option.split("=", 1) for option in cfg_options)
    try:
        skipped = extract_features(
            config,
            out,
            split=split,
            checkpoint=checkpoint,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            cfg_options={k: DictAction._parse_iterable(v) for k, v in changes.items()},
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {out}")
    if skipped:
        click.echo(f"{len(skipped)} image(s) left out, for instance {skipped[0]}", err=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
