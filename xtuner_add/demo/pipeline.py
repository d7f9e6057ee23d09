"""The demo from slides to answers: data, language model, PLIP, two stages, export, questions.

Both modes of the connector are trained on the same data for as many steps: scale-invariant, which
sees the sub-images, and released, which sees the thumbnail alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

from pathcore.files import sha256_of, write_json
from xtuner_add.demo import (
    answers,
    dataset,
    histology,
    language_model,
    slides,
    tissue,
    wording,
)
from xtuner_add.demo.report import write_report
from xtuner_add.demo.stages import (
    Manifest,
    Stage,
    only_run_in,
    run_command,
    stopped,
    threads,
)

MODES = ("scale_invariant", "released")
STEPS = ("domain_alignment", "instruction_tuning")
_DATA_CODE = (dataset, histology, slides, tissue, wording)
"""What the data are made by: they are made anew when it changes."""


@dataclass(frozen=True)
class Plan:
    """How much of everything: the defaults are the demo, `quick` is for tests of the road.

    Attributes:
        data: Slides and questions.
        language_model: Sizes and steps of the base language model.
        num_texts: Texts it is trained on.
        plip_epochs: Of PLIP pretraining; None for the config's.
        steps: Of each of the two stages; None for the configs'.
    """

    data: dataset.DataSizes = field(default_factory=dataset.DataSizes)
    language_model: language_model.LanguageModelSizes = field(
        default_factory=language_model.LanguageModelSizes
    )
    num_texts: int = 6000
    plip_epochs: int | None = None
    steps: int | None = None

    @classmethod
    def quick(cls) -> Plan:
        """A minute's worth: every stage runs, nothing is learned to speak of."""
        return cls(
            data=dataset.DataSizes(num_train=48, num_held_out=20, questions_per_tissue=6),
            language_model=language_model.LanguageModelSizes(steps=40),
            num_texts=600,
            plip_epochs=2,
            steps=20,
        )


def run(work_dir: Path, seed: int = 1024, quick: bool = False) -> dict[str, Any]:
    """Runs what is not done yet of the demo, and prints what came out.

    Args:
        work_dir: Receives everything; `summary.json` and `report.html` at the end.
        seed: Of data and training.
        quick: Tiny amounts, to see that the road is open.

    Returns:
        The content of `summary.json`.

    Raises:
        StageError: A stage failed, or the folder holds something else.
    """
    work_dir = Path(work_dir).resolve()
    with only_run_in(work_dir):
        return _run(work_dir, Plan.quick() if quick else Plan(), seed)


