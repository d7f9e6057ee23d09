"""A signal in the positions of tiles, which the slide encoder learns and mean pooling does not.

    python -m benchmarks.gigapath_position --image docs/images/gigapath_position.png

Synthetic slides of 10 x 10 tiles all have equally many tumour, lymphocyte and stroma tiles. In one
class lymphocytes surround the tumour, in the other they are apart from it. Tile embeddings are the
prototype of the kind plus noise. Three learners see the same slides: logistic regression on the
mean over the tiles, a small slide encoder with the coordinates of every slide shuffled, and the
same encoder with true coordinates. Every seed draws a new cohort and new weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gigapath.finetune.baselines import VectorSplit, fit_logistic
from gigapath.slide_encoder import create_model, register_architecture

SIDE, BLOB, GAP = 10, 14, 2
"""Tiles along a side; of tumour, and of lymphocytes; least distance of the two when apart."""

TILE_PX, WIDTH, NOISE, BATCH = 256, 16, 1.0, 20
KINDS = ("stroma", "tumour", "lymphocytes")
ARCH = "gigapath_position_2l48d"
MEAN, SHUFFLED, ENCODER = "mean pooling", "slide encoder, shuffled coordinates", "slide encoder"


@dataclass
class Cohort:
    """Slides of one random draw.

    Attributes:
        kinds: `(slides, tiles)`, index into `KINDS`.
        features: `(slides, tiles, WIDTH)`.
        labels: `(slides,)`, 1 if lymphocytes surround the tumour.
    """

    kinds: Tensor
    features: Tensor
    labels: Tensor


def grid() -> Tensor:
    """Returns column and row of every tile, `(tiles, 2)`, row by row."""
    places = torch.arange(SIDE)
    return torch.cartesian_prod(places, places).flip(1)


def draw_kinds(touching: bool, generator: torch.Generator) -> Tensor:
    """Draws the kinds of a slide's tiles, `(tiles,)`."""
    places = grid().float()
    while True:
        centres = torch.rand(2, 2, generator=generator) * (SIDE - 1)
        near, far = ((places - centre).norm(dim=1).argsort(stable=True) for centre in centres)
        tumour = near[:BLOB]
        others = near[BLOB : 2 * BLOB] if touching else far[:BLOB]
        distance = torch.cdist(places[tumour], places[others]).min()
        if touching or distance > GAP:
            kinds = torch.zeros(len(places), dtype=torch.long)
            kinds[tumour], kinds[others] = 1, 2
            return kinds


def draw_cohort(num_slides: int, prototypes: Tensor, generator: torch.Generator) -> Cohort:
    """Draws slides, of the two classes in turn."""
    labels = torch.arange(num_slides) % 2
    kinds = torch.stack([draw_kinds(bool(label), generator) for label in labels])
    noise = torch.randn(*kinds.shape, WIDTH, generator=generator)
    return Cohort(kinds, prototypes[kinds] + NOISE * noise, labels)


def mean_pooling(train: Cohort, test: Cohort) -> float:
    """Returns the AUROC of logistic regression on the means over tiles."""
    splits = [
        VectorSplit(
            tuple(str(number) for number in range(len(cohort.labels))),
            cohort.features.mean(1).numpy(),
            cohort.labels.numpy(),
        )
        for cohort in (train, test)
    ]
    probabilities = fit_logistic(splits[0], None, 2)(splits[1].vectors)
    return float(roc_auc_score(splits[1].labels, probabilities[:, 1]))


