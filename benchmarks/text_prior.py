"""Measures what `contrast_answers` does to a model whose training texts tell the answers.

Run by ``python -m benchmarks.text_prior --demo work_dirs/demo``. Stage 2 of the demo is trained
again on yes/no questions of which the text alone answers 80 %: every wording has four times as many
of one answer as of the other, in training and among the held-out slides. Both trainings start from
the same weights, take as many steps, and differ in nothing else. The held-out questions are then
asked as the audit does: with their own image, with exchanged images and without an image. The
encoder is frozen, so that its features are computed once for all trainings of a process.

A model that answers from the text alone is right in 80 % of all cases, whatever the image. One that
reports its image without fail is right in 100 % with its own image, and with an exchanged one where
both images have the same answer: 0.8^2 + 0.2^2 = 68 %.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np

from pathcore.files import write_json
from pathcore.rows import write_rows
from xtuner_add.demo.pallava import wording
from xtuner_add.demo.stages import read_jsonl
from xtuner_add.demo.tissue import PATTERNS

CONFIG = "demo_instruction_tuning"
MODES = {"plain": False, "contrasted": True}
REFERENCES = ("image alone", "text alone")
"""A model that reports its image without fail, and one that gives each wording its most frequent
answer."""
RARE = "rare"
"""The questions of the arm `true` whose answer is the less frequent one of their wording."""
TITLES = {
    "true": "own image",
    RARE: "own image, rarer answers",
    "exchanged": "exchanged images",
    "none": "no image",
}

_ALIGNED = "scale_invariant/domain_alignment"
_TRAIN_BATCH = 12
_BATCH = 64


def make_data(demo: Path, folder: Path, seed: int) -> None:
    """Writes `conversations.jsonl` and `held_out.jsonl`, in which the text alone answers 80 %."""
    plans = read_jsonl(demo / "data" / "plans.jsonl")
    rng = np.random.default_rng([seed, 11])
    for part, name in (("train", "conversations"), ("held_out", "held_out")):
        slides = [plan for plan in plans if plan["part"] == part]
        turns: dict[str, list[wording.Question]] = {plan["id"]: [] for plan in slides}
        for number, tissue in enumerate((*PATTERNS, None)):
            asked = {plan["id"]: _question(tissue, plan) for plan in slides}
            frequent = ("yes", "no")[number % 2]
            groups = [
                [
                    slide
                    for slide, question in asked.items()
                    if (question.answer == frequent) == same
                ]
                for same in (True, False)
            ]
            rare = min(len(groups[1]), len(groups[0]) // 4)
            for group, count in zip(groups, (4 * rare, rare), strict=True):
                for slide in rng.permutation(group)[:count]:
                    turns[slide].append(asked[slide])
        rows = []
        for slide, questions in turns.items():
            rng.shuffle(questions)
            image = f"slides/{slide}.png"
            if part == "train" and questions:
                values = [
                    {"from": speaker, "value": value}
                    for question in questions
                    for speaker, value in (("human", question.text), ("gpt", question.answer))
                ]
                values[0]["value"] = f"<image>\n{values[0]['value']}"
                rows.append({"id": slide, "image": image, "conversations": values})
            elif part == "held_out":
                rows += [
                    {"id": f"{slide}_{i}", "image": image, "question": q.text, "answer": q.answer}
                    for i, q in enumerate(questions)
                ]
        write_rows(folder / f"{name}.jsonl", rows)


def _question(tissue: str | None, plan: Mapping[str, Any]) -> wording.Question:
    if tissue is None:
        return wording.nuclei_question(plan["vesicular"])
    return wording.tissue_question(tissue, plan["tissues"])


def remember_features() -> None:
    """Makes the frozen encoder, in this process, compute the features of each image once."""
    import torch

    from pallava.modeling.llava import MultimodalMixin

    compute = MultimodalMixin._visual_tokens
    found: dict[bytes, tuple[Any, Any, list[int]]] = {}

    def visual_tokens(self: Any, pixel_values: Sequence[Any]) -> tuple[Any, Any, list[int]]:
        keys = [hashlib.blake2b(image.numpy().tobytes()).digest() for image in pixel_values]
        for key, image in zip(keys, pixel_values, strict=True):
            if key not in found:
                with torch.no_grad(), torch.autocast("cpu", enabled=False):
                    found[key] = compute(self, [image])
        thumbnails, sub_images, counts = zip(*(found[key] for key in keys), strict=True)
        return torch.cat(thumbnails), torch.cat(sub_images), list(chain.from_iterable(counts))

    MultimodalMixin._visual_tokens = visual_tokens  # type: ignore[method-assign]


def measure(demo: Path, folder: Path, mode: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Trains stage 2 and audits it, or reads the rows that an earlier run has written."""
    done = folder / f"{mode}_{seed}.jsonl"
    if not done.is_file():
        write_rows(done, audit(demo, folder, train(demo, folder, mode, seed, steps), seed))
    return read_jsonl(done)


