"""Compares patch extraction by `xtuner-add extract` with other methods, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.extraction --slides /tmp/slides --work-dir /dev/shm/bench

Makes slides of 24,000 x 22,000 px (JPEG tiles of 256 px, made of real immunohistochemistry), and
extracts patches of 672 px at random, unsorted positions. Methods:

- script: a reimplementation of the script in PathGen's README: one process that reopens the slide
for
  each patch, RGBA as PNG with Pillow's defaults, two files per patch. It extracts every n-th patch,
  since its time per patch does not depend on the others.
- openslide: open handles, sorted positions, two processes, our image encoder, one file per patch.
- trident: reads like TRIDENT: open handle, its own order (columns), RGB by Pillow; otherwise as
above.
- ours: files and shards, including sorting, manifest and fsync.
- floor: two processes that decode each required tile once and encode; they write nothing.

Reports the time per patch: medians over the rounds, and ratios within them. Wall time depends on
the load of the machine, so CPU seconds of all processes are reported too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._processor import cpu_seconds
from pathgen.annotations import read_annotations
from wsi.extraction import OutputSettings, extract
from wsi.image_codecs import encoder
from wsi.reader import Region, Slide

PATCH_PX = 672
_TILE = 256
_CAPTION = "The tissue shows irregular glandular structures with hyperchromatic nuclei. " * 4
_ANNOTATIONS = """
import json, sys, time
from pathlib import Path
from pathcore.files import sha256_of
from benchmarks._processor import cpu_seconds
from pathgen.annotations import read_annotations
from wsi.requests import RequestTable
def peak_kib():
    lines = open("/proc/self/status").read().splitlines()  # ru_maxrss is the parent's, too
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
source, path, before = sys.argv[1], Path(sys.argv[2]), peak_kib()
moments = [time.process_time()]
number = sum(1 for _ in read_annotations(source))
moments.append(time.process_time())
RequestTable.build(path, read_annotations(source))
moments.append(time.process_time())
sha256_of(source)
with RequestTable(path) as table:
    table.parts_with_requests(1000), len(table)
    moments.append(time.process_time())
    for part in range(-(-number // 1000)):  # a later run reads the unfinished ones only
        table.part(part, 1000)
    moments.append(time.process_time())
seconds = [end - start for start, end in zip(moments, moments[1:])]
print(json.dumps([number, (peak_kib() - before) / 1024, *seconds]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slides", type=Path, default=Path("work_dirs/bench_extraction/slides"))
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/bench_extraction/out"))
    parser.add_argument("--num-slides", type=int, default=3)
    parser.add_argument("--num-patches", type=int, default=2000)
    parser.add_argument("--script-patches", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3, help="0: annotations alone")
    parser.add_argument("--side-px", type=int, default=24_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--annotations", type=int, default=400_000, help="rows to read and sort; 0: none"
    )
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_slides, arguments.num_patches, arguments.side_px = 2, 40, 3000
        arguments.script_patches, arguments.rounds, arguments.annotations = 4, 1, 2000
    results: list[dict[str, Any]] = []
    if arguments.rounds:
        slides = make_slides(arguments.slides, arguments.num_slides, arguments.side_px)
        rows = make_rows(slides, arguments.num_patches)
        for image_format in ("png", "jpg"):  # no imports and first calls in the measurement
            floor((rows[:4], arguments.slides, arguments.work_dir, image_format))
        for number in range(arguments.rounds):
            results += one_round(arguments, slides, rows, number)
        summarise(results)
    sizes = (arguments.annotations // 4, arguments.annotations) if arguments.annotations else ()
    annotations = [measure_annotations(arguments, number) for number in sizes]
    for number, mib, read, build, again, parts in annotations:
        print(
            f"{number:,} annotations: read in {read:.1f} CPU s, read and sorted in {build:.1f}, "
            f"found again in {again:.1f}, all read back in {parts:.1f}; {mib:.0f} MiB above the "
            "start"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": results, "annotations": annotations}))


def make_slides(folder: Path, number: int, side_px: int) -> list[Path]:
    """Writes synthetic SVS files tile by tile; existing files are kept."""
    import tifffile
    from skimage import data

    mirrored = ((0, 512), (0, 512), (0, 0))
    source = np.pad(data.immunohistochemistry(), mirrored, mode="symmetric")
    width, height = side_px, side_px * 11 // 12
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"TCGA-00-000{n}-01Z-00-DX1.{side_px}.svs" for n in range(number)]
    for seed, path in enumerate(paths):
        if path.is_file():
            continue
        generator = np.random.default_rng(seed)

        def tiles(generator: np.random.Generator = generator) -> Iterator[Any]:
            for _ in range(-(-height // _TILE) * -(-width // _TILE)):
                y, x = generator.integers(0, 1024 - _TILE, 2)
                yield source[y : y + _TILE, x : x + _TILE]

        partial = path.with_suffix(".partial")
        tifffile.imwrite(
            partial,
            tiles(),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(_TILE, _TILE),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 80},
            description=f"Aperio Image Library v11\r\n{width}x{height}|AppMag = 40|MPP = 0.25",
            metadata=None,
        )
        partial.rename(path)
    return paths


def make_rows(slides: list[Path], number: int) -> list[dict[str, Any]]:
    """Draws annotations at random positions, equally many per slide, in random order."""
    generator = random.Random(0)
    rows = []
    sizes = {}
    for path in slides:
        with Slide(path) as slide:
            sizes[path.stem] = slide.dimensions
    for n in range(number):
        stem = slides[n % len(slides)].stem
        width, height = sizes[stem]
        position = [generator.randrange(width - PATCH_PX), generator.randrange(height - PATCH_PX)]
        rows.append({"wsi_id": stem, "position": list(map(str, position)), "caption": _CAPTION})
    generator.shuffle(rows)
    return rows


def one_round(
    arguments: argparse.Namespace, slides: list[Path], rows: list[dict[str, Any]], number: int
) -> Iterator[dict[str, Any]]:
    """Runs every way of extraction once; yields wall and CPU milliseconds per patch."""
    folder, out = slides[0].parent, arguments.work_dir
    annotations = out.with_name(f"{out.name}.json")
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(rows))
    few = rows[:: max(1, len(rows) // arguments.script_patches)]

    def ours(layout: str, image_format: str) -> None:
        size = 200 if layout == "files" else 250
        extract(
            lambda: read_annotations(annotations),
            folder,
            out,
            settings=OutputSettings(layout, image_format, part_size=size),  # type: ignore[arg-type]
            source={},
            workers=arguments.workers,
            progress=False,
        )

    def parallel(way: Callable[[Any], None], image_format: str) -> None:
        jobs = [(part, folder, out, image_format) for part in cut(rows, 8)]
        with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
            pool.map(way, jobs, chunksize=1)

    ways: dict[str, tuple[int, Callable[[], None]]] = {
        "script, png": (len(few), lambda: published_script(few, folder, out))
    }
    for image_format in ("png", "jpg"):
        ways |= {
            f"{name}, {image_format}": (len(rows), lambda w=way, f=image_format: parallel(w, f))  # type: ignore[misc]
            for name, way in (
                ("openslide", openslide_kept),
                ("trident", as_trident),
                ("floor", floor),
            )
        }
        ways |= {
            f"ours {layout}, {image_format}": (
                len(rows),
                lambda lay=layout, f=image_format: ours(lay, f),  # type: ignore[misc]
            )
            for layout in ("files", "shards")
        }
    for name, (count, way) in ways.items():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start, cpu = time.perf_counter(), cpu_seconds()
        way()
        wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        shutil.rmtree(out)
        row = {"round": number, "way": name, "patches": count}
        row |= {"wall_ms": 1000 * wall / count, "cpu_ms": 1000 * cpu / count}
        print(
            *(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
            flush=True,
        )
        yield row
    annotations.unlink()


def cut(rows: list[dict[str, Any]], number: int) -> list[list[dict[str, Any]]]:
    """Sorts rows by slide and position, and divides them into parts of equal size."""
    ordered = sorted(
        rows, key=lambda r: (r["wsi_id"], int(r["position"][1]), int(r["position"][0]))
    )
    size = -(-len(ordered) // number)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def published_script(rows: list[dict[str, Any]], folder: Path, out: Path) -> None:
    """Extracts patches like the script in PathGen's README."""
    import openslide

    for row in rows:
        slide = openslide.OpenSlide(str(folder / f"{row['wsi_id']}.svs"))
        x, y = map(int, row["position"])
        patch = slide.read_region((x, y), 0, (PATCH_PX, PATCH_PX))
        stem = f"{row['wsi_id']}_{x}_{y}"
        patch.save(out / f"{stem}.png")
        (out / f"{stem}.txt").write_text(row["caption"])


def openslide_kept(job: tuple[list[dict[str, Any]], Path, Path, str]) -> None:
    """Extracts patches with OpenSlide, each slide opened once."""
    import openslide

    rows, folder, out, image_format = job
    encode = encoder(image_format)
    for slide_id, group in groupby(rows, key=lambda row: row["wsi_id"]):
        with openslide.OpenSlide(str(folder / f"{slide_id}.svs")) as slide:
            for row in group:
                x, y = map(int, row["position"])
                pixels = np.asarray(slide.read_region((x, y), 0, (PATCH_PX, PATCH_PX)))
                save(row, encode(np.ascontiguousarray(pixels[..., :3])), out, image_format)


def as_trident(job: tuple[list[dict[str, Any]], Path, Path, str]) -> None:
    """Extracts patches in the order and with the conversion of TRIDENT's patcher."""
    import openslide

    rows, folder, out, image_format = job
    encode = encoder(image_format)
    rows = sorted(rows, key=lambda r: (r["wsi_id"], int(r["position"][0]), int(r["position"][1])))
    for slide_id, group in groupby(rows, key=lambda row: row["wsi_id"]):
        with openslide.OpenSlide(str(folder / f"{slide_id}.svs")) as slide:
            for row in group:
                x, y = map(int, row["position"])
                image = slide.read_region((x, y), 0, (PATCH_PX, PATCH_PX)).convert("RGB")
                save(row, encode(np.array(image)), out, image_format)


def save(row: dict[str, Any], image: bytes, out: Path, image_format: str) -> None:
    """Writes image and caption of a patch, as the published script names them."""
    stem = f"{row['wsi_id']}_{'_'.join(row['position'])}"
    (out / f"{stem}.{image_format}").write_bytes(image)
    (out / f"{stem}.txt").write_text(row["caption"])


def floor(job: tuple[list[dict[str, Any]], Path, Path, str]) -> None:
    """Reads and encodes patches without writing them: a lower bound for any way."""
    rows, folder, _, image_format = job
    encode = encoder(image_format)
    for slide_id, group in groupby(rows, key=lambda row: row["wsi_id"]):
        with Slide(folder / f"{slide_id}.svs") as slide:
            corners = [map(int, row["position"]) for row in group]
            regions = [Region(left, top, PATCH_PX, PATCH_PX) for left, top in corners]
            for pixels in slide.read_many(regions):
                assert isinstance(pixels, np.ndarray)
                encode(pixels)


def measure_annotations(
    arguments: argparse.Namespace, number: int
) -> tuple[int, float, float, float, float, float]:
    """Measures, in a separate process, what a run does with annotations before the first patch.

    Returns:
        Number of annotations, peak memory in MiB, and CPU seconds to read them, to read and sort
        them, to find the sorted ones in a later run, and to read them all back.
    """
    path = arguments.work_dir.with_name("many.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for n in range(number):
            row = {"wsi_id": f"TCGA-{n * 7919 % 7300:04d}", "caption": _CAPTION}
            row["position"] = [str(n * 31 % 99_991), str(n * 17 % 99_989)]  # type: ignore[assignment]
            file.write(("[" if n == 0 else ",") + json.dumps(row))
        file.write("]")
    table = path.with_suffix(".sqlite")
    command = [sys.executable, "-c", _ANNOTATIONS, str(path), str(table)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    path.unlink()
    table.unlink()
    count, mib, read, build, again, parts = json.loads(result.stdout)
    return count, mib, read, build, again, parts


def summarise(results: list[dict[str, Any]]) -> None:
    """Prints medians, and ratios to the published script and to the floor, over the rounds."""
    for measure in ("wall_ms", "cpu_ms"):
        by_way: dict[str, list[float]] = {}
        for row in results:
            by_way.setdefault(row["way"], []).append(row[measure])
        script = by_way["script, png"]
        for way, times in by_way.items():
            floor_times = by_way[f"floor, {way.split(', ')[1]}"]
            speedups = sorted(s / t for s, t in zip(script, times, strict=True))
            shares = sorted(f / t for f, t in zip(floor_times, times, strict=True))
            print(
                f"{measure} {way:17} median {statistics.median(times):7.2f}, "
                f"{statistics.median(speedups):5.1f} times faster than the script "
                f"({speedups[0]:.1f} to {speedups[-1]:.1f}), {statistics.median(shares):.2f} of "
                f"the floor ({shares[0]:.2f} to {shares[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
