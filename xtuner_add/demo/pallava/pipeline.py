"""From slides to answers: data, language model, PLIP, two training stages, export, questions.

Both modes of the connector are trained on the same data for the same steps: scale-invariant, which
sees the sub-images, and released, which sees only the thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from pathcore.files import sha256_of, write_json
from xtuner_add.demo import histology, language_model, tissue
from xtuner_add.demo import wording as shared_wording
from xtuner_add.demo.pallava import answers, dataset, slides, wording
from xtuner_add.demo.pallava.report import write_report
from xtuner_add.demo.stages import (
    DemoStages,
    Stage,
    code_digests,
    run_command,
    run_demo,
    stopped,
    threads,
)

MODES = ("scale_invariant", "released")
STEPS = ("domain_alignment", "instruction_tuning")


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo.

    Attributes:
        data: Slides and questions.
        language_model: Sizes and steps of the base language model.
        num_texts: Texts that it is trained on.
        plip_epochs: Epochs of PLIP pretraining; None for the config's.
        steps: Steps of each of the two stages; None for the configs'.
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
        """Returns a plan that takes a minute: every stage runs, but little is learned."""
        return cls(
            data=dataset.DataSizes(num_train=48, num_held_out=20, questions_per_tissue=6),
            language_model=language_model.LanguageModelSizes(steps=40),
            num_texts=600,
            plip_epochs=2,
            steps=20,
        )


EXPECTED_SECONDS = {
    "data": 112, "language model": 651, "plip": 708,
    "scale_invariant domain_alignment": 206, "scale_invariant instruction_tuning": 350,
    "scale_invariant export": 73,
}  # fmt: skip
"""Measured in a run on two busy cores; `answers` was not timed."""


@dataclass(frozen=True)
class _Stages(DemoStages):
    plan: Plan

    def rounds(self) -> list[list[Stage]]:
        modes = list(enumerate(MODES))
        return [
            [self._data()],
            [self._language_model(), self._plip()],
            *([self._train(mode, step, row) for row, mode in modes] for step in STEPS),
            [self._export(mode, row) for row, mode in modes],
            [self._answer()],
        ]

    def _data(self) -> Stage:
        folder, sizes = self.work_dir / "data", self.plan.data

        def build() -> None:
            write_json(folder / "counts.json", dataset.build(folder, sizes, self.seed))

        code = code_digests(dataset, histology, slides, tissue, wording, shared_wording)
        return Stage(
            "data",
            build,
            outputs=("data/counts.json",),
            settings={"sizes": asdict(sizes), "seed": self.seed, "code": code},
            owned=("data",),
        )

    def _language_model(self) -> Stage:
        folder = self.work_dir / "llm"

        def train() -> None:
            import torch

            torch.set_num_threads(threads())
            rng = np.random.default_rng([self.seed, 4])
            corpus = dataset.text_corpus(self.plan.num_texts, rng)
            history = language_model.train(
                corpus, folder, self.plan.language_model, self.seed, stopped
            )
            write_json(folder / "history.json", history)

        return Stage(
            "language model",
            train,
            outputs=("llm/history.json", "llm/model.safetensors"),
            settings={
                "sizes": asdict(self.plan.language_model),
                "texts": self.plan.num_texts,
                "seed": self.seed,
                "code": code_digests(language_model),
            },
            owned=("llm",),
        )

    def _plip(self) -> Stage:
        options = _length("max_epochs", self.plan.plip_epochs)
        encoder = "plip/plip_encoder/model.safetensors"
        return self._training("plip", "demo_plip", "plip", options, row=1, outputs=(encoder,))

    def _train(self, mode: str, step: str, row: int) -> Stage:
        options, after = _length("max_iters", self.plan.steps), None
        if step == STEPS[0]:
            options.append(f"model.cross_attention={mode == MODES[0]}")
        else:
            after = f"{mode}/{STEPS[0]}"
        return self._training(
            f"{mode} {step}", f"demo_{step}", f"{mode}/{step}", options, row, after
        )

    def _training(
        self,
        name: str,
        config: str,
        work: str,
        options: Sequence[str],
        row: int,
        after: str | None = None,
        outputs: tuple[str, ...] = (),
    ) -> Stage:
        folder, title = self.work_dir / work, work.replace("/", "_")

        def train() -> None:
            arguments: list[object] = ["train", config, "--work-dir", work, "--seed", self.seed]
            if (folder / "last_checkpoint").is_file():
                arguments += ["--resume", _last_checkpoint(folder)]
            settings = list(options)
            if after is not None:
                settings.append(f"model.pretrained_pth={_last_checkpoint(self.work_dir / after)}")
            if settings:
                arguments += ["--cfg-options", *settings]
            run_command(arguments, self.work_dir, self.log(title), title.replace("_", " "), row)
            (folder / "done").touch()

        from xtuner_add.paths import find_config

        # Configs inherit from others in the folder, so a change in any may change the result.
        files = sorted(find_config(config).parent.rglob("*.py"))
        return Stage(
            name,
            train,
            outputs=(*outputs, f"{work}/done"),
            settings={
                "config": config,
                "configs": {file.name: sha256_of(file) for file in files},
                "options": list(options),
                "seed": self.seed,
            },
            owned=(work,),
        )

    def _export(self, mode: str, row: int) -> Stage:
        parts, whole = f"{mode}/hf", f"{mode}/model"

        def convert() -> None:
            checkpoint = _last_checkpoint(self.work_dir / mode / STEPS[1])
            for arguments in (
                ["pth-to-hf", f"demo_{STEPS[1]}", checkpoint, parts, "--fp32"],
                ["export", "llm", parts, whole, "--device", "cpu"],
            ):
                run_command(arguments, self.work_dir, self.log(f"{mode}_export"), mode, row)

        return Stage(
            f"{mode} export",
            convert,
            outputs=(f"{parts}/projector/model.safetensors", f"{whole}/config.json"),
            settings={},
            owned=(parts, whole),
        )

    def _answer(self) -> Stage:
        def answer_all() -> None:
            import torch

            torch.set_num_threads(2 * threads())  # no other stage runs then
            answers.answer_all(self.work_dir, self.seed)

        return Stage(
            "answers",
            answer_all,
            outputs=("answers.jsonl", "shown.json"),
            settings={"seed": self.seed},
        )


def run(work_dir: Path, seed: int = 1024, quick: bool = False) -> dict[str, Any]:
    """Runs the demo; see `xtuner_add.demo.stages.run_demo`."""
    stages = _Stages(Path(work_dir).resolve(), Plan.quick() if quick else Plan(), seed)
    summary = run_demo(
        stages, answers.summarise, answers.table, write_report, EXPECTED_SECONDS, quick=quick
    )
    model = stages.work_dir / MODES[0] / "model"
    click.echo(f"Ask it: xtuner-add answer {model} IMAGE --question ...")
    return summary


def _length(unit: str, value: int | None) -> list[str]:
    """Returns the config options for a training of another length, with its schedule."""
    return [] if value is None else [f"train_cfg.{unit}={value}", f"param_scheduler.1.end={value}"]


def _last_checkpoint(folder: Path) -> Path:
    """Returns the newest checkpoint; MMEngine's absolute path may be that of a moved folder."""
    noted = Path((folder / "last_checkpoint").read_text(encoding="utf-8").strip())
    return folder / noted.name
