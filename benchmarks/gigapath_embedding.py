"""Compares embedding tiles directly from the slide with embedding image files of tiles.

    OMP_NUM_THREADS=1 python -m benchmarks.gigapath_embedding [--side 8192] [--rounds 3]
    OMP_NUM_THREADS=1 python -m benchmarks.gigapath_embedding --encoder gigapath_tile_enc_dinov2s \
        --ways ours floor [--processes 2]

Makes a slide of real immunohistochemistry (JPEG tiles of 240 px, three levels) and embeds its tiles
of 256 px, by default with an encoder so small that reading and preprocessing dominate. With several
processes, each embeds a copy of the slide. Methods, in turn:

- images: a reimplementation of Prov-GigaPath's pipeline: the region of interest as one array, tiles
  of it, luminance in float16, a PNG per tile by Pillow and a table; then a data loader that opens
  each PNG and transforms it.
- ours, images: `tile_one_slide` and `run_inference_with_tile_encoder`, which do the same.
- ours: the code of `xtuner-add embed`, including coordinates and features on disk, in this process
  with a reading thread.
- floor: decodes each tile once, crops and encodes it; writes nothing.

Reports medians of CPU time, of all processes, and wall time, and ratios within the rounds. Peak
memory is measured in a separate process per method.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import timm
import torch
from PIL import Image
from skimage import data
from skimage.filters import threshold_otsu
from torch import nn

from benchmarks._processor import cpu_seconds, describe
from benchmarks._ratios import Ratio
from gigapath.embed.job import EmbeddingSettings, Placement, embed_slides
from gigapath.embed.tile_inference import TileEncoder, describe_encoder
from gigapath.pipeline import run_inference_with_tile_encoder, tile_one_slide
from gigapath.tile_encoder import ARCHITECTURES, RANDOM, create_model, tile_transform
from wsi.features import fit
from wsi.reader import Region, Slide
from wsi.store import read_features
from wsi.tiling import PatchSpec

TILE = 256
BATCH = 32
SMALL = "small"
_GLASS = 243


def make_slide(path: Path, side: int) -> None:
    """Writes a slide whose right two thirds are tissue."""
    source = data.immunohistochemistry()
    repeats = -(-side // len(source))
    pixels = np.tile(source, (repeats, repeats, 1))[:side, :side].copy()
    pixels[:, : side // 3] = _GLASS
    options: dict[str, Any] = dict(
        tile=(240, 240), photometric="rgb", compression="jpeg", metadata=None
    )
    text = f"Aperio Image Library v11.2.1 \r\n{side}x{side} (240x240) JPEG/RGB Q=80|MPP = 0.5"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description=text, **options)
        tiff.write(pixels[::32, ::32], photometric="rgb", metadata=None)
        for step in (4, 16):
            tiff.write(pixels[::step, ::step], description=text, **options)


def make_encoder(folder: Path, architecture: str = SMALL) -> None:
    """Writes a tile encoder with random weights.

    Args:
        folder: New folder.
        architecture: Name in `gigapath.tile_encoder.ARCHITECTURES`; `SMALL` has about 1/4000 of
            the operations of the published one.
    """
    if architecture == SMALL:
        sizes = dict(img_size=224, patch_size=16, embed_dim=48, depth=2, num_heads=4)
        model_args = {**sizes, "init_values": 1e-5, "mlp_ratio": 5.33334, "num_classes": 0}
        torch.manual_seed(0)
        model = timm.create_model("vit_giant_patch14_dinov2", **model_args)
        name: dict[str, Any] = {
            "architecture": "vit_giant_patch14_dinov2",
            "model_args": model_args,
        }
    else:
        model, name = create_model(RANDOM, architecture), {"architecture": architecture}
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    # The published transform: resize to 256 px, then crop the central 224.
    transform = {
        "input_size": [3, 224, 224],
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    (folder / "config.json").write_text(json.dumps({**name, "pretrained_cfg": transform}))


def open_model(folder: Path) -> nn.Module:
    return TileEncoder.open(describe_encoder(str(folder))).model


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.transform = paths, tile_transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def by_images(slide: Path, encoder: Path, out: Path) -> int:
    """Reimplements the original pipeline."""
    handle = openslide.OpenSlide(str(slide))
    last = handle.level_count - 1
    low = np.asarray(handle.read_region((0, 0), last, handle.level_dimensions[last]))[..., :3]
    grey = low.transpose(2, 0, 1).copy().mean(axis=0, dtype=np.float16)
    threshold = threshold_otsu(grey)
    rows, columns = np.where(grey < threshold)
    scale = handle.level_downsamples[last]
    x, y = int(columns.min() * scale), int(rows.min() * scale)
    width = int((columns.max() + 1) * scale) - x
    height = int((rows.max() + 1) * scale) - y
    roi = np.asarray(handle.read_region((x, y), 0, (width, height)))[..., :3].transpose(2, 0, 1)
    pads = [(-length % TILE // 2, -length % TILE - -length % TILE // 2) for length in roi.shape[1:]]
    roi = np.pad(roi, [(0, 0), *pads], constant_values=255)
    shape = (3, roi.shape[1] // TILE, TILE, roi.shape[2] // TILE, TILE)
    tiles = roi.reshape(shape).transpose(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
    dark = tiles.mean(axis=-3, dtype=np.float16) < threshold
    kept = np.flatnonzero(dark.mean(axis=(-2, -1), dtype=np.float32) > 0.1)
    out.mkdir(parents=True)
    paths = []
    with (out / "dataset.csv").open("w") as file:
        table = csv.writer(file)
        for index in kept.tolist():
            row, column = divmod(index, shape[3])
            left, top = x + TILE * column - pads[1][0], y + TILE * row - pads[0][0]
            paths.append(out / f"{left:05d}x_{top:05d}y.png")
            Image.fromarray(np.moveaxis(tiles[index], 0, -1)).save(paths[-1])
            table.writerow([paths[-1].name, left, top])
    model, found = open_model(encoder), []
    loader = torch.utils.data.DataLoader(_Images(paths), batch_size=BATCH)
    with torch.no_grad():
        for batch in loader:
            found.append(model(batch))
    return len(torch.cat(found))


def ours_by_images(slide: Path, encoder: Path, out: Path) -> int:
    """Embeds a slide by the functions of `gigapath.pipeline`, through tile images on disk."""
    folder = tile_one_slide(slide, out, progress=False)
    paths = sorted(folder.glob("*.png"))
    outputs = run_inference_with_tile_encoder(paths, open_model(encoder), BATCH, progress=False)
    return len(outputs["coords"])


def ours(slide: Path, encoder: Path, out: Path) -> int:
    """Embeds a slide by `embed_slides`, without tile images on disk."""
    settings = EmbeddingSettings(
        describe_encoder(str(encoder)),
        None,
        PatchSpec(TILE, 0.5, min_tissue=0.1),
        batch_size=BATCH,
        pictures=False,
    )
    options: dict[str, Any] = {"engine": "inline"}
    if slide.is_dir():
        options = {"workers": len(list(slide.iterdir()))}
    embed_slides(slide, out, settings, Placement("cpu"), progress=False, **options)
    return sum(len(read_features(path)[1]) for path in (out / "features").rglob("*.h5"))


def floor(slide: Path, encoder: Path, out: Path) -> int:
    """Reads and encodes tiles without finding tissue or writing features: a lower bound."""
    model = TileEncoder(open_model(encoder))
    with Slide(slide) as opened:
        width, height = opened.dimensions
        places = [
            Region(x, y, TILE, TILE)
            for y in range(0, height - TILE + 1, TILE)
            for x in range(width // 3, width - TILE + 1, TILE)
        ]
        batch, number = [], 0
        for pixels in opened.read_many(places):
            batch.append(fit(pixels, model.resize))  # type: ignore[arg-type]
            number += 1
            if len(batch) == BATCH or number == len(places):
                model.encode(np.stack(batch))
                batch = []
    return number


WAYS: dict[str, Callable[[Path, Path, Path], int]] = {
    "images": by_images,
    "ours, images": ours_by_images,
    "ours": ours,
    "floor": floor,
}


def measure(name: str, slide: Path, encoder: Path) -> tuple[float, float, int]:
    """Returns CPU and wall milliseconds per tile, and the number of tiles.

    Args:
        name: Key of `WAYS`.
        slide: A slide, or a folder of slides, each of which gets a process.
        encoder: Folder of the tile encoder.
    """
    with tempfile.TemporaryDirectory(dir=slide.parent) as folder:
        out = Path(folder) / "out"
        wall, cpu = time.perf_counter(), cpu_seconds()
        if slide.is_file() or name == "ours":
            number = WAYS[name](slide, encoder, out)
        else:
            units = [(path, encoder, out / path.stem) for path in sorted(slide.iterdir())]
            with multiprocessing.get_context("fork").Pool(len(units)) as pool:  # as ours does
                number = sum(pool.starmap(WAYS[name], units))
                pool.close()
                pool.join()
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return 1000 * cpu / number, 1000 * wall / number, number


def _peak(name: str, slide: Path, encoder: Path, queue: Any) -> None:
    before = _largest_kib()
    measure(name, slide, encoder)
    queue.put((_largest_kib() - before) / 1024)


def _largest_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss includes the parent's
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def peak_mib(name: str, slide: Path, encoder: Path) -> float:
    """Returns the growth of peak resident memory, in a separate process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, slide, encoder, queue))
    process.start()
    found: float = queue.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192, help="of the slide, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, help="by default a temporary folder")
    parser.add_argument("--encoder", choices=[SMALL, *ARCHITECTURES], default=SMALL)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.side, arguments.rounds = 1536, 1
    ways: list[str] = arguments.ways
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        slide, encoder = Path(folder) / "slide.svs", Path(folder) / "encoder"
        make_slide(slide, arguments.side)
        make_encoder(encoder, arguments.encoder)
        peaks = {name: peak_mib(name, slide, encoder) for name in ways}
        if arguments.processes == 1:
            floor(slide, encoder, Path(folder))  # warm-up: imports, and the file in the page cache
        else:
            slide = _copies(slide, arguments.processes)
        rounds = [
            {name: measure(name, slide, encoder) for name in ways} for _ in range(arguments.rounds)
        ]
    result = []
    print(describe())
    print(
        f"{'method':14} {'tiles':>6} {'CPU ms':>8} {'wall ms':>8} {'CPU, ' + ways[0]:>22} "
        f"{'wall, ' + ways[0]:>22} {'MiB':>6}"
    )
    for name in ways:
        cpu, wall = ([times[name][k] for times in rounds] for k in (0, 1))
        ratios = [
            Ratio.of([times[ways[0]][k] for times in rounds], own)
            for k, own in enumerate((cpu, wall))
        ]
        number = rounds[0][name][2]
        row = {
            "name": name,
            "tiles": number,
            "cpu_ms": statistics.median(cpu),
            "wall_ms": statistics.median(wall),
            "ratio": ratios[0].median,
            "wall_ratio": ratios[1].median,
            "mib": peaks[name],
        }
        result.append(row)
        shown = [f"{ratio:.2f}" for ratio in ratios]
        print(
            f"{name:14} {number:6} {statistics.median(cpu):8.2f} {statistics.median(wall):8.2f} "
            f"{shown[0]:>22} {shown[1]:>22} {peaks[name]:6.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


def _copies(slide: Path, number: int) -> Path:
    """Returns a new folder with copies of a slide."""
    folder = slide.with_name("slides")
    folder.mkdir()
    for index in range(number):
        shutil.copy(slide, folder / f"slide_{index}.svs")
    return folder


if __name__ == "__main__":
    main()
