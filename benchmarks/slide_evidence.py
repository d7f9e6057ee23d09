"""Measures whether the tiles that `answer --evidence` cites carry the answer.

Run by ``python -m benchmarks.slide_evidence`` after ``benchmarks.slide_questions``, whose model,
held-out slides and questions it takes. For every right answer, scores of the tiles are compared by
deletion (the answer changes once the highest tiles are removed) and insertion (it stays if only
they are shown); then the tiles that `pallava.inference.evidence` cites are removed, and as many
random ones.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.slide_map import NAMES, read_regions
from benchmarks.slide_questions import share_interval
from pallava import load_model
from pallava.inference.evidence import (
    MAX_SHARE,
    SlideAnswer,
    find_evidence,
    without,
)
from pallava.modeling.attention_maps import tile_attention
from pallava.slide_bags import SlideBag, read_bag
from pathcore.stats import mean_interval

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of the tiles that are removed, or shown alone."""

SHOWN = (0.05, 0.1, 0.2)
_COVERED = 0.1  # of a tile by the tissue asked about


def attention(answer: SlideAnswer) -> Tensor:
    """Attention of the connector, which is the same for every question."""
    found = tile_attention(answer.model, answer.bag)
    assert found is not None
    return found.cpu()


def gradient(answer: SlideAnswer) -> Tensor:
    """Gradient times the difference to the slide's mean tile."""
    features = answer.bag.features.float()
    return (answer.gradient(answer.bag) * (features - features.mean(dim=0))).sum(dim=1).cpu()


def occlusion(answer: SlideAnswer) -> Tensor:
    """Fall of the answer's log-probability without all tiles of a cell of the map."""
    side = answer.model.visual_encoder.config.map_size
    low, high = answer.bag.extent()
    cells = ((answer.bag.positions - low + 0.5) / (high - low + 1) * side).long()
    numbers, cell = cells.unique(dim=0, return_inverse=True)
    masks = [cell.cpu() != number for number in range(len(numbers))]
    probabilities, _ = answer.keep(masks)
    return -probabilities.clamp(min=1e-30).log()[cell.cpu()]


def chance(answer: SlideAnswer) -> Tensor:
    """Random order."""
    count = len(answer.bag.features)
    return torch.rand(count, generator=torch.Generator().manual_seed(count))


SCORES: dict[str, Callable[[SlideAnswer], Tensor]] = {
    "gradient": gradient,
    "occlusion": occlusion,
    "attention": attention,
    "random": chance,
}
"""Compared with that of `find_evidence`."""

CHOSEN = "integrated gradients"


def curves(answer: SlideAnswer, scores: Tensor) -> dict[str, list[bool]]:
    """Whether the answer changes without the first tiles, and stays with them alone."""
    order = scores.argsort(descending=True)
    count = len(order)
    first = [order[: max(1, round(share * count))] for share in SHARES]
    kept = [without(count, part) for part in first]
    _, same = answer.keep([*kept, *(~mask for mask in kept)])
    stays = same.tolist()
    return {
        "deletion": [not stayed for stayed in stays[: len(SHARES)]],
        "insertion": stays[len(SHARES) :],
    }


def asked_kinds(row: Mapping[str, Any]) -> list[int]:
    """Returns the kinds of tissue that a question names."""
    text = row["question"].lower()
    return [kind for kind, name in enumerate(NAMES) if name in text]


def tiles_asked_about(row: Mapping[str, Any], bag: SlideBag, areas: Any) -> Tensor:
    """Returns which tiles hold the tissue that a question is about, bool `(N,)`.

    Args:
        row: The question.
        bag: The region's tiles.
        areas: Shares of the kinds in the region's tiles, `(rows, columns, kinds)`.
    """
    columns, rows = bag.positions.long().T.numpy()
    asked = areas[rows, columns][:, asked_kinds(row)]
    return torch.from_numpy(asked.sum(axis=1) >= _COVERED)


