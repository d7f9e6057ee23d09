"""`xtuner-add tile`, `extract`, `select-patches` and `gdc-manifest`: slides to patches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pathcore.exit_codes import EXIT_FAILED, EXIT_SKIPPED
from pathcore.files import sha256_of
from xtuner_add.commands.options import (
    ANY_PATH,
    COUNT,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    FRACTION,
    POSITIVE,
    Number,
    add_options,
    address_option,
    counted,
    end_of_job,
    engine_option,
    example,
    num_cores,
    num_read_workers,
    output_folder,
    pictures_option,
    quiet_option,
    read_workers_option,
    refuse_unused,
    retry_option,
    user_errors,
    weight_values,
)

if TYPE_CHECKING:
    from pathcore.pool import Engine
    from wsi.requests import PatchRequest, RejectedRow
    from wsi.slide_listing import SlideListing

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _job_options(function: _Function) -> _Function:
    """Adds the options of every job over many slides."""
    options = (
        output_folder,
        click.option(
            "--slide-mpp",
            type=POSITIVE,
            help="Micrometres per pixel of the slides, instead of their metadata.",
        ),
        click.option(
            "--workers",
            type=COUNT,
            default=num_cores,
            help="Number of processes. [default: one per CPU core]",
        ),
        engine_option,
        address_option,
        retry_option,
        quiet_option,
    )
    return add_options(function, options)


def _clean_steps(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """Reads `--clean`; steps in the order in which they are applied."""
    if value is None:
        return ()
    from wsi.artefacts import STEPS

    given = list(STEPS) if value == "all" else [step.strip() for step in value.split(",")]
    for step in given:
        if step not in STEPS:
            raise click.BadParameter(f"{step!r} is no step; known are all, {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in given)


geojson_option = click.option(
    "--geojson", is_flag=True, help="Also write the result as GeoJSON for QuPath."
)


@click.command("tile", epilog=example("tile", "slides/ --output tiles/ --patch-px 256 --mpp 0.5"))
@click.argument("slides", type=ANY_PATH)
@_job_options
@click.option(
    "--patch-px", default=256, show_default=True, help="Side of a patch in pixels, at --mpp."
)
@click.option(
    "--mpp",
    type=POSITIVE,
    default=0.5,
    show_default=True,
    help="Micrometres per pixel of the patches.",
)
@click.option(
    "--overlap-px",
    default=0,
    show_default=True,
    help="Overlap of neighbouring patches in pixels, at --mpp.",
)
@click.option(
    "--min-tissue",
    type=FRACTION,
    default=0.5,
    show_default=True,
    help="Minimum fraction of tissue in a patch.",
)
@click.option(
    "--over-edge",
    is_flag=True,
    help="Include patches that cross the edge of the slide, padded with white.",
)
@click.option(
    "--masks",
    type=ANY_PATH,
    help="Folder of tissue masks: SLIDE.geojson in level-0 pixels, or SLIDE.png. [default: tissue "
    "by Otsu's threshold]",
)
@click.option("--whole-slide", is_flag=True, help="Keep every patch, with or without tissue.")
@click.option(
    "--clean",
    metavar="STEPS",
    callback=_clean_steps,
    help="Clean the tissue: all, or some of pen,edge,fold,blur,specks,holes.",
)
@click.option(
    "--level0",
    is_flag=True,
    help="Cut patches at the resolution of each slide instead of --mpp: --patch-px is in level-0 "
    "pixels, like PathGen's 672.",
)
@click.option(
    "--coords-style",
    type=click.Choice(["trident", "clam"]),
    default="trident",
    show_default=True,
    help="Layout of the coordinate files.",
)
@geojson_option
@click.pass_context
def tile(
    ctx: click.Context,
    slides: Path,
    output: Path,
    slide_mpp: float | None,
    patch_px: int,
    mpp: float,
    overlap_px: int,
    min_tissue: float,
    over_edge: bool,
    masks: Path | None,
    whole_slide: bool,
    clean: tuple[str, ...],
    level0: bool,
    coords_style: str,
    geojson: bool,
    **job: Any,
) -> None:
    """Find the patches with tissue of SLIDES: a folder, a CSV file of slides, or one slide.

    Writes coords/SLIDE.h5, which TRIDENT and CLAM read, and overlays/ and thumbnails/ for
    inspection. With --geojson also tissue_geojson/, which --masks reads back, and patch_geojson/.
    An interrupted run continues when the same command is run again. The exit code is 3 if a slide
    was skipped.
    """
    from wsi.tile_job import TileSettings, tile_slides
    from wsi.tiling import PatchSpec

    if masks and whole_slide:
        raise click.UsageError("--masks and --whole-slide exclude each other")
    if clean and whole_slide:
        raise click.UsageError("--clean and --whole-slide exclude each other")
    if whole_slide:
        refuse_unused(ctx, ("min_tissue",), "with --whole-slide")
    if level0:
        refuse_unused(ctx, ("mpp",), "with --level0")
    with user_errors():
        settings = TileSettings(
            PatchSpec(patch_px, mpp, overlap_px, min_tissue, over_edge),
            masks=str(masks.resolve()) if masks else None,
            whole_slide=whole_slide,
            level0=level0,
            mpp=slide_mpp,
            style=coords_style,  # type: ignore[arg-type]
            geojson=geojson,
            clean=clean,
        )
        report = tile_slides(slides, output, settings, **job)
    end_of_job(report, "slide", output)


@click.command(
    "extract",
    epilog=example(
        "extract",
        "PathGen-1.6M.json --slides slides/ --output patches/",
        "tiles/coords --slides slides/ --output patches/ --layout shards --format jpg",
    ),
)
@click.argument("annotations", type=ANY_PATH)
@_job_options
@click.option("--slides", type=ANY_PATH, required=True, help="Folder or CSV file of the slides.")
@click.option(
    "--patch-px",
    type=click.IntRange(1, 65536),
    help="Side of the annotated patches in level-0 pixels, by default 672. Coordinate files "
    "contain the size.",
)
@click.option(
    "--format", "image_format", type=click.Choice(["png", "jpg", "webp"]), default="png",
    show_default=True,
)  # fmt: skip
@click.option(
    "--quality", type=click.IntRange(1, 100), help="Quality of JPEG and WebP. [default: 90]"
)
@click.option(
    "--layout",
    type=click.Choice(["files", "shards"]),
    default="files",
    show_default=True,
    help="files: SLIDE_X_Y.png and .txt, and pairs.jsonl; shards: WebDataset.",
)
@click.option("--shard-size", type=COUNT, default=1000, show_default=True)
def extract(
    annotations: Path,
    slides: Path,
    output: Path,
    slide_mpp: float | None,
    patch_px: int | None,
    image_format: str,
    quality: int | None,
    layout: str,
    shard_size: int,
    **job: Any,
) -> None:
    """Cut the patches of ANNOTATIONS out of slides, with their captions.

    ANNOTATIONS is PathGen's JSON (an array, or one object per line), or a folder of coordinate
    files that `xtuner-add tile`, TRIDENT or CLAM wrote. An interrupted run continues when the same
    command is run again. If anything was skipped, skipped.jsonl gives the reasons, and the exit
    code is 3.
    """
    from wsi.extraction import OutputSettings
    from wsi.extraction import extract as extract_patches

    def rows() -> Iterable[PatchRequest | RejectedRow]:
        from pathgen.annotations import PATCH_PX, read_annotations

        return read_annotations(annotations, patch_px=patch_px or PATCH_PX)

    if annotations.is_dir() and patch_px:
        raise click.UsageError("--patch-px: coordinate files already contain the size")
    # A part of loose files appears when it is complete, so small parts show progress early and cost
    # nothing. A part in shards is a shard, whose size the user chooses.
    part_size = shard_size if layout == "shards" else min(shard_size, 200)
    with user_errors():
        if not annotations.exists():
            raise FileNotFoundError(f"annotations {annotations}: no such file or folder")
        if annotations.suffix == ".h5":
            raise ValueError(
                f"annotations {annotations}: a file of coordinates; name its folder, "
                f"{annotations.parent}"
            )
        report = extract_patches(
            annotations if annotations.is_dir() else rows,
            slides,
            output,
            settings=OutputSettings(layout, image_format, quality, part_size),  # type: ignore[arg-type]
            source={"sha256": sha256_of(annotations), "patch_px": patch_px},
            mpp=slide_mpp,
            **job,
        )
    end_of_job(report, "patch", output)


@click.command(
    "gdc-manifest", epilog=example("gdc-manifest", "PathGen-1.6M.json manifest.txt --online")
)
@click.argument("annotations", type=ANY_PATH)
@click.argument("output", type=ANY_PATH)
@click.option(
    "--listing",
    type=ANY_PATH,
    help="Manifest saved from the GDC portal; may contain other slides too.",
)
@click.option("--online", is_flag=True, help="Request the ids of the slides from the GDC.")
@click.option("--gdc-url", default="https://api.gdc.cancer.gov", show_default=True)
def gdc_manifest(
    annotations: Path, output: Path, listing: Path | None, online: bool, gdc_url: str
) -> None:
    """Write OUTPUT, the manifest with which gdc-client downloads the slides of ANNOTATIONS.

    The GDC identifies slides by UUIDs, which annotations do not contain; they come from a
    --listing, or from the GDC itself with --online. The exit code is 3 if a slide was not found, or
    a row of ANNOTATIONS is invalid.
    """
    from pathcore.rows import source_and_target
    from pathgen.gdc import ask_gdc, needed_slides, read_listing, write_manifest

    if (listing is None) == (not online):
        raise click.UsageError("give either --listing FILE or --online")
    with user_errors():
        for source in (annotations, *([listing] if listing else [])):
            source_and_target(source, output)
        slide_ids, rejected = needed_slides(annotations)
        files = read_listing(listing) if listing else ask_gdc(slide_ids, url=gdc_url)
        missing = write_manifest(output, slide_ids, files)
    click.echo(f"Wrote {output}: {len(slide_ids) - len(missing)} of {len(slide_ids)} slides")
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        click.echo(f"not found: {names}", err=True)
    for reason, count in rejected.most_common():
        click.echo(f"Skipped {counted(count, 'row')} of {annotations}: {reason}", err=True)
    if missing or rejected:
        raise SystemExit(EXIT_SKIPPED)


@click.command(
    "select-patches",
    epilog=example(
        "select-patches",
        "tiles/coords --slides slides/ --output chosen/ --encoder hf:openai/clip-vit-base-patch32",
    ),
)
@click.argument("coords", type=FOLDER)
@click.option("--slides", type=ANY_PATH, required=True, help="Folder or CSV file of the slides.")
@output_folder
@click.option(
    "--encoder",
    required=True,
    metavar="SPEC",
    help="A preset, hf:MODEL, open_clip:ARCH@WEIGHTS or a folder, with a text encoder.",
)
@click.option("--device", help="Device. [default: all GPUs, if any]")
@click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Patches per batch.")
@click.option(
    "--quota", default=256, show_default=True, help="Maximum number of patches per slide."
)
@click.option(
    "--fractions",
    default="prompt=0.25,report=0.25,cluster=0.5",
    show_default=True,
    help="Fractions of the quota by source.",
)
@click.option(
    "--clusters",
    default="sqrt",
    show_default=True,
    help="A number, sqrt, or published:BATCH for PathGen's formula.",
)
@click.option(
    "--similarity",
    "max_similarity",
    type=Number(),
    default=0.95,
    show_default=True,
    help="Cosine similarity above which two patches are duplicates.",
)
@click.option("--cancer-type", metavar="CODE", help="TCGA code, such as BRCA.")
@click.option(
    "--cancer-types",
    type=FILE,
    help="Cancer types by slide: a JSON object, or lines with wsi_id and cancer_type.",
)
@click.option(
    "--reports", type=FILE, help="Reports by slide: a JSON object, or lines with wsi_id and report."
)
@click.option("--classes", type=FILE, help="Custom prompts: JSON {type: {class: [texts]}}.")
@click.option("--seed", default=0, show_default=True)
@pictures_option
@geojson_option
@click.option(
    "--workers",
    type=COUNT,
    default=1,
    show_default=True,
    help="Number of slides in parallel, each in a process that opens the encoder; on GPUs at most "
    "one per GPU.",
)
@read_workers_option
@engine_option
@address_option
@retry_option
@quiet_option
def select_patches(
    coords: Path,
    slides: Path,
    output: Path,
    encoder: str,
    device: str | None,
    fractions: str,
    classes: Path | None,
    cancer_types: Path | None,
    reports: Path | None,
    read_workers: int | None,
    workers: int,
    engine: Engine,
    address: str | None,
    retry_skipped: bool,
    progress: bool,
    **options: Any,
) -> None:
    """Select representative patches of the slides whose coordinates are in the folder COORDS.

    Takes patches that match descriptions of findings, patches that match the report, and patches
    from every cluster; skips near-duplicates. Writes selection.jsonl, coords/ for `xtuner-add
    extract`, and pictures/. An interrupted run continues when the same command is run again; with
    another quota or the like it selects again from the features/ of the output folder. If a slide
    or a patch was skipped, selection.skipped.jsonl gives the reason, and the exit code is 3.
    """
    from pathcore.device_claims import Placement, choose_device
    from pathgen.selection.job import SelectionSettings, read_table
    from pathgen.selection.job import select_patches as select

    with user_errors():
        device = str(choose_device(device))
        settings = SelectionSettings(
            fractions=weight_values(fractions, "--fractions"),  # type: ignore[arg-type]
            classes=str(classes) if classes else None,
            **options,
        )
        on_gpu = device.startswith("cuda")
        report = select(
            coords,
            slides,
            output,
            encoder,
            settings,
            cancer_types=read_table(cancer_types, "cancer_type") if cancer_types else None,
            reports=read_table(reports, "report") if reports else None,
            placement=Placement(device, num_read_workers(read_workers, workers, on_gpu=on_gpu)),
            retry_skipped=retry_skipped,
            progress=progress,
            workers=workers,
            engine=engine,
            address=address,
        )
    click.echo(f"Selected {counted(report.num_patches, 'patch')}")
    end_of_job(report, "slide", output)


@click.command(
    "conform",
    epilog=example("conform", "features/ --slides slides/ --output converted/"),
)
@click.argument("features", nargs=-1, required=True, type=FILE_OR_FOLDER)
@click.option("--encoder", default="", help="Preset that the features should belong to.")
@click.option(
    "--slides",
    type=FILE_OR_FOLDER,
    help="Folder or CSV file of the slides of the same names, for their size and resolution.",
)
@click.option("--slide-mpp", type=POSITIVE, help="Micrometres per pixel of the slides.")
@click.option("--output", type=ANY_PATH, help="Folder for converted files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per file.")
@click.pass_context
def conform(
    ctx: click.Context,
    features: tuple[Path, ...],
    encoder: str,
    slides: Path | None,
    slide_mpp: float | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Check feature files for known defects, and convert them. FEATURES are files or folders.

    Reads feature files of TRIDENT, CLAM, STAMP, slide2vec and this package. With --output, sound
    files and those whose defects can be repaired are written in the layout of this package and
    TRIDENT, in the subfolders in which they were found. The exit code is 1 if a file has a defect;
    with --output, 3 if a file could not be converted.
    """
    from pathcore.jobs import UnitError
    from wsi.conform import SUFFIXES, FeatureFileError, check, converted, read_feature_file
    from wsi.slide_listing import SlideListing

    # Slides have the same names in the folders of several encoders, so subfolders are kept.
    names = {
        file: file.relative_to(path if path.is_dir() else path.parent).with_suffix(".h5")
        for path in features
        for file in (
            sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
        )
    }
    if not names:
        raise click.UsageError(f"no {' or '.join(SUFFIXES)} in {', '.join(map(str, features))}")
    if output is not None:
        _check_targets({file: output / name for file, name in names.items()})
    defective = 0
    with user_errors():
        listing = SlideListing(slides) if slides else None
        for file, name in names.items():
            described: dict[str, Any] = {"file": str(file)}
            findings, written = [], False
            try:
                size, mpp = _of_slide(listing, file.stem) if listing else (None, None)
                mpp = slide_mpp or mpp
                found = read_feature_file(file)
                described = found.describe()
                findings = check(found, encoder=encoder, slide_px=size, mpp_level0=mpp)
                if output is not None:
                    converted(found, findings, output / name, mpp_level0=mpp)
                    written = True
            except FeatureFileError as error:
                described["error"] = str(error)
            except UnitError as error:  # of the slide
                described["error"] = f"features {file}: {error}"
            problems = [vars(finding) for finding in findings]
            defective += bool("error" in described or (findings and not written))
            if as_json:
                click.echo(json.dumps({**described, "findings": problems, "written": written}))
            else:
                _tell_conformity(described, problems, written)
    if defective:
        ctx.exit(EXIT_SKIPPED if output is not None else EXIT_FAILED)