def train(demo: Path, folder: Path, mode: str, seed: int, steps: int) -> Any:
    """Trains stage 2; returns the model, ready to answer."""
    from mmengine.config import Config
    from xtuner.registry import BUILDER

    from pallava.anyres import AnyRes
    from pallava.engine.runner import AdaptedRunner
    from pallava.inference.assistant import Assistant
    from xtuner_add.paths import find_config

    work = folder / f"{mode}_{seed}"
    start = (demo / _ALIGNED / "last_checkpoint").read_text(encoding="utf-8").strip()
    cfg = Config.fromfile(find_config(CONFIG))
    cfg.merge_from_dict(
        {
            "model.pretrained_pth": str(demo / _ALIGNED / Path(start).name),
            "train_dataloader.dataset.data_path": str(
                folder / f"data_{seed}" / "conversations.jsonl"
            ),
            "train_dataloader.dataset.contrast_answers": MODES[mode],
            "train_dataloader.batch_size": _TRAIN_BATCH,
            "train_dataloader.sampler.per_device_batch_size": _TRAIN_BATCH,
            "train_cfg.max_iters": steps,
            "param_scheduler.1.end": steps,
            "default_hooks.checkpoint.interval": steps,
            "default_hooks.logger.interval": 50,
            "custom_hooks": cfg.custom_hooks[:-1],  # no example of the data on the screen
            "randomness.seed": seed,
            "work_dir": str(work),
            "experiment_name": work.name,
            "launcher": "none",
        }
    )
    runner = AdaptedRunner.from_cfg(cfg)
    runner.train()
    return Assistant(
        runner.model,
        BUILDER.build(cfg.tokenizer),
        AnyRes.from_image_processor(BUILDER.build(cfg.image_processor)),
        fingerprint=work.name,
    )


def audit(demo: Path, folder: Path, model: Any, seed: int) -> list[dict[str, Any]]:
    """Asks the held-out questions in three arms; returns the rows of the audit.

    A row has two more fields: `image alone` and `text alone`, what those would score.
    """
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from pallava.evaluation.audit import EXCHANGED, NONE, TRUE, make_arms, read_rows
    from pallava.evaluation.benchmarks import pathvqa
    from pallava.evaluation.generation import generate_answers

    benchmark = pathvqa(folder / f"data_{seed}" / "held_out.jsonl", demo / "data")
    arms = make_arms(benchmark.questions.questions, seed=seed)
    answers = {}
    for arm in (TRUE, EXCHANGED, NONE):
        with TemporaryDirectory() as log:
            outcome = generate_answers(
                model, arms.questions[arm], log, batch_size=_BATCH, max_new_tokens=8
            )
        assert outcome is not None  # a single process
        answers[arm] = outcome.answers
    asked = {question.id: question for question in arms.questions[TRUE]}
    frequent = {
        stem: Counter(q.answer for q in asked.values() if q.stem == stem).most_common(1)[0][0]
        for stem in {question.stem for question in asked.values()}
    }
    rows = []
    for row in read_rows(benchmark, arms, answers):
        question = asked[row.item]
        shown = {TRUE: question, EXCHANGED: asked[arms.donors[row.item]]}.get(row.arm)
        by_image = 0.5 if shown is None else float(shown.answer == question.answer)
        by_text = float(frequent[question.stem] == question.answer)
        rows.append(asdict(row) | dict(zip(REFERENCES, (by_image, by_text), strict=True)))
    return rows


