"""PathGen-1.6M in miniature: slides, patches, selection, captions, shards, a CLIP and scores.

Each stage is one or a few commands of `xtuner-add`, called as a user would type them; `logs/` has
every command line with its output. There are three separate groups of slides: `teaching`, where the
first CLIP and the describer learn from the ground truth; `archive`, of which only the files are
used; and `held_out`, for the scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pathcore.files import sha256_of, write_json
from xtuner_add.demo import histology, language_model, tissue
from xtuner_add.demo import wording as shared_wording
from xtuner_add.demo.pathgen import dataset, describer, painting, scores, wording
from xtuner_add.demo.pathgen.report import write_report
from xtuner_add.demo.stages import (
    DemoStages,
    Stage,
    call_command,
    code_digests,
    run_command,
    run_demo,
    stopped,
)

_RECIPE = "demo_clip"
_MIN_TISSUE = 0.12  # Otsu's mask misses the pale inside of fat and mucin
_BATCH_SIZE = 48
_ONE_WORKER = ("--workers", 1)  # starting processes takes longer than a few small slides


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo.

    Attributes:
        sizes: Number and size of slides.
        first_epochs: Epochs of the first CLIP.
        describer: Sizes and steps of the describer.
        quota: Number of patches chosen from each slide.
        similarity: Cosine similarity from which patches count as the same; to a CLIP this small,
            all patches of one tissue look much alike.
        clip_epochs: Epochs of the CLIP trained on the describer's captions, and of its control.
        batch_size: Batch size of all three CLIPs.
        warmup: Warm-up steps of all three CLIPs.
        side_by_side: Whether to train the CLIP and its control concurrently, each in its own
            process. For trainings of seconds, the additional imports take longer.
    """

    sizes: dataset.Sizes = field(default_factory=dataset.Sizes)
    first_epochs: int = 8
    describer: describer.DescriberSizes = field(default_factory=describer.DescriberSizes)
    quota: int = 72
    similarity: float = 0.99
    clip_epochs: int = 18
    batch_size: int = 64
    warmup: int = 20
    side_by_side: bool = True

    @classmethod
    def quick(cls) -> Plan:
        """Returns a plan that takes less than a minute: every stage runs, but little is learned."""
        return cls(
            sizes=dataset.Sizes(4, 4, 3, width_px=640, height_px=448),
            first_epochs=3,
            describer=describer.DescriberSizes(
                naming_steps=50, steps=170, batch_size=8, learning_rate=4e-3
            ),
            quota=32,
            similarity=0.9995,
            clip_epochs=4,
            batch_size=16,
            warmup=5,
            side_by_side=False,
        )


EXPECTED_SECONDS = {
    "slides": 27, "patches": 38, "first CLIP": 83, "describer": 130, "selection": 16,
    "captions": 164, "shards": 11, "clip": 497, "clip exchanged": 495, "scores": 158,
}  # fmt: skip
"""Measured in a run on two cores with other load."""


