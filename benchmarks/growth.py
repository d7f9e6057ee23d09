"""How time and memory of commands grow with the size of their input.

    OMP_NUM_THREADS=1 python -m benchmarks.growth [--job NAME] [--largest N] [--rounds 3]

Every command runs as a process of its own, on three sizes, each four times the last. Time and
memory are those that the system reports for the process and its children. Time per item that stays
the same means linear growth; the time of an empty run, which is mostly imports, is the intercept of
the line through the smallest and the largest size.

Inputs are made up and written first, outside the measured time: captions of random words, in which
one in twenty repeats another; a slide that is read in patches of 64 px; an encoder of 32 px.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click
from tabulate import tabulate

from pathcore.exit_codes import EXIT_SKIPPED
from pathcore.rows import write_rows

_CLI = ["-m", "xtuner_add.cli"]
_STEPS = 3
_FACTOR = 4
_SLIDE_PX = 24_000
_PATCH_PX = 64
_NUM_LOADED = 2_000
"""Samples that the data loader's run draws, whatever the number of rows."""


@dataclass(frozen=True)
class Growth:
    """One command at one size.

    Attributes:
        job: Name of the job.
        size: Number of items.
        wall_s: Time until the command ends.
        cpu_s: Processor time of the command and its children.
        peak_mib: Peak resident memory of the largest of these processes.
    """

    job: str
    size: int
    wall_s: float
    cpu_s: float
    peak_mib: float


@dataclass(frozen=True)
class Job:
    """A command whose input can have any size.

    Attributes:
        unit: What is counted.
        largest: Default of the largest size.
        prepare: Writes the input into a folder, and returns the arguments of Python.
    """

    unit: str
    largest: int
    prepare: Callable[[Path, int], list[str]]


def captions(number: int) -> Iterator[str]:
    """Yields captions of 25 to 45 random words; one in twenty repeats an earlier one."""
    generator = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfklmnprst" for b in ("a", "e", "io", "u") for c in
             ("din", "ler", "mas", "nor", "pex", "rit", "sol", "tum")]  # fmt: skip
    kept: list[str] = []
    for index in range(number):
        if index % 20 == 19:
            yield generator.choice(kept)
            continue
        caption = " ".join(generator.choices(words, k=generator.randint(25, 45)))
        if len(kept) < 5_000:
            kept.append(caption)
        yield caption