def _run(work_dir: Path, plan: Plan, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    manifest = Manifest(work_dir)
    road = _Road(work_dir, plan, seed)
    rounds: list[list[str]] = []

    def do(stages: Sequence[Stage], before: Sequence[str]) -> None:
        rounds.append([stage.name for stage in stages])
        click.echo(f"{_clock(start)}  {' and '.join(stage.name for stage in stages)}")
        manifest.run_all(stages, before)

    do([road.data()], before=[])
    do([road.language_model(), road.plip()], before=["data"])
    parts = ["data", "language model", "plip"]
    for step in STEPS:
        do([road.train(mode, step, row) for row, mode in enumerate(MODES)], before=parts)
        parts += [f"{mode} {step}" for mode in MODES]
    do([road.export(mode, row) for row, mode in enumerate(MODES)], before=parts)
    parts += [f"{mode} export" for mode in MODES]
    do([road.answer()], before=parts)

    summary = answers.summarise(work_dir)
    seconds = summary["stage_seconds"] = manifest.seconds()
    # Stages of one round run side by side; interrupted runs count too.
    summary["seconds"] = round(sum(max(seconds[name] for name in row) for row in rounds), 1)
    summary["seed"] = seed
    write_json(work_dir / "summary.json", summary)
    report = write_report(work_dir, summary)
    click.echo(answers.table(summary))
    click.echo(f"{_clock(start)}  {report}")
    click.echo(f"Ask it: xtuner-add answer {work_dir / MODES[0] / 'model'} IMAGE --question ...")
    return summary


@dataclass(frozen=True)
class _Road:
    """The stages, each inside the work folder."""

    work_dir: Path
    plan: Plan
    seed: int

    def data(self) -> Stage:
        sizes = self.plan.data
        return Stage(
            "data",
            lambda: write_json(
                self.work_dir / "data" / "counts.json",
                dataset.build(self.work_dir / "data", sizes, self.seed),
            ),
            outputs=("data/counts.json",),
            settings={"sizes": asdict(sizes), "seed": self.seed, "code": _digests(_DATA_CODE)},
            owned=("data",),
        )

    def language_model(self) -> Stage:
        def train() -> None:
            import torch

            torch.set_num_threads(threads())
            rng = np.random.default_rng([self.seed, 4])
            corpus = dataset.text_corpus(self.plan.num_texts, rng)
            history = language_model.train(
                corpus, self.work_dir / "llm", self.plan.language_model, self.seed, stopped
            )
            write_json(self.work_dir / "llm" / "history.json", history)

        return Stage(
            "language model",
            train,
            outputs=("llm/history.json", "llm/model.safetensors"),
            settings={
                "sizes": asdict(self.plan.language_model),
                "texts": self.plan.num_texts,
                "seed": self.seed,
                "code": _digests((language_model,)),
            },
            owned=("llm",),
        )

    def plip(self) -> Stage:
        options = _length("max_epochs", self.plan.plip_epochs)
        return Stage(
            "plip",
            self._training("demo_plip", Path("plip"), options, row=1),
            outputs=("plip/plip_encoder/model.safetensors", "plip/done"),
            settings=self._settings("demo_plip", options),
            owned=("plip",),
        )

    def train(self, mode: str, step: str, row: int) -> Stage:
        options = _length("max_iters", self.plan.steps)
        after = None
        if step == STEPS[0]:
            options.append(f"model.cross_attention={mode == MODES[0]}")
        else:
            after = Path(mode, STEPS[0])
        work = Path(mode) / step
        return Stage(
            f"{mode} {step}",
            self._training(f"demo_{step}", work, options, row, after),
            outputs=(f"{work}/done",),
            settings=self._settings(f"demo_{step}", options),
            owned=(str(work),),
        )

    def export(self, mode: str, row: int) -> Stage:
        parts, whole = f"{mode}/hf", f"{mode}/model"

        def convert() -> None:
            checkpoint = _last_checkpoint(self.work_dir / mode / STEPS[1])
            log = self.work_dir / "logs" / f"{mode}_export.log"
            config = f"demo_{STEPS[1]}"
            to_parts = ["pth-to-hf", config, checkpoint, parts, "--fp32"]
            self._command(to_parts, log, mode, row)
            self._command(["export", "llm", parts, whole, "--device", "cpu"], log, mode, row)

        return Stage(
            f"{mode} export",
            convert,
            outputs=(f"{parts}/projector/model.safetensors", f"{whole}/config.json"),
            settings={},
            owned=(parts, whole),
        )

    def answer(self) -> Stage:
        def answer_all() -> None:
            import torch

            torch.set_num_threads(2 * threads())  # nothing runs beside it
            answers.answer_all(self.work_dir, self.seed)

        return Stage(
            "answers",
            answer_all,
            outputs=("answers.jsonl", "shown.json"),
            settings={"seed": self.seed},
        )

    def _training(
        self,
        config: str,
        work: Path,
        options: Sequence[str],
        row: int,
        after: Path | None = None,
    ) -> Callable[[], None]:
        def train() -> None:
            arguments: list[object] = ["train", config, "--work-dir", work, "--seed", self.seed]
            folder = self.work_dir / work
            if (folder / "last_checkpoint").is_file():
                arguments += ["--resume", _last_checkpoint(folder)]
            settings = list(options)
            if after is not None:
                settings.append(f"model.pretrained_pth={_last_checkpoint(self.work_dir / after)}")
            if settings:
                arguments += ["--cfg-options", *settings]
            log = self.work_dir / "logs" / f"{'_'.join(work.parts)}.log"
            self._command(arguments, log, " ".join(work.parts).replace("_", " "), row)
            (folder / "done").touch()

        return train

    def _settings(self, config: str, options: Sequence[str]) -> dict[str, Any]:
        from xtuner_add.paths import find_config

        # A config inherits from its neighbours: a change in any of them may change the result.
        files = sorted(find_config(config).parent.rglob("*.py"))
        return {
            "config": config,
            "configs": {file.name: sha256_of(file) for file in files},
            "options": list(options),
            "seed": self.seed,
        }

    def _command(self, arguments: Sequence[object], log: Path, title: str, row: int) -> None:
        run_command(arguments, self.work_dir, log, title, row)


def _digests(modules: Sequence[ModuleType]) -> dict[str, str]:
    return {module.__name__: sha256_of(Path(str(module.__file__))) for module in modules}


def _length(unit: str, value: int | None) -> list[str]:
    """Config options for a training of another length, its schedule included."""
    return [] if value is None else [f"train_cfg.{unit}={value}", f"param_scheduler.1.end={value}"]


def _last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint; MMEngine notes an absolute path, which a moved folder outdates."""
    noted = Path((folder / "last_checkpoint").read_text(encoding="utf-8").strip())
    return folder / noted.name


def _clock(start: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    return f"{minutes:2d}:{seconds:02d}"
