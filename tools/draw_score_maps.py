#!/usr/bin/env python
"""Draw where a classifier sees which class: ``python tools/draw_score_maps.py CLASSIFIER PATCHES OUT``.

One PNG and one table of scores a slide. Places come from --coords (a CSV with name, x, y, or a
folder of <slide>.h5), else from names <slide>_<x>_<y>; else patches stand in rows.
"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("classifier", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("patches", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--coords",
    type=click.Path(exists=True, path_type=Path),
    help="CSV with name, x, y; or a folder of <slide>.h5.",
)
@click.option("--patch-px", type=int, help="Side of a patch in the pixels of the coordinates.")
@click.option("--slide", "only", multiple=True, help="Draw this slide alone; repeatable.")
@click.option("--device", default="cpu", show_default=True)
def main(
    classifier: Path,
    patches: Path,
    out: Path,
    coords: Path | None,
    patch_px: int | None,
    only: tuple[str, ...],
    device: str,
) -> None:
    """Draw maps of the scores of the exported CLASSIFIER over the slides of the folder PATCHES.

    Slides whose picture is there already are left alone. Those that fail are listed, and the
    command ends with exit code 1.
    """
    from cite.classifier import load_classifier
    from cite.score_maps import find_patches, layout_from_h5, layout_from_names, layouts_from_csv

    try:
        model = load_classifier(classifier, device)
        slides = find_patches(patches)
        if unknown := set(only) - set(slides):
            raise ValueError(f"{patches}: no patches of {sorted(unknown)[0]}")
        slides = {name: slides[name] for name in (only or slides)}
        side = patch_px or model.preprocessing.size
        tables = layouts_from_csv(coords, slides, side) if coords and coords.is_file() else {}
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    failed = []
    for slide, names in slides.items():
        if (out / f"{slide}.png").is_file():
            continue
        try:
            if coords is None:
                layout = layout_from_names(names, side)
            elif coords.is_dir():
                layout = layout_from_h5(coords / f"{slide}.h5", names, patch_px)
            else:
                layout = tables[slide]
            _draw(model, patches, out, slide, layout)
        except (ValueError, OSError) as error:
            failed.append(slide)
            click.echo(f"{slide}: {error}", err=True)
    click.echo(f"Drew {len(slides) - len(failed)} of {len(slides)} slides in {out}")
    sys.exit(1 if failed else 0)


def _draw(model, patches: Path, out: Path, slide: str, layout) -> None:  # type: ignore[no-untyped-def]
    from cite.score_maps import draw_score_maps
    from pathcore.files import write_text

    scores = model.predict(patches / name for name in layout.names).numpy()
    rows = ["name,x,y," + ",".join(f"score_{i}" for i in range(len(model.classes)))]
    for name, (x, y), row in zip(layout.names, layout.coords_px, scores, strict=True):
        rows.append(f"{name},{x},{y}," + ",".join(f"{score:.6f}" for score in row))
    write_text(out / f"{slide}.csv", "\n".join(rows) + "\n")
    draw_score_maps(out / f"{slide}.png", scores, layout, model.classes, title=slide)


if __name__ == "__main__":
    main()
