"""Classifiers of vectors: the published linear probe, and other protocols on the same vectors.

The probe is a single linear layer, trained by SGD with a cosine schedule; the weights with the best
weighted F1 on the validation tiles are kept. The original draws the batches of one epoch and
repeats them, and computes AUROC and AUPRC from logits instead of probabilities.
`protocol="published"` draws batches the same way. With either protocol, the results list the
original's scores as `published`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gigapath.finetune.baselines import VectorSplit, check_methods
from gigapath.finetune.labelled_vectors import read_vectors
from gigapath.finetune.metrics import NUM_RESAMPLES
from gigapath.finetune.protocols import LINEAR_PROBE, SHOT_SCORES, Protocol, score_shots
from gigapath.finetune.result_files import (
    RESULTS_NAME,
    SKIPPED_NAME,
    TABLE_NAME,
    draw_curves,
    results_table,
    score_part,
    shots_table,
    spread,
)
from gigapath.finetune.settings import check_settings
from gigapath.finetune.trainer import check_inputs
from gigapath.published.embedding_zip import EmbeddingData, EmbeddingSplit
from pathcore import stats
from pathcore.device_claims import choose_device
from pathcore.files import (
    StrPath,
    atomic_file,
    folder_lock,
    remove_partials,
    write_json,
    write_text,
)
from pathcore.rows import write_rows

MONITORS = ("weighted_f1", "balanced_accuracy")

Order = Callable[[int], Tensor]
"""Maps an epoch to the indices of the training tiles in their order."""


_AT_LEAST = {"batch_size": 1, "train_iters": 1, "eval_interval": 0, "patience": 0}


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a linear probe; the defaults are those published for PCam.

    Attributes:
        protocol: `corrected` shuffles all tiles in every epoch. `published` draws tiles with
            replacement for one epoch and repeats it.
        batch_size: Number of tiles per step.
        train_iters: Number of steps.
        eval_interval: Number of steps between evaluations on the validation tiles; 0 for once per
            pass over the training tiles.
        optim: `sgd`, `adam` or `adamw`.
        lr: Initial learning rate.
        min_lr: Learning rate at the end of the cosine schedule.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty, added to the gradient; decoupled from it for `adamw`.
        model_select: `best` for the best `monitor` on the validation tiles, or `last`.
        monitor: `weighted_f1` or `balanced_accuracy`.
        patience: Number of steps without a better `monitor` after which training stops; 0 never
            stops.
        z_score: Whether to standardise each embedding to mean 0 and standard deviation 1.
        seed: Seed of weights and order.
        num_resamples: Number of resamples of the bootstrap intervals.
    """

    protocol: str = "corrected"
    batch_size: int = 128
    train_iters: int = 4000
    eval_interval: int = 100
    optim: str = "sgd"
    lr: float = 0.02
    min_lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.01
    model_select: str = "best"
    monitor: str = "weighted_f1"
    patience: int = 0
    z_score: bool = False
    seed: int = 42
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        known = {
            "protocol": ("corrected", "published"),
            "optim": ("sgd", "adam", "adamw"),
            "model_select": ("best", "last"),
            "monitor": MONITORS,
        }
        check_settings(self, known, _AT_LEAST)
        if self.lr <= 0:
            raise ValueError(f"lr {self.lr}: expected more than 0")


