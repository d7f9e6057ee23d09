"""Compares PA-LLaVA's image preparation with a Hugging Face image processor called per sub-image.

    OMP_NUM_THREADS=1 python -m benchmarks.image_input

Both sides cut the same thumbnail and sub-images and give the same pixel values, which is checked
first. Times are processor time on one core.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from transformers import CLIPImageProcessor

from benchmarks._ratios import Ratio
from pallava.anyres import CLIP_MEAN, CLIP_STD, AnyRes, split_image

SIZES_PX = ((500, 400), (1024, 768), (1600, 1200))
"""About the sizes of PathVQA's and PMC-VQA's figures, and a photograph."""

TILE_PX = 224


def encode_jpeg(width_px: int, height_px: int) -> bytes:
    """Returns a JPEG of smooth noise, which takes as long to decode as a photograph."""
    rng = np.random.default_rng(width_px)
    noise = rng.integers(0, 255, (height_px // 8, width_px // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(noise).resize((width_px, height_px), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(jpeg: bytes) -> Image.Image:
    """Decodes a JPEG to RGB."""
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def process_each(image: Image.Image) -> Tensor:
    """Prepares each tile by `CLIPImageProcessor`, as the published code does."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": TILE_PX}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    tiles = split_image(image, TILE_PX, "largest_scale")
    values = [processor.preprocess(tile, return_tensors="pt")["pixel_values"] for tile in tiles]
    return torch.cat(values)


def measure(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Runs the cases in turn; returns milliseconds of processor time by case and round."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if number:  # the first round is a warm-up
                taken[name].append(1000 * (time.process_time() - start))
    return taken


@click.command()
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="One small image: shows that it runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(rounds: int, quick: bool, json_file: Path | None) -> None:
    """Measure decoding and preparation of images of several sizes."""
    torch.set_num_threads(1)
    anyres = AnyRes(tile_px=TILE_PX, ties="largest_scale")
    rows, figures = [], []
    for size in SIZES_PX[: 1 if quick else None]:
        jpeg = encode_jpeg(*size)
        image = decode(jpeg)
        difference = float((process_each(image) - anyres(image)).abs().max())
        if not difference < 1e-5:
            raise click.ClickException(f"{size}: the two sides differ by {difference}")
        taken = measure(
            {
                "decode": lambda jpeg=jpeg: decode(jpeg),  # type: ignore[misc]
                "cut": lambda image=image: split_image(image, TILE_PX, "largest_scale"),  # type: ignore[misc]
                "ours": lambda jpeg=jpeg: anyres(decode(jpeg)),  # type: ignore[misc]
                "per tile": lambda jpeg=jpeg: process_each(decode(jpeg)),  # type: ignore[misc]
            },
            2 if quick else rounds,
        )
        median = {name: statistics.median(values) for name, values in taken.items()}
        name, ratio = f"{size[0]} x {size[1]}", Ratio.of(taken["per tile"], taken["ours"])
        figures.append({"name": name, "cpu_ms": median, "ratio": ratio.median})
        rows.append(
            [
                name,
                anyres.num_sub_images(*size),
                *(f"{median[name]:.1f}" for name in ("decode", "cut", "ours", "per tile")),
                f"{1000 / median['ours']:.0f}",
                f"{ratio:.1f}",
            ]
        )
    headers = ["image, px", "sub-images", "decode, ms", "cut, ms", "ours, ms", "per tile, ms"]
    click.echo(tabulate(rows, [*headers, "images/s/core", "speed-up"], tablefmt="github"))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
