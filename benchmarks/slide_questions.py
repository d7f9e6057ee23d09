"""Measures whether a model learns questions about whole slides, and from which signal.

Run by ``python -m benchmarks.slide_questions``. Slides are regions of a real slide's map, as bags
of tile features (`slide_map.py`), a small language model learns the vocabulary from text, and
`demo_slide_questions` trains connector, projection and LoRA on them through ``xtuner-add train``.
Held-out questions are then asked with the slide itself, with the slide of another question with the
same words, and with the positions of the slide's tiles shuffled. ``--sizes`` instead measures one
full-size step on slides of 1,000 to 100,000 tiles.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks import slide_map
from pathcore.stats import mean_interval
from xtuner_add.demo.pallava.answers import exchanged_images

CONFIG = "demo_slide_questions"
WAYS = ("itself", "exchanged", "displaced")
"""With its own slide, with another question's, with its own tiles in exchanged places."""

SIZES = (1_000, 10_000, 100_000)
_BATCH = 64
_EXAMPLES = 3


def train_language_model(folder: Path, seed: int, steps: int) -> None:
    """Trains a small Llama on questions about slides, with random answers."""
    from xtuner_add.demo.language_model import LanguageModelSizes, train

    sizes = LanguageModelSizes(hidden_size=96, intermediate_size=192, num_layers=3, steps=steps)
    train(slide_map.corpus(seed), folder, sizes, seed)


def train(folder: Path, steps: int | None) -> str:
    """Trains and converts the model in the folder; returns the log."""
    arguments = ["train", CONFIG, "--seed", "0", "--work-dir", "training"]
    if steps is not None:
        lengths = [f"train_cfg.max_iters={steps}", f"param_scheduler.1.end={steps}"]
        arguments += ["--cfg-options", *lengths]
    log = _run(folder, arguments)
    last = (folder / "training" / "last_checkpoint").read_text().strip()
    _run(folder, ["convert", "pth_to_hf", CONFIG, last, "model", "--fp32"])
    return log