def _check_targets(targets: dict[Path, Path]) -> None:
    inputs = {file.resolve(): file for file in targets}
    sources: dict[Path, Path] = {}
    for file, target in targets.items():
        resolved = target.resolve()
        if resolved in inputs:
            raise click.UsageError(
                f"{target}: would replace {inputs[resolved]}, which is read; name another --output"
            )
        other = sources.setdefault(resolved, file)
        if other.resolve() != file.resolve():
            raise click.UsageError(
                f"{target}: would be written from {other} and from {file}; convert them into "
                "different folders"
            )


def _of_slide(listing: SlideListing, name: str) -> tuple[tuple[int, int], float | None]:
    """Returns size and resolution of the slide `name`.

    Raises:
        UnitError: If it is missing, ambiguous or unreadable.
    """
    from wsi.reader import Slide

    with Slide(listing.find(name), mpp=listing.mpp.get(name)) as slide:
        return slide.dimensions, slide.known_mpp


def _tell_conformity(
    described: dict[str, Any], problems: list[dict[str, Any]], written: bool
) -> None:
    if "layout" in described:
        names = (
            described["encoder"] or " or ".join(described["encoders_of_this_width"]) or "unknown"
        )
        verdict = "sound" if not problems else counted(len(problems), "defect")
        click.echo(
            f"{described['file']}: {described['layout']}, "
            f"{counted(described['num_tiles'], 'tile')}, {described['dim']} features ({names}): "
            f"{verdict}{', converted' if written else ''}"
        )
    for problem in problems:
        click.echo(f"  {problem['defect']}: {problem['message']}")
    if "error" in described:
        click.echo(f"  {described['error']}")
