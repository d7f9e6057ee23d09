"""``xtuner-add select-patches``: representative patches of slides."""

from __future__ import annotations

from pathlib import Path

import click

from xtuner_add.caption_commands import INCOMPLETE
from xtuner_add.release_commands import user_errors

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("select-patches")
@click.argument("coords", type=_FOLDER)
@click.option("--slides", type=_FOLDER, required=True, help="Folder of the slides.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--encoder",
    required=True,
    metavar="SPEC",
    help="open_clip:MODEL@WEIGHTS, open_clip:local-dir:FOLDER or hf:MODEL.",
)
@click.option("--device", help="By default a GPU where there is one.")
@click.option("--batch-size", default=64, show_default=True, help="Patches encoded at once.")
@click.option("--quota", default=256, show_default=True, help="Most patches of a slide.")
@click.option(
    "--shares",
    default="prompt=0.25,report=0.25,cluster=0.5",
    show_default=True,
    help="Of the quota.",
)
@click.option(
    "--clusters",
    default="sqrt",
    show_default=True,
    help="A number, sqrt, or published:BATCH for PathGen's formula.",
)
@click.option(
    "--similarity",
    default=0.95,
    show_default=True,
    help="Cosine from which two patches are the same.",
)
@click.option("--cancer-type", metavar="CODE", help="TCGA's code, BRCA for instance.")
@click.option(
    "--cancer-types",
    type=_FILE,
    help="By slide: JSON object, or lines with wsi_id and cancer_type.",
)
@click.option("--reports", type=_FILE, help="By slide: JSON object, or lines with wsi_id, report.")
@click.option("--classes", type=_FILE, help="JSON {type: {class: [texts]}} instead of ours.")
@click.option("--seed", default=0, show_default=True)
@click.option("--no-pictures", is_flag=True, help="Draw none.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def select_patches(
    coords: Path,
    slides: Path,
    output: Path,
    encoder: str,
    device: str | None,
    batch_size: int,
    quota: int,
    shares: str,
    clusters: str,
    similarity: float,
    cancer_type: str | None,
    cancer_types: Path | None,
    reports: Path | None,
    classes: Path | None,
    seed: int,
    no_pictures: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Choose representative patches of the slides whose coordinates are in the folder COORDS.

    Patches that match descriptions of findings, patches that match the report, and patches from
    every cluster; near-duplicates go. Features are kept in the output folder and reused. Writes
    selection.jsonl, coords/ for `xtuner-add extract`, and pictures/. Exit code 3 if a slide or a
    patch could not be read.
    """
    from pathgen.encoders import open_encoder
    from pathgen.selection_job import SelectionSettings, read_table
    from pathgen.selection_job import select_patches as select
    from xtuner_add.caption_commands import parse_weights

    with user_errors():
        settings = SelectionSettings(
            quota,
            parse_weights(shares, "--shares"),  # type: ignore[arg-type]
            clusters,
            similarity,
            seed,
            str(classes) if classes else None,
            cancer_type,
            batch_size,
            not no_pictures,
        )
        report = select(
            coords,
            slides,
            output,
            open_encoder(encoder, device=device),
            settings,
            cancer_types=read_table(cancer_types, "cancer_type") if cancer_types else None,
            reports=read_table(reports, "report") if reports else None,
            progress=not quiet,
        )
    click.echo(
        f"Wrote {output}: {report.num_patches:,} patches of "
        f"{report.num_slides - len(report.left_out):,} slides; features of {report.num_reused:,} "
        "slides were there already"
    )
    if not report.complete:
        for name, reason in list(report.left_out.items())[:3]:
            click.echo(f"  {name}: {reason}", err=True)
        click.echo(f"All reasons: {output / 'selection.left_out.jsonl'}", err=True)
        raise SystemExit(INCOMPLETE)