def ask(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Asks every held-out question in all conditions; returns the rows with the answers."""
    import torch

    from pallava import load_model
    from pallava.slide_bags import read_bag

    model = load_model(folder / "llm", folder / "model")
    lines = (folder / "data" / "held_out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rng = np.random.default_rng([seed, 7])
    slides = {
        "itself": [row["slide"] for row in rows],
        "exchanged": exchanged_images(rows, rng, "slide"),
    }
    names = sorted(set(slides["itself"]))
    bags = {name: read_bag(folder / "data" / "features" / f"{name}.h5") for name in names}
    displaced = {
        name: bag._replace(positions=bag.positions[torch.from_numpy(rng.permutation(len(bag[0])))])
        for name, bag in bags.items()
    }
    for way in WAYS:
        for start in tqdm(range(0, len(rows), _BATCH), way, leave=False):
            part = range(start, min(start + _BATCH, len(rows)))
            shown = displaced if way == "displaced" else bags
            replies = model.answer_encoded(
                [model.encode(rows[i]["question"], has_image=True) for i in part],
                [shown[slides.get(way, slides["itself"])[i]] for i in part],
                max_new_tokens=8,
            )
            for i, reply in zip(part, replies, strict=True):
                rows[i][way] = reply
    return rows


def draw_examples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws `examples.png`: held-out slides, attention of the connector, questions and answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    from pallava import load_model
    from pallava.modeling.attention_maps import tile_attention
    from pallava.slide_bags import read_bag

    model = load_model(folder / "llm", folder / "model")
    region_map, regions = slide_map.read_regions(folder / "data")
    kinds_asked = defaultdict(set)
    for row in rows:
        kinds_asked[row["slide"]].add(row["kind"])
    names = sorted(kinds_asked, key=lambda name: -len(kinds_asked[name]))[:_EXAMPLES]
    figure, axes = plt.subplots(3, len(names), figsize=(5 * len(names), 8), height_ratios=(3, 3, 2))
    colours = ListedColormap(["white", *slide_map.COLOURS])
    for name, column in zip(names, axes.T, strict=True):
        areas = regions[name].seen(region_map.areas)
        bag = read_bag(folder / "data/features" / f"{name}.h5")
        columns, lines = bag.positions.long().T.numpy()
        attention = tile_attention(model.model, bag)
        kinds, seen = np.full(areas.shape[:2], -1), np.full(areas.shape[:2], np.nan)
        kinds[lines, columns] = areas[lines, columns].argmax(axis=-1)
        seen[lines, columns] = 0 if attention is None else attention.numpy() * len(attention)
        column[0].imshow(kinds, cmap=colours, vmin=-1, vmax=len(slide_map.NAMES) - 1)
        column[1].imshow(seen, cmap="viridis")
        texts = [
            f"{row['question']} {row['itself']}"
            + ("" if row["itself"] == row["answer"] else f"  (is: {row['answer']})")
            for row in rows
            if row["slide"] == name
        ]
        column[2].text(0, 1, "\n".join(texts), va="top", fontsize=8)
        for axis in column:
            axis.axis("off")
    axes[0, 0].set_title("most of each tile", loc="left", fontsize=9)
    axes[1, 0].set_title("attention to the tiles", loc="left", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in slide_map.COLOURS]
    figure.legend(handles, slide_map.NAMES, loc="upper center", ncol=6, fontsize=9, frameon=False)
    figure.savefig(folder / "examples.png", dpi=100, bbox_inches="tight")


def share_interval(
    rows: Sequence[Mapping[str, Any]], hits: Sequence[bool]
) -> tuple[float, float, float]:
    """Returns the share of the rows that are hits, with its 95 % interval.

    Regions in one block of the slide overlap, so blocks are resampled.
    """
    low, high = mean_interval(hits, [row["block"] for row in rows])
    return sum(hits) / len(hits), low, high


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns accuracy with its 95 % interval for every kind of question and condition."""
    summary: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        part = [row for row in rows if row["kind"] == kind]
        by_text: dict[str, Counter[str]] = defaultdict(Counter)
        for row in part:
            by_text[row["question"]][row["answer"]] += 1
        most = sum(counts.most_common(1)[0][1] for counts in by_text.values())
        summary[kind] = {"questions": len(part), "majority": most / len(part)}
        for way in WAYS:
            right = [row[way].strip().lower() == row["answer"] for row in part]
            summary[kind][way] = share_interval(part, right)
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the summary as Markdown."""
    lines = [
        "| question | n | slide itself | slides exchanged | tiles displaced | majority |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in summary.items():
        cells = [f"{a:.3f} ({low:.3f} to {high:.3f})" for a, low, high in (row[w] for w in WAYS)]
        lines.append(
            f"| {kind} | {row['questions']} | {' | '.join(cells)} | {row['majority']:.3f} |"
        )
    return "\n".join(lines)


def measure(num_tiles: int, *, learning: bool) -> dict[str, float]:
    """Measures CPU seconds and peak memory of one slide at full size (width 1536, six layers)."""
    import torch

    from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
    from pallava.modeling.slide_tokens import SlideTokenEncoder
    from pallava.slide_bags import SlideBag

    torch.manual_seed(0)
    encoder, connector = SlideTokenEncoder(), ScaleInvariantConnector(ConnectorConfig())
    connector.gradient_checkpointing_enable()
    side = int(np.ceil(np.sqrt(num_tiles)))
    places = torch.arange(num_tiles)
    bag = SlideBag(
        torch.randn(num_tiles, 1536, dtype=torch.float16),
        torch.stack([places % side, places // side], dim=1).float(),
    )
    before = _peak_gib()
    start = time.process_time()
    with torch.set_grad_enabled(learning):
        tokens = connector(*encoder.visual_tokens([bag]))
        if learning:
            tokens.sum().backward()
    return {"seconds": time.process_time() - start, "gib": _peak_gib() - before}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _run(folder: Path, arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "xtuner_add.cli", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if result.returncode:
        raise click.ClickException(f"{' '.join(command)}: {output[-3000:]}")
    return output


@click.command()
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default="work_dirs/slide_questions",
    show_default=True,
)
@click.option("--seed", default=0, show_default=True)
@click.option("--slides", default=24000, show_default=True, help="Regions for training.")
@click.option("--held-out", default=800, show_default=True, help="Regions for questions.")
@click.option("--steps", type=int, help="Of training.  [default: the config's]")
@click.option("--words", default=400, show_default=True, help="Steps of the language model.")
@click.option("--sizes", is_flag=True, help="Measure time and memory by number of tiles instead.")
@click.option("--one-size", type=int, hidden=True)
@click.option("--learning", is_flag=True, hidden=True)
def main(
    work_dir: Path,
    seed: int,
    slides: int,
    held_out: int,
    steps: int | None,
    words: int,
    sizes: bool,
    one_size: int | None,
    learning: bool,
) -> None:
    """Make slides, train, ask and print the table; existing results are kept."""
    if one_size:
        click.echo(json.dumps(measure(one_size, learning=learning)))
        return
    if sizes:
        _print_sizes()
        return
    from pathcore.files import write_json, write_text

    work_dir = work_dir.resolve()
    if not (work_dir / "data" / "conversations.jsonl").is_file():
        slide_map.make_data(work_dir / "data", seed, slides, held_out)
    if not (work_dir / "llm" / "config.json").is_file():
        train_language_model(work_dir / "llm", seed, words)
    if not (work_dir / "model" / "projector").is_dir():
        start = time.perf_counter()
        train(work_dir, steps)
        click.echo(f"Trained in {time.perf_counter() - start:.0f} s")
    rows = ask(work_dir, seed)
    summary = summarise(rows)
    write_text(work_dir / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(work_dir / "summary.json", summary)
    draw_examples(work_dir, rows)
    click.echo(table(summary))


def _print_sizes() -> None:
    """Prints the measurements, each from a separate process, so that peaks are independent."""
    click.echo("| tiles | answer, CPU s | peak, GiB | training step, CPU s | peak, GiB |")
    click.echo("|---|---|---|---|---|")
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.slide_questions", "--one-size", str(size)]
        cells = []
        for more in ([], ["--learning"]):
            result = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
            row = json.loads(result.stdout.splitlines()[-1])
            cells.append(f"{row['seconds']:.2f} | {row['gib']:.2f}")
        click.echo(f"| {size:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
