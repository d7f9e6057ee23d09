#!/usr/bin/env python
"""Export an adapted classifier: ``python tools/export_classifier.py CONFIG CHECKPOINT OUT``.

`cite.load_classifier(OUT).predict(images)` then runs without MMEngine and its libraries.
"""

from __future__ import annotations

import click


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
def main(config: str, checkpoint: str, out: str) -> None:
    """Write the classifier of CONFIG with the weights CHECKPOINT to the folder OUT."""
    from cite.mm.export import export_classifier

    try:
        classifier = export_classifier(config, checkpoint, out)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {out}: {len(classifier.classes)} classes")


if __name__ == "__main__":
    main()