@dataclass(frozen=True)
class _Stages(DemoStages):
    plan: Plan

    def rounds(self) -> list[list[Stage]]:
        pair = [self._train(name, row) for row, name in enumerate(("clip", "clip_exchanged"))]
        trainings = [pair] if self.plan.side_by_side else [[stage] for stage in pair]
        return [
            [self._slides()],
            [self._patches()],
            [self._first_clip()],
            [self._describer()],
            [self._selection()],
            [self._captions()],
            [self._shards()],
            *trainings,
            [self._scores()],
        ]

    def _slides(self) -> Stage:
        sizes = self.plan.sizes
        code = code_digests(dataset, histology, painting, tissue, wording, shared_wording)
        return Stage(
            "slides",
            lambda: dataset.paint_all(self.work_dir, sizes, self.seed),
            outputs=("slides/plans.json",),
            settings={"sizes": asdict(sizes), "seed": self.seed, "code": code},
            owned=("slides", "truth"),
        )

    def _patches(self) -> Stage:
        """Tiles every slide, and cuts out the patches whose ground truth is used."""

        def run() -> None:
            for group in dataset.GROUPS:
                self._call(
                    "patches",
                    *("tile", f"slides/{group}", "--output", f"tiles/{group}"),
                    *("--patch-px", dataset.PATCH_PX, "--mpp", painting.PAINTED_MPP),
                    *("--min-tissue", _MIN_TISSUE, *_ONE_WORKER),
                    may_skip=group == "archive",
                )
            for group in ("teaching", "held_out"):
                self._call(
                    "patches",
                    *("extract", f"tiles/{group}/coords", "--slides", f"slides/{group}"),
                    *("--output", f"patches/{group}", *_ONE_WORKER),
                )
            patches = self.work_dir / "patches"
            dataset.write_lessons(self.work_dir, patches / "teaching", self.seed)
            tests = self.work_dir / "tests"
            counts = dataset.write_tests(self.work_dir, patches / "held_out", tests)
            dataset.write_benchmarks(tests)
            write_json(tests / "counts.json", counts)

        return Stage(
            "patches",
            run,
            outputs=("tests/counts.json", "patches/teaching/pairs.jsonl"),
            settings={"min_tissue": _MIN_TISSUE},
            owned=("tiles", "patches", "tests"),
        )

    def _first_clip(self) -> Stage:
        pairs = "patches/teaching/pairs.jsonl"
        arguments = self._training("first_clip", pairs, self.plan.first_epochs)
        return Stage(
            "first CLIP",
            lambda: self._call("first_clip", *arguments),
            outputs=("first_clip/pairs/stage.json", "first_clip/pairs/hf"),
            settings=self._recipe(self.plan.first_epochs),
            owned=("first_clip",),
        )

    def _describer(self) -> Stage:
        def train() -> None:
            history = describer.train_describer(
                self.work_dir / "first_clip" / "pairs" / "hf",
                dataset.read_lessons(self.work_dir / "patches" / "teaching"),
                self.work_dir / "describer" / "model",
                self.plan.describer,
                self.seed,
                stopped,
            )
            write_json(self.work_dir / "describer" / "history.json", history)

        return Stage(
            "describer",
            train,
            outputs=("describer/history.json", "describer/model/model.safetensors"),
            settings={
                "sizes": asdict(self.plan.describer),
                "code": code_digests(describer, wording, language_model),
            },
            owned=("describer",),
        )

    def _selection(self) -> Stage:
        def run() -> None:
            classes = self.work_dir / "selection_classes.json"
            write_json(classes, {"any": wording.retrieval_texts(painting.TISSUES)})
            self._call(
                "selection",
                *("select-patches", "tiles/archive/coords", "--slides", "slides/archive"),
                *("--output", "selection", "--classes", classes.name, "--device", "cpu"),
                *("--encoder", "open_clip:local-dir:first_clip/pairs/open_clip"),
                *("--quota", self.plan.quota, "--fractions", "prompt=1,cluster=1"),
                *("--similarity", self.plan.similarity, "--seed", self.seed),
            )
            self._call(
                "selection",
                *("extract", "selection/coords", "--slides", "slides/archive"),
                *("--output", "patches/archive", *_ONE_WORKER),
            )

        return Stage(
            "selection",
            run,
            outputs=("selection/selection.jsonl", "patches/archive/report.json"),
            settings={"quota": self.plan.quota, "similarity": self.plan.similarity},
            owned=("selection", "patches/archive"),
        )

    def _captions(self) -> Stage:
        def run() -> None:
            drawn = ("--temperature", 0.7, "--seed", self.seed)
            self._ask("describe", "selection/selection.jsonl", "captions/long.jsonl", 120, *drawn)
            self._ask("revise", "captions/long.jsonl", "captions/revised.jsonl", 190)
            self._call(
                "captions",
                *("filter-captions", "captions/revised.jsonl", "captions/clean.jsonl"),
                *("--within", "wsi_id"),
            )
            self._ask("summarise", "captions/clean.jsonl", "captions/pairs.jsonl", 40)

        return Stage(
            "captions",
            run,
            outputs=("captions/pairs.jsonl",),
            settings={},
            owned=("captions",),
        )

    def _shards(self) -> Stage:
        """Cuts the captioned patches out of the slides again, as users of PathGen-1.6M do."""

        def run() -> None:
            captions = self.work_dir / "captions"
            dataset.exchange_captions(captions / "pairs.jsonl", captions / "exchanged.jsonl")
            for name, pairs in (("clip", "pairs"), ("clip_exchanged", "exchanged")):
                self._call(
                    "shards",
                    *("extract", f"captions/{pairs}.jsonl", "--slides", "slides/archive"),
                    *("--patch-px", dataset.PATCH_PX * painting.SCALE, "--layout", "shards"),
                    *("--output", f"shards/{name}", *_ONE_WORKER),
                )

        return Stage(
            "shards",
            run,
            outputs=("shards/clip/report.json", "shards/clip_exchanged/report.json"),
            settings={},
            owned=("shards",),
        )

    def _train(self, name: str, row: int) -> Stage:
        arguments = self._training(name, f"shards/{name}", self.plan.clip_epochs)
        title = name.replace("_", " ")

        def run() -> None:
            if self.plan.side_by_side:
                run_command(arguments, self.work_dir, self.log(name), title, row)
            else:
                self._call(name, *arguments)

        return Stage(
            title,
            run,
            outputs=(f"{name}/pairs/stage.json",),
            settings=self._recipe(self.plan.clip_epochs),
            owned=(name,),
        )

    def _scores(self) -> Stage:
        def run() -> None:
            for name in scores.MODELS:
                model = f"{name}/pairs/open_clip"
                common = ("--device", "cpu", "--seed", self.seed)
                for task in scores.TASKS:
                    self._call(
                        "scores",
                        *("clip-zero-shot", model, "--benchmark", f"tests/{task}.json"),
                        *("--data-path", "tests", "--output", f"scores/{name}/{task}", *common),
                    )
                self._call(
                    "scores",
                    *("clip-retrieval", model, "--pairs", "tests/pairs.jsonl"),
                    *("--output", f"scores/{name}/retrieval", *common),
                    *(word for k in scores.KS for word in ("--k", k)),
                )

        outputs = [f"scores/{name}/retrieval/metrics.json" for name in scores.MODELS]
        return Stage("scores", run, tuple(outputs), settings={}, owned=("scores",))

    def _ask(self, command: str, rows: str, out: str, most_tokens: int, *options: object) -> None:
        task: Any = command
        images = () if command == "summarise" else ("--image-folder", "patches/archive")
        self._call(
            "captions",
            *(command, rows, out, *images, "--local", "describer/model", "--device", "cpu"),
            *("--prompt-file", describer.prompt_file(task), "--batch-size", _BATCH_SIZE),
            *("--max-reply-tokens", most_tokens, *options),
            may_skip=True,
        )

    def _call(self, log: str, *arguments: object, may_skip: bool = False) -> None:
        call_command(arguments, self.work_dir, self.log(log), may_skip=may_skip)

    def _training(self, name: str, data: str, epochs: int) -> list[object]:
        settings = self._lengths(epochs) | {"seed": self.seed}
        return [
            *("train-clip", _RECIPE, "--output", name, "--data", f"pairs={data}"),
            *(word for key, value in settings.items() for word in ("--option", f"{key}={value}")),
            *("--device", "cpu"),
        ]

    def _lengths(self, epochs: int) -> dict[str, int]:
        plan = self.plan
        return {"epochs": epochs, "batch_size": plan.batch_size, "warmup": plan.warmup}

    def _recipe(self, epochs: int) -> dict[str, Any]:
        from xtuner_add.paths import configs_dir

        folder = configs_dir() / "pathgen"
        names = (f"{_RECIPE}.yml", f"{_RECIPE}.json", "pathgen_clip.yml")
        return {
            **self._lengths(epochs),
            "recipe": {name: sha256_of(folder / name) for name in names},
        }


def run(work_dir: Path, seed: int = 1024, quick: bool = False) -> dict[str, Any]:
    """Runs the demo; see `xtuner_add.demo.stages.run_demo`."""
    stages = _Stages(Path(work_dir).resolve(), Plan.quick() if quick else Plan(), seed)
    return run_demo(
        stages, scores.summarise, scores.table, write_report, EXPECTED_SECONDS, quick=quick
    )