def measure(work_dir: Path, num_slides: int, *, scores: bool) -> list[dict[str, Any]]:
    """Returns a row per right answer about the held-out slides."""
    model = load_model(work_dir / "llm", work_dir / "model", device="cpu")
    data = work_dir / "data"
    region_map, regions = read_regions(data)
    lines = (data / "held_out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = set(list(dict.fromkeys(row["slide"] for row in rows))[:num_slides])
    file = work_dir / ("evidence_scores.jsonl" if scores else "evidence.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    asked = {(row["slide"], row["question"]) for row in found}
    due = [row for row in rows if row["slide"] in names]
    for row in tqdm([row for row in due if (row["slide"], row["question"]) not in asked]):
        bag = read_bag(data / "features" / f"{row['slide']}.h5")
        answer = SlideAnswer(model, bag, row["question"], max_new_tokens=8)
        if answer.text.strip().lower() != row["answer"]:
            continue  # right answers alone
        start = time.process_time()
        evidence = find_evidence(answer)
        seconds = time.process_time() - start
        kind = tiles_asked_about(row, bag, regions[row["slide"]].seen(region_map.areas))
        compared = {}
        if scores:
            compared = {name: curves(answer, score(answer)) for name, score in SCORES.items()}
            compared[CHOSEN] = curves(answer, evidence.scores)
        found.append(
            {
                **row,
                **compared,
                **evidence.fields(),
                "cited": len(evidence.cited),
                "of_the_kind": float(kind[evidence.cited].float().mean()) if kind.any() else 0.0,
                "share_of_the_kind": float(kind.float().mean()),
                "seconds": seconds,
            }
        )
        with file.open("a") as rows_file:
            rows_file.write(json.dumps(found[-1]) + "\n")
    return [row for row in found if row["slide"] in names]


def group(row: Mapping[str, Any]) -> str:
    """Answers in groups of one dependence on tissue."""
    if row["kind"] == "how much":
        return f"how much: {row['answer']}"
    places = ("where", "which side")
    return row["kind"] if row["kind"] in places else f"{row['kind']}: {row['answer']}"


def interval(rows: Sequence[Mapping[str, Any]], hits: Sequence[bool]) -> str:
    """Formats a share of the answers with its 95 % interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*share_interval(rows, hits))


def removals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats how many answers change without the cited tiles, and without as many random ones."""
    cited = [row for row in rows if row["cited"]]
    changed = interval(rows, [row["cited"] > 0 for row in rows])
    if not cited:
        return [changed, ""]
    changes = [row["random_changes"] / row["trials"] for row in cited]
    low, high = mean_interval(changes, [row["block"] for row in cited])
    return [changed, f"{np.mean(changes):.3f} ({low:.3f} to {high:.3f})"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats what the removal of cited and of random tiles does, by kind of answer."""
    lines = [
        "| answer | n | changed without the cited tiles | without as many random ones | evidence "
        "told | tiles cited, median | of the tissue asked about (all tiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    for name, part in sorted(groups.items()):
        cited = [row for row in part if row["cited"]]
        cells = [*removals(part), interval(part, [row["told"] for row in part])]
        cells.append(f"{np.median([r['cited'] / r['of'] for r in cited]):.1%}" if cited else "")
        shares = [np.mean([row[key] for row in cited]) if cited else np.nan
                  for key in ("of_the_kind", "share_of_the_kind")]  # fmt: skip
        cells.append(f"{shares[0]:.2f} ({shares[1]:.2f})" if cited else "")
        lines.append(f"| {name} | {len(part)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats deletion and insertion of every score, over answers that depend on tissue."""
    shown = [SHARES.index(share) for share in SHOWN]
    head = [f"{way}, {share:.0%}" for way in ("deletion", "insertion") for share in SHOWN]
    lines = [f"| score | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for name in (CHOSEN, *SCORES):
        cells = [
            interval(rows, [row[name][way][place] for row in rows])
            for way in ("deletion", "insertion")
            for place in shown
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, exists=True),
    default="work_dirs/slide_questions",
    show_default=True,
)
@click.option("--slides", default=30, show_default=True, help="Held-out slides.")
@click.option("--scores/--no-scores", default=True, help="Compare the scores of tiles too.")
def main(work_dir: Path, slides: int, scores: bool) -> None:
    """Measure, and print the tables; existing results are kept."""
    rows = measure(work_dir, slides, scores=scores)
    click.echo(table(rows))
    depending = [row for row in rows if row["answer"] not in ("no", "little")]
    for most in (1.0, MAX_SHARE, 0.5):
        part = [row for row in depending if row["share_of_the_kind"] <= most]
        changed, changed_at_random = removals(part)
        click.echo(
            f"\nOf {len(part)} answers other than no and little about tissue in at most "
            f"{most:.0%} of the tiles, {changed} change without the cited tiles; without as many "
            f"random ones {changed_at_random}."
        )
    if scores:
        click.echo(compare(depending))
    seconds = [row["seconds"] for row in rows]
    click.echo(f"\n{np.median(seconds):.1f} CPU s per answer, at most {max(seconds):.1f}")


if __name__ == "__main__":
    main()