def _pairs(folder: Path, number: int) -> Path:
    rows = ({"id": f"{i}", "wsi_id": f"s{i // 200}", "image": f"{i}.png", "caption": text}
            for i, text in enumerate(captions(number)))  # fmt: skip
    write_rows(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def prepare_filter(folder: Path, number: int) -> list[str]:
    """Captions for `filter-captions`, with all steps."""
    return [*_CLI, "filter-captions", str(_pairs(folder, number)), str(folder / "kept.jsonl")]


def prepare_clean(folder: Path, number: int) -> list[str]:
    """Pairs for `clean-pairs`, with the steps that read captions only."""
    options = ["--steps", "words,pathology,human", "--min-words", "20"]
    return [*_CLI, "clean-pairs", str(_pairs(folder, number)), str(folder / "clean"), *options]


def prepare_score(folder: Path, number: int) -> list[str]:
    """Questions, half closed and half open, with answers of which some are wrong."""
    generator = random.Random(0)
    organs = ["liver", "kidney", "lymph node", "large intestine", "thyroid gland"]
    questions, answers = {}, []
    for index in range(number):
        choices = ["yes", "no"] if index % 2 else organs
        image, answer = f"{index // 4}.png", generator.choice(choices)
        questions[f"q{index}"] = {
            "question": f"What does field {index % 97} show?",
            "image": image,
            "answer": answer,
        }
        answers.append({"question_id": f"q{index}", "answer": generator.choice(choices)})
    (folder / "test.json").write_text(json.dumps(questions))
    (folder / "answers.json").write_text(json.dumps(answers))
    return [
        *_CLI, "score", "pathvqa", "--data", str(folder / "test.json"),
        "--answers", str(folder / "answers.json"), "--work-dir", str(folder / "scored"),
    ]  # fmt: skip


def _slide(folder: Path) -> Path:
    from benchmarks.extraction import make_slides

    return make_slides(folder, 1, _SLIDE_PX)[0]


def prepare_extract(folder: Path, number: int) -> list[str]:
    """Annotations at random positions of a slide."""
    slide, generator = _slide(folder.parent / "slides"), random.Random(0)
    rows = (
        {
            "wsi_id": slide.stem,
            "position": [
                str(generator.randrange(_SLIDE_PX - _PATCH_PX)),
                str(generator.randrange(_SLIDE_PX * 11 // 12 - _PATCH_PX)),
            ],
            "caption": text,
        }
        for text in captions(number)
    )
    write_rows(folder / "annotations.jsonl", rows)
    options = ["--patch-px", str(_PATCH_PX), "--format", "jpg", "--layout", "shards"]
    return [
        *_CLI, "extract", str(folder / "annotations.jsonl"),
        "--slides", str(slide.parent), "--output", str(folder / "patches"),
        "--workers", "1", "--quiet", *options,
    ]  # fmt: skip


def _tiny_encoder(folder: Path) -> Path:
    """Writes the weights of a vision transformer of 32 px, as timm's hub stores them."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    settings = {
        "architecture": "test_vit",
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": "token",
        "model_args": {"img_size": 32},
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def prepare_embed(folder: Path, number: int) -> list[str]:
    """A slide with so many overlapping tiles."""
    import numpy as np

    from wsi.reader import Slide
    from wsi.store import write_coordinates
    from wsi.tiling import PatchSpec, Tiling

    path = _slide(folder.parent / "slides")
    with Slide(path) as slide:
        width, height = (side - _PATCH_PX for side in slide.dimensions)
        columns = max(1, round((number * width / height) ** 0.5))
        places = np.arange(number)
        rows = -(-number // columns)
        coords = np.stack([places % columns * width // columns, places // columns * height // rows])
        (folder / "coords").mkdir()
        tiling = Tiling(coords.T, _PATCH_PX, PatchSpec(32, 0.5))
        write_coordinates(folder / "coords" / f"{path.stem}.h5", slide, tiling)
    return [
        *_CLI, "embed", str(path.parent), "--output", str(folder / "out"),
        "--coords", str(folder / "coords"), "--tile-encoder", str(_tiny_encoder(folder / "vit")),
        "--slide-encoder", "none", "--batch-size", "128",
        "--no-pictures", "--quiet",
    ]  # fmt: skip


def prepare_load(folder: Path, number: int) -> list[str]:
    """Conversations that a training's data set tokenises; then some are drawn."""
    from PIL import Image

    (folder / "images").mkdir()
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "images" / "0.png")
    rows = (
        {
            "id": str(index),
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is shown?"},
                {"from": "gpt", "value": text},
            ],
        }
        for index, text in enumerate(captions(number))
    )
    write_rows(folder / "conversations.jsonl", rows)
    return ["-m", "benchmarks.growth", "--load", str(folder)]


def load(folder: Path) -> None:
    """Builds a training's data set and draws samples in random order."""
    from pathcore.deferred_imports import defer_imports

    defer_imports()  # as `xtuner-add train` does
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
    from xtuner.dataset.map_fns import template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    from pallava.dataset import LLaVADataset
    from pallava.engine.runtime import prepare_host
    from pallava.text.encoding import interleaved_map_fn

    prepare_host()
    names = sorted({word for caption in captions(5_000) for word in caption.split()})
    vocabulary = {"<unk>": 0, "<end>": 1, **{name: n for n, name in enumerate(names, 2)}}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    data = LLaVADataset(
        folder / "images",
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        data_path=folder / "conversations.jsonl",
        tokenizer=tokenizer,
        dataset_map_fn=interleaved_map_fn,
        template_map_fn=template_map_fn_factory(template=PROMPT_TEMPLATE.default),
        skip_log=folder / "skipped.jsonl",
        map_num_proc=1,
    )
    generator = random.Random(0)
    start = time.process_time()
    for _ in range(_NUM_LOADED):
        data[generator.randrange(len(data))]
    drawn_us = (time.process_time() - start) / _NUM_LOADED * 1e6
    click.echo(f"{len(data)} samples; {drawn_us:.0f} us to draw one", err=True)


JOBS = {
    "extract": Job("patches", 256_000, prepare_extract),
    "embed": Job("tiles", 1_000_000, prepare_embed),
    "filter-captions": Job("rows", 400_000, prepare_filter),
    "clean-pairs": Job("rows", 1_600_000, prepare_clean),
    "score": Job("questions", 400_000, prepare_score),
    "train's data set": Job("rows", 400_000, prepare_load),
}


def measure(name: str, size: int, folder: Path) -> Growth:
    """Runs a job once on an input of a size.

    Raises:
        click.ClickException: If the command fails.
    """
    place = folder / f"{name.split()[-1]}_{size}"
    place.mkdir()
    # The system counts the memory of this process as that of its children, so that it must not
    # import what some inputs take to make.
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as maker:
        arguments = maker.submit(JOBS[name].prepare, place, size).result()
    with (place / "log.txt").open("wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, EXIT_SKIPPED):  # two random patches may be the same
        raise click.ClickException(f"{name}: {(place / 'log.txt').read_text()[-2000:]}")
    shutil.rmtree(place)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Growth(name, size, wall_s, cpu_s, usage.ru_maxrss / 1024)


def table(found: Sequence[Growth]) -> str:
    """Formats medians over the rounds, and the time for each further item with its range."""
    rows, last = [], None
    for job, size in dict.fromkeys((one.job, one.size) for one in found):
        mine = [one for one in found if (one.job, one.size) == (job, size)]
        further = ""
        if last and last[0].job == job:
            costs = [
                (one.cpu_s - before.cpu_s) / (size - before.size) * 1e6
                for before, one in zip(last, mine, strict=True)
            ]
            further = f"{median(costs):.1f} ({min(costs):.1f} to {max(costs):.1f})"
        wall_s, cpu_s = (median(getattr(one, name) for one in mine) for name in ("wall_s", "cpu_s"))
        peak_mib = median(one.peak_mib for one in mine)
        rows.append(
            [job, f"{size:,} {JOBS[job].unit}", f"{wall_s:.1f}", f"{cpu_s:.1f}", further,
             f"{peak_mib:,.0f}"]
        )  # fmt: skip
        last = mine
    headers = ["job", "size", "wall s", "CPU s", "us for each more", "peak MiB"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(found: Sequence[Growth], path: Path) -> None:
    """Draws wall time, processor time and memory over size, on logarithmic axes."""
    from matplotlib.figure import Figure

    from pathcore.figures import save_figure

    figure = Figure(figsize=(10, 3.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3)
    labels = {
        "wall_s": "wall time, s",
        "cpu_s": "processor time, s",
        "peak_mib": "peak memory, MiB",
    }
    for axes, (field, label) in zip(panels, labels.items(), strict=True):
        for name in dict.fromkeys(one.job for one in found):
            values = defaultdict(list)
            for one in found:
                if one.job == name:
                    values[one.size].append(getattr(one, field))
            medians = [median(mine) for mine in values.values()]
            axes.plot(list(values), medians, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="items", title=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    save_figure(figure, path)


@click.command()
@click.option("--job", "names", multiple=True, type=click.Choice(list(JOBS)), default=list(JOBS))
@click.option("--largest", type=click.IntRange(_FACTOR ** (_STEPS - 1)), help="Largest size.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the curves here, as PNG.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--load", "folder", type=click.Path(path_type=Path), hidden=True)
def main(
    names: tuple[str, ...],
    largest: int | None,
    rounds: int,
    picture: Path | None,
    json_file: Path | None,
    folder: Path | None,
) -> None:
    """Measure how commands grow with their input."""
    if folder is not None:
        load(folder)
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:  # runs share the slide
        for name, _, step in itertools.product(names, range(rounds), reversed(range(_STEPS))):
            top = largest or JOBS[name].largest
            found.append(measure(name, top // _FACTOR**step, Path(scratch)))
            click.echo(found[-1], err=True)
    click.echo(table(found))
    click.echo(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if picture is not None:
        draw(found, picture)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
