#!/usr/bin/env python
"""Embed the texts of classes: ``python tools/write_text_embeddings.py OUT --classes FILE ...``.

FILE is JSON: one or several descriptions by class name, in the order of the labels. Heads that read
OUT need no text model.
"""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--classes", required=True, type=click.Path(dir_okay=False), help='JSON: {"class": "text"}.'
)
@click.option(
    "--encoder",
    type=click.Choice(["bert", "sentence", "open_clip", "hf_clip"]),
    default="bert",
    show_default=True,
    help="Kind of the text model.",
)
@click.option("--model", help="Folder, name on the hub, or package of the text model.")
@click.option("--pooling", type=click.Choice(["pooler", "cls", "mean"]), help="Of a BERT.")
@click.option("--arch", help="Of open_clip: the architecture.")
@click.option("--checkpoint", help="Of open_clip: the weights.")
@click.option("--template", multiple=True, help="Text with one {}; may be given several times.")
def main(
    out: str,
    classes: str,
    encoder: str,
    model: str | None,
    pooling: str | None,
    arch: str | None,
    checkpoint: str | None,
    template: tuple[str, ...],
) -> None:
    """Write the embeddings of the classes' descriptions to the safetensors file OUT."""
    from cite.text_embeddings import texts_by_class, write_text_embeddings
    from cite.text_encoder import build_text_encoder
    from pathcore.files import read_json

    needed = (
        {"arch": arch, "checkpoint": checkpoint} if encoder == "open_clip" else {"model": model}
    )
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise click.UsageError(f"--encoder {encoder} needs {' and '.join(missing)}")
    arguments: dict[str, Any] = dict(needed)
    if pooling is not None:
        if encoder not in ("bert", "sentence"):
            raise click.UsageError(f"--pooling is for a BERT, not for --encoder {encoder}")
        arguments["pooling"] = pooling
    try:
        descriptions = read_json(classes, what="classes")
        texts, class_ids = texts_by_class(descriptions, template or ("{}",))
        text_encoder = build_text_encoder(encoder, **arguments)
        content = write_text_embeddings(
            out,
            text_encoder.encode(texts),
            class_ids,
            classes=list(descriptions),
            texts=texts,
            encoder=text_encoder.description,
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(
        f"Wrote {out}: {len(texts)} texts of {len(descriptions)} classes, width {content.width}"
    )


if __name__ == "__main__":
    main()
