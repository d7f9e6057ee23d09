#!/usr/bin/env python
"""Convert an image encoder's weights: ``python tools/convert_model.py IN OUT --from A --to B``.

From MoCo v3 to the ViT of MMClassification and MMPreTrain, and between these, timm and Hugging
Face; between OpenAI's CLIP and Hugging Face's. Every tensor is accounted for, or nothing is
written.
"""

from __future__ import annotations

import click

from cite.conversions import SOURCES, TARGETS


@click.command()
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--from", "source_format", required=True, type=click.Choice(SOURCES))
@click.option("--to", "target_format", required=True, type=click.Choice(TARGETS))
def main(source: str, out: str, source_format: str, target_format: str) -> None:
    """Convert the weights SOURCE and write them to OUT, .pth or .safetensors."""
    from cite.conversions import convert
    from pathcore.weights import read_state_dict, write_state_dict

    try:
        converted = convert(read_state_dict(source), source_format, target_format)
        write_state_dict(out, converted)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {out}: {len(converted)} tensors")


if __name__ == "__main__":
    main()