def summarise(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Computes accuracies over all seeds, and paired differences.

    Args:
        rows: Rows of the audit by `MODE_SEED`; the same questions for both modes of a seed.

    Returns:
        By arm: accuracy of both modes and of the references, `contrasted - plain`, and each mode
        minus `image alone`, as value, lower and upper bound; and each mode's accuracy by seed.
        Intervals resample slides, which seeds share.
    """
    from pathcore.stats import mean_interval

    right: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    clusters: dict[tuple[str, str], str] = {}
    for key, part in rows.items():
        mode, seed = key.split("_")
        for row in part:
            item = (seed, row["item"])
            clusters[item] = row["cluster"]
            is_rare = row["arm"] == "true" and not row["text alone"]
            for arm in (row["arm"], *([RARE] if is_rare else [])):
                right[arm, mode][item] = row["correct"]
                for reference in REFERENCES:
                    right[arm, reference][item] = row[reference]

    def score(values: Mapping[tuple[str, str], float]) -> list[float]:
        numbers = np.array(list(values.values()))
        interval = mean_interval(numbers, [clusters[item] for item in values])
        return [round(float(number), 4) for number in (numbers.mean(), *interval)]

    def minus(arm: str, one: str, other: str) -> list[float]:
        values = right[arm, other]
        return score({item: value - values[item] for item, value in right[arm, one].items()})

    seeds = sorted({key.split("_")[1] for key in rows})

    def by_seed(arm: str, mode: str) -> list[float]:
        found = right[arm, mode].items()
        means = (np.mean([value for (own, _), value in found if own == seed]) for seed in seeds)
        return [round(float(mean), 4) for mean in means]

    summary: dict[str, Any] = {"seeds": seeds}
    for arm in TITLES:
        summary[arm] = {
            **{name: score(right[arm, name]) for name in (*MODES, *REFERENCES)},
            "contrasted - plain": minus(arm, "contrasted", "plain"),
            **{f"{mode} - image alone": minus(arm, mode, REFERENCES[0]) for mode in MODES},
            "by seed": {mode: by_seed(arm, mode) for mode in MODES},
        }
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """Formats the summary as Markdown."""
    columns = [name for name in summary["true"] if name != "by seed"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm, title in TITLES.items():
        scores = (summary[arm][name] for name in columns)
        cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in scores]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--demo",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="work_dirs/demo",
    show_default=True,
    help="Folder of the demo, finished up to domain alignment.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default="work_dirs/text_prior",
    show_default=True,
)
@click.option("--seeds", default=5, show_default=True)
@click.option("--first-seed", default=0, show_default=True, help="To share seeds among processes.")
@click.option("--steps", default=200, show_default=True, help="Steps of each training.")
def main(demo: Path, work_dir: Path, seeds: int, first_seed: int, steps: int) -> None:
    """Train with and without `contrast_answers` and audit both; finished ones are reused."""
    from pallava.engine.runtime import prepare_host

    prepare_host()
    remember_features()
    demo, work_dir = demo.resolve(), work_dir.resolve()
    os.chdir(demo)  # the config's paths are relative
    rows = {}
    for seed in range(first_seed, first_seed + seeds):
        make_data(demo, work_dir / f"data_{seed}", seed)
        for mode in MODES:
            rows[f"{mode}_{seed}"] = measure(demo, work_dir, mode, seed, steps)
        summary = summarise(rows)
        click.echo(f"seeds {', '.join(summary['seeds'])}\n{table(summary)}")
        write_json(work_dir / "summary.json", summary)


if __name__ == "__main__":
    main()