def encoder(train: Cohort, test: Cohort, epochs: int, shuffled: bool, seed: int) -> float:
    """Returns the AUROC of a slide encoder trained from random weights, with mean pooling."""
    torch.manual_seed(seed)
    model = create_model("", ARCH, WIDTH, check_inputs=False).train()
    head = nn.Linear(model.embed_dim, 1)
    parameters = [*model.parameters(), *head.parameters()]
    steps = epochs * -(-len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.2
    )
    coords = grid() * TILE_PX

    def logits(features: Tensor) -> Tensor:
        count = len(features)
        places = coords.expand(count, -1, -1)
        if shuffled:
            places = torch.stack([coords[torch.randperm(len(coords))] for _ in range(count)])
        scores: Tensor = head(model.embed(features, places, pooling="mean")).squeeze(1)
        return scores

    for _ in range(epochs):
        for batch in torch.randperm(len(train.labels)).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(
                logits(train.features[batch]), train.labels[batch].float()
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float(roc_auc_score(test.labels, logits(test.features)))


def run_seed(seed: int, num_slides: int, epochs: int) -> dict[str, float]:
    """Returns the AUROC of every learner on the slides of one seed."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(len(KINDS), WIDTH, generator=generator)
    train = draw_cohort(num_slides, prototypes, generator)
    test = draw_cohort(num_slides // 2, prototypes, generator)
    return {
        MEAN: mean_pooling(train, test),
        SHUFFLED: encoder(train, test, epochs, True, seed),
        ENCODER: encoder(train, test, epochs, False, seed),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over seeds."""
    result = bootstrap(
        (np.asarray(values),), np.mean, method="percentile", rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def draw(figures: dict[str, list[float]], image: Path) -> None:
    """Draws slides of both classes next to the scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    generator = torch.Generator().manual_seed(1)
    colours = ("#f3d9e5", "#8b3a8f", "#2f5fb3")
    figure, axes = plt.subplots(
        1, 4, figsize=(9.5, 2.5), width_ratios=(1, 1, 0.55, 1.6), layout="constrained"
    )
    titles = (("lymphocytes\naround the tumour", True), ("lymphocytes\napart from it", False))
    for axis, (title, touching) in zip(axes[:2], titles, strict=True):
        kinds = draw_kinds(touching, generator).reshape(SIDE, SIDE)
        axis.imshow(kinds.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=2)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(np.arange(SIDE + 1) - 0.5, labels=[])
        axis.set_yticks(np.arange(SIDE + 1) - 0.5, labels=[])
        axis.grid(color="white", linewidth=0.7)
        axis.tick_params(length=0)
    axes[2].axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    axes[2].legend(handles, KINDS, loc="center", fontsize=8, frameon=False)
    for row, values in enumerate(figures.values()):
        low, high = interval(values)
        mean = float(np.mean(values))
        axes[3].plot([low, high], [row, row], color="black", linewidth=2)
        axes[3].plot(mean, row, "o", color="black")
        axes[3].plot(values, [row] * len(values), "|", color="#b3541e", markersize=10)
        axes[3].text(1.02, row, f"{mean:.2f}", va="center", fontsize=8)
    axes[3].axvline(0.5, color="grey", linestyle=":")
    axes[3].set(xlim=(0.4, 1.1), ylim=(len(figures) - 0.4, -0.6), xlabel="AUROC on new slides")
    axes[3].set_xticks([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    axes[3].set_yticks(range(len(figures)), [name.replace(", ", ",\n") for name in figures])
    axes[3].tick_params(labelsize=8)
    axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(image, dpi=150)
    plt.close(figure)


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--slides", default=600, show_default=True, help="To train on; half as many to test.")
@click.option("--epochs", default=12, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Few slides: shows that it runs, measures nothing.")
@click.option("--image", type=click.Path(path_type=Path), help="Draw the picture.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(
    seeds: int,
    slides: int,
    epochs: int,
    threads: int,
    quick: bool,
    image: Path | None,
    json_file: Path | None,
) -> None:
    """Train on slides that differ only in the positions of their tiles."""
    torch.set_num_threads(threads)
    register_architecture(
        ARCH,
        embed_dim=48,
        depth=2,
        num_heads=4,
        slide_ngrids=SIDE,
        dropout=0.0,
        drop_path_rate=0.0,
    )
    if quick:
        seeds, slides, epochs = 2, 40, 1
    runs = [run_seed(seed, slides, epochs) for seed in tqdm(range(seeds), desc="seeds")]
    figures = {name: [run[name] for run in runs] for name in (MEAN, SHUFFLED, ENCODER)}
    rows = [[name, float(np.mean(v)), *interval(v), min(v), max(v)] for name, v in figures.items()]
    header = ["learner", "AUROC", "95 % from", "to", "lowest", "highest"]
    click.echo(tabulate(rows, header, floatfmt=".3f"))
    if image is not None:
        draw(figures, image)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