class LinearProbe(nn.Module):
    """Linear classifier of embeddings.

    Args:
        embed_dim: Width of the embeddings.
        num_classes: Number of classes.
    """

    def __init__(self, embed_dim: int = 1536, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps embeddings `(batch, embed_dim)` to logits `(batch, num_classes)`."""
        return self.fc(x)


class ProbeRun:
    """Resumable training and test of one linear probe.

    Args:
        data: Labelled tile embeddings.
        settings: Settings of the training.
        folder: Folder for weights, state, predictions and curves.
        device: `cuda` or `cpu`; by default a GPU if there is one.
        order: Order of the training tiles per epoch; by default that of `settings.protocol`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the settings need validation tiles, and there are none.
    """

    def __init__(
        self,
        data: EmbeddingData,
        settings: ProbeSettings,
        folder: Path,
        *,
        device: str | None = None,
        order: Order | None = None,
        progress: bool = False,
    ) -> None:
        if not data.splits["val"].ids and (settings.model_select == "best" or settings.patience):
            raise ValueError(
                f"{LINEAR_PROBE}: no validation tiles, but model_select is "
                f"{settings.model_select} and patience {settings.patience}; name some as val, or "
                "set model_select=last and patience=0"
            )
        self.data, self.settings, self.folder = data, settings, folder
        self.device = choose_device(device)
        self.features = data.splits["train"].features.to(self.device)
        self.labels = torch.from_numpy(data.splits["train"].labels).to(self.device)
        self.order = order or self._default_order
        self.progress = progress
        torch.manual_seed(settings.seed)
        self.model = LinearProbe(self.features.shape[1], len(data.classes)).to(self.device)
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": lambda p, **k: torch.optim.SGD(p, momentum=settings.momentum, **k),
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
        }
        self.optimizer = kinds[settings.optim](
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.train_iters, settings.min_lr
        )
        self.history: list[dict[str, Any]] = []
        self.best = -1.0
        self._pass: tuple[int, Tensor] | None = None

    def finish(self, setting: str) -> dict[str, Any]:
        """Completes the training, tests, and returns the scores of validation and test tiles."""
        self._check_folder()
        self.train()
        return self.test(setting)

    def train(self) -> list[float]:
        """Trains from the saved state to the last step; returns the loss of each step."""
        from tqdm import trange

        start, losses = self._resume(), []
        interval = self.settings.eval_interval or -(-len(self.labels) // self.settings.batch_size)
        if self._out_of_patience():
            return []
        for step in trange(
            start, self.settings.train_iters, initial=start, total=self.settings.train_iters,
            desc=LINEAR_PROBE, disable=not self.progress,
        ):  # fmt: skip
            rows = self.batch(step)
            loss = F.cross_entropy(self.model(self.features[rows]), self.labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())  # not .item(), which would wait for the GPU in every step
            done = step + 1
            if done % interval == 0 or done == self.settings.train_iters:
                self._evaluate(done, losses)
                if self._out_of_patience():
                    break
        return [float(loss) for loss in losses]

    def batch(self, step: int) -> Tensor:
        """Returns the indices of the training tiles of a step, at most `(batch_size,)`."""
        size = self.settings.batch_size
        per_pass = -(-len(self.labels) // size)
        number, position = divmod(step, per_pass)
        if self._pass is None or self._pass[0] != number:
            self._pass = number, self.order(number).to(self.device)
        return self._pass[1][position * size : (position + 1) * size]

    def test(self, setting: str) -> dict[str, Any]:
        """Scores the selected weights on validation and test tiles and writes predictions."""
        from safetensors.torch import load_file

        kept = self.settings.model_select
        self.model.load_state_dict(load_file(self.folder / f"{kept}.safetensors"))
        write_json(self.folder / "history.json", self.history)
        chosen = None
        if kept == "best":
            chosen = self._best()["iteration"]
        draw_curves(
            self.folder / "curves.png",
            self.history,
            step="iteration",
            losses=("train_loss", "val_loss"),
            scores=("weighted_f1", "accuracy"),
            chosen=chosen,
        )
        found = {}
        for name in _tested(self.data):
            split = self.data.splits[name]
            logits = self.predict(split.features)
            found[name] = score_part(
                self.folder,
                name,
                split.ids,
                split.labels,
                logits.softmax(-1).numpy(),
                self.data.classes,
                setting,
                num_resamples=self.settings.num_resamples,
                seed=self.settings.seed,
            )
            found[name]["published"] = published_scores(split.labels, logits.numpy())
        return found

    @torch.inference_mode()
    def predict(self, features: Tensor) -> Tensor:
        """Maps `(num_tiles, embed_dim)` to float32 logits `(num_tiles, num_classes)` on the CPU."""
        self.model.eval()
        parts = [self.model(part.to(self.device)).cpu() for part in features.split(1 << 14)]
        return torch.cat(parts).float()

    def _default_order(self, number: int) -> Tensor:
        published = self.settings.protocol == "published"
        generator = torch.Generator().manual_seed(
            self.settings.seed * 100_003 + (0 if published else number)
        )
        count = len(self.labels)
        if published:
            return torch.randint(count, (count,), generator=generator)
        return torch.randperm(count, generator=generator)

    def _evaluate(self, done: int, losses: list[Tensor]) -> None:
        from safetensors.torch import save_file

        since = done - (self.history[-1]["iteration"] if self.history else 0)
        recent = float(torch.stack(losses[-since:]).mean())
        if not np.isfinite(recent):
            raise ValueError(f"iteration {done}: the loss is {recent}; lower the learning rate")
        self.history.append(
            {
                "iteration": done,
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": recent,
                **self._validate(),
            }
        )
        weights = {k: v.cpu().contiguous() for k, v in self.model.state_dict().items()}
        score = self.history[-1].get(self.settings.monitor, -1.0)
        improved = score > self.best
        self.best = max(self.best, score)
        for name in ("best",) * improved + ("last",):
            with atomic_file(self.folder / f"{name}.safetensors") as partial:
                save_file(weights, partial)
        with atomic_file(self.folder / "state.pt") as partial:
            torch.save(
                {
                    "step": done,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "history": self.history,
                    "best": self.best,
                },
                partial,
            )

    def _validate(self) -> dict[str, float]:
        split = self.data.splits["val"]
        if not split.ids:
            return {}
        logits, labels = self.predict(split.features), torch.from_numpy(split.labels)
        scores = published_scores(split.labels, logits.numpy())
        predicted = logits.argmax(dim=1).numpy()
        matrix = stats.confusion(split.labels, predicted, len(self.data.classes))
        return {
            "val_loss": float(F.cross_entropy(logits, labels)),
            "weighted_f1": scores["f1_weighted"],
            "accuracy": scores["accuracy"],
            "balanced_accuracy": float(stats.balanced_accuracy(matrix)),
        }

    def _best(self) -> dict[str, Any]:
        return max(self.history, key=lambda row: row[self.settings.monitor])

    def _out_of_patience(self) -> bool:
        if not self.settings.patience or not self.history:
            return False
        since = self.history[-1]["iteration"] - self._best()["iteration"]
        return bool(since >= self.settings.patience)

    def _resume(self) -> int:
        file = self.folder / "state.pt"
        if not file.is_file():
            return 0
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history, self.best = state["history"], state["best"]
        return int(state["step"])

    def _check_folder(self) -> None:
        splits = self.data.splits
        inputs = {
            "settings": asdict(self.settings),
            "classes": list(self.data.classes),
            "num_tiles": {name: len(split.ids) for name, split in splits.items()},
            "embed_dim": self.features.shape[1],
            # Tables and embeddings that differ may be as long and as wide.
            "ids": {n: _sha256(json.dumps(s.ids).encode()) for n, s in splits.items()},
            "labels": {n: _sha256(s.labels.tobytes()) for n, s in splits.items()},
            "features": {n: _sha256(s.features.numpy().tobytes()) for n, s in splits.items()},
        }
        check_inputs(self.folder, inputs)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def published_scores(labels: NDArray[np.int64], logits: NDArray[Any]) -> dict[str, Any]:
    """Computes the six scores of the original, with AUROC and AUPRC from logits.

    AUROC and AUPRC are None if a class is absent.

    Args:
        labels: int64 `(num_tiles,)`.
        logits: float `(num_tiles, num_classes)`.
    """
    from sklearn.metrics import (
        average_precision_score,
        f1_score,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    predicted, table = logits.argmax(axis=1), np.eye(logits.shape[1])[labels]
    whole = bool(table.any(axis=0).all()) and len(np.unique(labels)) > 1
    precision, recall, _, _ = precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1_weighted": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "auroc_macro": float(roc_auc_score(table, logits, average="macro")) if whole else None,
        "auprc_macro": (
            float(average_precision_score(table, logits, average="macro")) if whole else None
        ),
    }


def probe_tiles(
    embeddings: StrPath,
    table: StrPath | None,
    out: StrPath,
    *,
    settings: ProbeSettings | None = None,
    methods: Sequence[str] = (LINEAR_PROBE,),
    embed_dim: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and tests classifiers of tile embeddings.

    Args:
        embeddings: Zip as published, a folder of `.pt` files, or a folder of `SLIDE.h5`.
        table: csv with columns `input`, `label` and `split`; by default the only csv among the
            embeddings.
        out: Output folder; the same call continues a run that was stopped.
        settings: Settings of the linear probe.
        methods: `linear_probe`, `knn`, `logistic`, `simpleshot`.
        embed_dim: Width of the embeddings; by default the width that most of them have.
        device: `cuda` or `cpu`; by default a GPU if there is one.
        progress: Whether to show progress bars.

    Returns:
        The content of `results.json`.

    Raises:
        FileNotFoundError: If embeddings or table do not exist.
        ValueError: If the table cannot be used, or `out` holds another run.
    """
    protocols = plain_protocols(methods)
    data = read_vectors(embeddings, table, embed_dim=embed_dim, progress=progress)
    return probe_vectors(
        data,
        str(embeddings),
        out,
        protocols,
        settings=settings,
        device=device,
        progress=progress,
    )


def plain_protocols(methods: Sequence[str]) -> list[Protocol]:
    """Returns a protocol for each method, with the method's defaults.

    Raises:
        ValueError: If a method is unknown.
    """
    return [Protocol(name, name) for name in check_methods(methods, (LINEAR_PROBE,))]


def probe_vectors(
    data: EmbeddingData,
    source: str,
    out: StrPath,
    protocols: Sequence[Protocol],
    *,
    settings: ProbeSettings | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates labelled vectors by protocols.

    Args:
        data: The vectors; see `gigapath.finetune.labelled_vectors`.
        source: Encoder or embeddings, for the report.
        out: Output folder; the same call continues a run that was stopped.
        protocols: The protocols, of different names.
        settings: Settings of linear probes; a protocol overrides those that it states.
        device: `cuda` or `cpu`, for linear probes; by default a GPU if there is one.
        progress: Whether to show progress bars.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: If a class has no training cases, the vectors do not suffice for a protocol, or
            `out` holds another run.
    """
    settings, out = settings or ProbeSettings(), Path(out)
    if settings.z_score:
        data = standardised(data)
    _check_can_learn(data)
    setting = "binary" if len(data.classes) == 2 else "multi_class"
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out / ".lock"):
        remove_partials(out)
        found = {}
        for protocol in protocols:
            folder = out / protocol.name
            folder.mkdir(exist_ok=True)
            if protocol.method == LINEAR_PROBE:
                found[protocol.name] = _probe(
                    protocol, data, settings, folder, setting, device, progress
                )
            elif protocol.shots:
                parts = _vector_splits(data)
                shots = score_shots(
                    protocol, parts["train"], parts["test"], len(data.classes), seed=settings.seed
                )
                write_json(folder / "shots.json", shots)
                found[protocol.name] = shots
            else:
                found[protocol.name] = _compare(protocol, data, settings, folder, setting)
        results = {
            "embeddings": source,
            "settings": asdict(settings),
            "protocols": {p.name: asdict(p) for p in protocols},
            "classes": list(data.classes),
            "setting": setting,
            "num_tiles": {name: len(split.ids) for name, split in data.splits.items()},
            "untested": [
                name for k, name in enumerate(data.classes) if k not in data.splits["test"].labels
            ],
            "num_skipped": len(data.skipped),
            "num_without_row": data.num_without_row,
            "methods": found,
        }
        write_rows(out / SKIPPED_NAME, data.skipped)
        write_text(out / TABLE_NAME, _table(results))
        write_json(out / RESULTS_NAME, results)
    return results


def _check_can_learn(data: EmbeddingData) -> None:
    for name in ("val", "test"):
        untrained = np.setdiff1d(data.splits[name].labels, data.splits["train"].labels)
        if len(untrained):
            count = int((data.splits[name].labels == untrained[0]).sum())
            raise ValueError(
                f"label {data.classes[untrained[0]]!r}: {count} usable cases in split {name}, none "
                "in train, so it cannot be learned; correct its spelling, name cases of it as "
                "train, or remove its rows"
            )


def _probe(
    protocol: Protocol,
    data: EmbeddingData,
    settings: ProbeSettings,
    folder: Path,
    setting: str,
    device: str | None,
    progress: bool,
) -> dict[str, Any]:
    settings = replace(settings, **protocol.settings)
    runs = []
    for number in range(protocol.num_runs):
        own = folder / f"seed_{settings.seed + number}" if protocol.num_runs > 1 else folder
        own.mkdir(exist_ok=True)
        seeded = replace(settings, seed=settings.seed + number)
        runs.append(ProbeRun(data, seeded, own, device=device, progress=progress).finish(setting))
    if len(runs) == 1:
        return runs[0]
    return {"runs": runs, "spread": spread([run["test"] for run in runs], setting)}


def _vector_splits(data: EmbeddingData) -> dict[str, VectorSplit]:
    return {n: VectorSplit(s.ids, s.features.numpy(), s.labels) for n, s in data.splits.items()}


def _tested(data: EmbeddingData) -> list[str]:
    return [name for name in ("val", "test") if data.splits[name].ids]


def _compare(
    protocol: Protocol, data: EmbeddingData, settings: ProbeSettings, folder: Path, setting: str
) -> dict[str, Any]:
    parts = _vector_splits(data)
    predict = protocol.fit(parts["train"], parts["val"], len(data.classes))
    found = {}
    for name in _tested(data):
        split = data.splits[name]
        found[name] = score_part(
            folder,
            name,
            split.ids,
            split.labels,
            predict(parts[name].vectors),
            data.classes,
            setting,
            num_resamples=settings.num_resamples,
            seed=settings.seed,
        )
    return found


def standardised(data: EmbeddingData) -> EmbeddingData:
    """Returns the data with each embedding standardised to mean 0 and standard deviation 1.

    Embeddings whose values are all equal have no such form, and are skipped.
    """
    splits, skipped = {}, [*data.skipped]
    for name, split in data.splits.items():
        centred = split.features - split.features.mean(dim=1, keepdim=True)
        deviations = split.features.std(dim=1, keepdim=True)
        varies = (split.features != split.features[:, :1]).any(dim=1)
        skipped += [
            {"id": key, "split": name, "reason": "all values are equal, which z_score cannot scale"}
            for key, kept in zip(split.ids, varies.tolist(), strict=True)
            if not kept
        ]
        splits[name] = EmbeddingSplit(
            tuple(key for key, kept in zip(split.ids, varies.tolist(), strict=True) if kept),
            (centred / deviations)[varies],
            split.labels[varies.numpy()],
        )
    return EmbeddingData(data.classes, splits, tuple(skipped), data.num_without_row)


def _table(results: Mapping[str, Any]) -> str:
    rows: list[tuple[tuple[str], Mapping[str, Any]]] = []
    shots, notes = [], []
    for name, found in results["methods"].items():
        if "shots" in found:
            shots += [(name, number, scores) for number, scores in found["shots"].items()]
            notes += [f"{name}: {n} shots skipped: {why}." for n, why in found["left_out"].items()]
        elif "spread" in found:
            rows.append(((f"{name}, {len(found['runs'])} seeds",), found["spread"]))
        else:
            rows.append(((name,), found["test"]))
    if results["untested"]:
        notes.append(
            "Classes without test cases, left out of means over classes: "
            f"{', '.join(results['untested'])}."
        )
    if results["num_skipped"]:
        notes.append(f"{results['num_skipped']} rows skipped: see skipped.jsonl.")
    for name, protocol in results["protocols"].items():
        if protocol["note"]:
            notes.append(f"{name}: {protocol['note']} {protocol['source']}".strip())
    title = f"Vectors of {results['embeddings']}"
    if not rows:
        return shots_table(title, shots, tuple(SHOT_SCORES), notes)
    whole = results_table(title, results["setting"], rows, ("method",), () if shots else notes)
    if not shots:
        return whole
    return whole + "\n" + shots_table("Few shots", shots, tuple(SHOT_SCORES), notes)
