"""Resumable training of a slide model on one fold, in one process or several.

Each step accumulates the gradients of `gc` batches. Batches are assigned to the processes in turn
and their gradients are summed, so that several processes compute what one does, up to the order of
additions. Every random number derives from the seed, the epoch and the batch or slide, so that a
continued run, or one with another number of processes, draws the same numbers.

Learning rates follow the published code. Layer-wise decay: the classifier learns at the full rate,
each layer below at `layer_decay` times the rate of the one above (BEiT,
https://arxiv.org/abs/2106.08254, appendix). Schedule: linear warm-up, then half a cosine, updated
at each optimizer step (MAE, https://arxiv.org/abs/2111.06377).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from gigapath.finetune.bags import Batch, SlideBags, derived_seed
from gigapath.finetune.metrics import LOWER_IS_BETTER, plain_values, score_predictions
from gigapath.finetune.mil import BagOutput, MILModel, classification_loss
from gigapath.finetune.result_files import SHOWN, draw_curves, score_part
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.survival import cox_loss
from gigapath.finetune.tasks import SlideTask
from pathcore.files import atomic_file, write_json
from pathcore.ranks import Ranks

STATE_NAME, WEIGHTS_NAME = "state.pt", "model.safetensors"

_ORDER, _TILES, _NOISE = range(3)
"""Purposes of random numbers, which keep their seeds apart."""

_ENCODER = "slide_encoder."
_LAYERS = f"{_ENCODER}encoder.layers."

Order = Callable[[int], Sequence[int]]
"""Maps an epoch to the indices of the training slides in their order."""


@dataclass(frozen=True)
class Step:
    """A step of the optimizer.

    Attributes:
        first: Number of its first batch within the epoch.
        batches: Slide indices of each batch.
        whole: Whether it has `gc` batches; the last step of an epoch may have fewer.
    """

    first: int
    batches: tuple[tuple[int, ...], ...]
    whole: bool


class Trainer:
    """Trains and tests a model on one fold.

    Args:
        model: A `MILModel`, or a module that is called as `model(features, coords, lengths=...)` on
            a padded batch and returns logits.
        task: What the outputs mean.
        settings: Settings of the training.
        parts: Bags of `train`, `test` and, optionally, `val`.
        folder: Folder for weights, state, figures and scores.
        ranks: The processes of the training.
        order: Order of the training slides per epoch; by default drawn from the seed.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        task: SlideTask,
        settings: FinetuneSettings,
        parts: Mapping[str, SlideBags],
        folder: Path,
        ranks: Ranks,
        *,
        order: Order | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model.to(ranks.device)
        self.task, self.settings, self.parts = task, settings, parts
        self.folder, self.ranks, self.progress = folder, ranks, progress
        self.order = order or self._order
        self.criterion = cox_loss if task.is_survival else classification_loss
        depth = int(getattr(getattr(model, "slide_encoder", None), "depth", 0))
        groups = parameter_groups(
            model,
            scale_and_decay(
                model,
                depth,
                weight_decay=settings.optim_wd,
                layer_decay=settings.layer_decay,
                protocol=settings.protocol,
            ),
        )
        kind = torch.optim.AdamW if settings.optim == "adamw" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = kind(groups, lr=settings.peak_lr)
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.epoch, self.step = 0, 0
        ranks.share_parameters(model)

    def finish(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the training, tests, and returns the scores.

        Args:
            inputs: Everything the run depends on, as JSON values.

        Raises:
            ValueError: If the folder holds a run with other inputs.
        """
        self.ranks.first(lambda: check_inputs(self.folder, inputs))
        done = self.folder / "metrics.json"
        if self.ranks.first(done.is_file):
            scores: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            return scores
        self.train()
        return self.test()

    def train(self) -> None:
        """Trains from the saved state to the last epoch, or until `patience` is exhausted."""
        self._resume()
        while self.epoch < self.settings.epochs and not self._out_of_patience():
            self.train_epoch()
            entry = self._validate()
            self.history.append(entry)
            if self._keeps(entry):
                self._save_weights()
            self.epoch, self.step, self.losses = self.epoch + 1, 0, []
            self._save_state()

    def train_epoch(self) -> list[float]:
        """Trains the rest of an epoch; returns the loss of each batch of this process."""
        plan = self.plan(self.epoch)
        num_batches = sum(len(step.batches) for step in plan)
        mine = [
            (step.first + place, batch)
            for step in plan[self.step :]
            for place, batch in enumerate(step.batches)
            if place % self.ranks.world == self.ranks.rank
        ]
        tiles_seed = derived_seed(self.settings.seed, _TILES, self.epoch)
        keys = [(batch, tiles_seed) for _, batch in mine]
        batches = iter(self.parts["train"].loader(keys, self.settings.num_workers))
        numbers = iter([number for number, _ in mine])
        self.model.train()
        shown = tqdm(plan[self.step :], desc=f"{self.folder.name} epoch {self.epoch}",
                     unit="step", disable=not (self.progress and self.ranks.is_first))  # fmt: skip
        for step in shown:
            self._set_rate(self.epoch + step.first / num_batches)
            own = len(step.batches[self.ranks.rank :: self.ranks.world])
            num_slides = sum(map(len, step.batches))
            for _ in range(own):
                self._accumulate(next(batches), next(numbers), num_slides)
            # The original skips an incomplete last step but keeps its gradients, which leak into
            # the next epoch.
            if step.whole or self.settings.protocol == "corrected":
                self.ranks.add_gradients(self.model.parameters())
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.step += 1
            if self.settings.save_steps and self.step % self.settings.save_steps == 0:
                self._save_state()
        return self.losses

    def plan(self, epoch: int) -> list[Step]:
        """Returns the steps of an epoch."""
        order, size, count = list(self.order(epoch)), self.settings.batch_size, self.settings.gc
        batches = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        steps = []
        for first in range(0, len(batches), count):
            chunk = tuple(batches[first : first + count])
            steps.append(Step(first, chunk, len(chunk) == count))
        return steps

    def predict(self, bags: SlideBags) -> tuple[NDArray[np.float64], float]:
        """Returns probabilities `(num_slides, num_classes)` and loss, in every process.

        For survival tasks, risks `(num_slides, 1)` instead of probabilities.
        """
        self.model.eval()
        numbers = range(self.ranks.rank, len(bags), self.ranks.world)
        seed = derived_seed(self.settings.seed, _TILES)
        loader = bags.loader([((n,), seed) for n in numbers], self.settings.num_workers)
        found: dict[int, NDArray[Any]] = {}
        with torch.inference_mode():
            for batch in loader:
                found[batch.indices[0]] = self._logits(batch)[0].cpu().numpy()
        merged = {k: v for part in self.ranks.gather(found) for k, v in part.items()}
        logits = torch.from_numpy(np.stack([merged[number] for number in range(len(bags))]))
        loss = self.criterion(logits, torch.from_numpy(bags.labels)).item()
        if self.task.is_survival:
            return logits.double().numpy(), loss
        probabilities = logits.sigmoid() if self.task.several_labels else logits.softmax(-1)
        return probabilities.numpy(), loss

    def test(self) -> dict[str, Any]:
        """Scores the selected weights on validation and test slides and writes predictions."""
        weights = load_file(self.folder / WEIGHTS_NAME)
        self.model.load_state_dict(weights)
        scores: dict[str, Any] = {"epoch": self._best()["epoch"], "num_epochs": len(self.history)}
        for part in ("val", "test"):
            if part not in self.parts:
                continue
            bags = self.parts[part]
            probabilities, loss = self.predict(bags)
            if self.ranks.is_first:
                scores[part] = score_part(
                    self.folder,
                    part,
                    bags.slides,
                    bags.labels,
                    probabilities,
                    self.task.classes,
                    self.task.setting,
                    num_resamples=self.settings.num_resamples,
                    seed=self.settings.seed,
                )
                scores[part]["loss"] = loss
        return self.ranks.first(lambda: self._write_scores(scores))

    def _accumulate(self, batch: Batch, number: int, num_slides: int) -> None:
        # Makes dropout the same in a resumed run and for any number of processes.
        torch.manual_seed(derived_seed(self.settings.seed, _NOISE, self.epoch, number))
        labels = batch.labels.to(self.ranks.device)
        if isinstance(self.model, MILModel):
            loss = self.model.loss(self._outputs(self.model, batch), labels, self.criterion)
        else:
            loss = self.criterion(self._logits(batch), labels)
        # The mean over the slides of a step. The original divides by `gc` even if the last step of
        # an epoch has fewer batches.
        share = len(batch.indices) / num_slides
        if self.settings.protocol == "published":
            share = 1 / self.settings.gc
        # The graph is freed per batch, so that memory does not grow with `gc`.
        (loss * share).backward()
        value = loss.item()
        if not np.isfinite(value):
            names = ", ".join(self.parts["train"].slides[i] for i in batch.indices)
            raise ValueError(f"epoch {self.epoch}, {names}: the loss is {value}; lower blr or lr")
        self.losses.append(value)

    def _outputs(self, model: MILModel, batch: Batch) -> list[BagOutput]:
        features = batch.features.to(self.ranks.device)
        with self._autocast():
            outputs = [model(bag[:n]) for bag, n in zip(features, batch.lengths, strict=True)]
        return [BagOutput(*(None if t is None else t.float() for t in o)) for o in outputs]  # type: ignore[arg-type]

    def _logits(self, batch: Batch) -> Tensor:
        if isinstance(self.model, MILModel):
            return torch.stack([output.logits for output in self._outputs(self.model, batch)])
        device = self.ranks.device
        features, coords = batch.features.to(device), batch.coords.to(device)
        with self._autocast():
            logits = self.model(features, coords, lengths=batch.lengths)
        return logits.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.settings.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=half)

    def _set_rate(self, epoch: float) -> None:
        settings, rate = self.settings, self.settings.peak_lr
        if settings.lr_scheduler == "cosine":
            rate = learning_rate(
                epoch,
                lr=rate,
                min_lr=settings.min_lr,
                warmup_epochs=settings.warmup_epochs,
                epochs=settings.epochs,
            )
        self.rate = rate
        set_learning_rate(self.optimizer, rate)

    def _order(self, epoch: int) -> Sequence[int]:
        seed = derived_seed(self.settings.seed, _ORDER, epoch)
        generator = torch.Generator().manual_seed(seed)
        labels = self.parts["train"].labels
        if self.settings.weighted_sample and labels.ndim == 1:
            weights = torch.from_numpy(1 / np.bincount(labels)[labels])
            drawn = torch.multinomial(weights, len(labels), True, generator=generator)
            return [int(number) for number in drawn]
        return [int(number) for number in torch.randperm(len(labels), generator=generator)]

    def _validate(self) -> dict[str, Any]:
        losses = [value for part in self.ranks.gather(self.losses) for value in part]
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "lr": self.rate,
            "train_loss": float(np.mean(losses)),
        }
        if "val" in self.parts:
            bags = self.parts["val"]
            probabilities, loss = self.predict(bags)
            scores = score_predictions(
                bags.labels, probabilities, self.task.classes, setting=self.task.setting,
                num_resamples=0,
            )  # fmt: skip
            entry |= {"val_loss": loss, **plain_values(scores)}
        return entry

    def _goodness(self, entry: Mapping[str, Any]) -> tuple[float, float]:
        """Sorts epochs by the monitor, if it is defined, then by loss."""
        if "val_loss" not in entry:
            return 0.0, 0.0
        monitor = self.settings.monitor
        value = entry.get(monitor) if monitor != "loss" else 0.0
        if value is None:
            return float("-inf"), -entry["val_loss"]
        return (-value if monitor in LOWER_IS_BETTER else value), -entry["val_loss"]

    def _best(self) -> dict[str, Any]:
        """Returns the epoch whose weights are kept."""
        if self.settings.model_select == "last_epoch":
            return self.history[-1]
        return max(self.history, key=self._goodness)  # the first of ties

    def _keeps(self, entry: Mapping[str, Any]) -> bool:
        return self._best() is entry

    def _out_of_patience(self) -> bool:
        if not self.settings.patience or not self.history:
            return False
        best = max(self.history, key=self._goodness)
        return self.epoch - 1 - int(best["epoch"]) >= self.settings.patience

    def _save_weights(self) -> None:
        if self.ranks.is_first:
            weights = {k: v.cpu().contiguous() for k, v in self.model.state_dict().items()}
            with atomic_file(self.folder / WEIGHTS_NAME) as partial:
                save_file(weights, partial)

    def _save_state(self) -> None:
        losses = [value for part in self.ranks.gather(self.losses) for value in part]
        if self.settings.protocol == "published":  # includes gradients left over for the next epoch
            self.ranks.add_gradients(self.model.parameters())
            if not self.ranks.is_first:
                self.optimizer.zero_grad()
        if self.ranks.is_first:
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            state = {
                "epoch": self.epoch,
                "step": self.step,
                "losses": losses,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "gradients": gradients,
                "history": self.history,
            }
            with atomic_file(self.folder / STATE_NAME) as partial:
                torch.save(state, partial)
        self.losses = losses if self.ranks.is_first else []
        self.ranks.barrier()

    def _resume(self) -> None:
        file = self.folder / STATE_NAME
        if not self.ranks.first(file.is_file):
            return
        state = torch.load(file, map_location=self.ranks.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        if self.ranks.is_first:
            self.losses = state["losses"]
            for name, parameter in self.model.named_parameters():
                parameter.grad = state["gradients"].get(name)

    def _write_scores(self, scores: dict[str, Any]) -> dict[str, Any]:
        write_json(self.folder / "history.json", self.history)
        draw_curves(
            self.folder / "curves.png",
            self.history,
            step="epoch",
            losses=("train_loss", "val_loss"),
            scores=SHOWN[self.task.setting],
            chosen=scores["epoch"],
        )
        write_json(self.folder / "metrics.json", scores)
        return scores


def layer_id(name: str, depth: int, *, protocol: str = "corrected") -> int:
    """Returns the layer that a parameter belongs to: 0 for the embedding, depth + 1 for the top.

    The original compares names with a prefix that the projection of the embedding does not have, so
    the projection learns at the full rate; `protocol="published"` reproduces that.

    Args:
        name: Name of the parameter in the classifier.
        depth: Number of layers of the slide encoder.
        protocol: `corrected` or `published`.
    """
    if "cls_token" in name or "pos_embed" in name:
        return 0
    if name.startswith(f"{_ENCODER}patch_embed.") and protocol == "corrected":
        return 0
    if name.startswith(_LAYERS):
        return int(name.removeprefix(_LAYERS).split(".")[0]) + 1
    return depth + 1


def scale_and_decay(
    model: nn.Module,
    depth: int,
    *,
    weight_decay: float,
    layer_decay: float,
    protocol: str = "corrected",
) -> dict[str, tuple[float, float]]:
    """Returns learning rate factor and weight decay of each trained parameter.

    The factor is `layer_decay ** (depth + 1 - layer)`. Norms and biases have no weight decay.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(4, 2))
        >>> scale_and_decay(classifier, depth=12, weight_decay=0.05, layer_decay=0.95)
        {'0.weight': (1.0, 0.05), '0.bias': (1.0, 0.0)}
    """
    return {
        name: (
            layer_decay ** (depth + 1 - layer_id(name, depth, protocol=protocol)),
            0.0 if parameter.ndim == 1 else weight_decay,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def parameter_groups(
    model: nn.Module, settings: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Makes optimizer groups, one per pair of factor (`lr_scale`) and weight decay.

    Args:
        model: The model.
        settings: The result of `scale_and_decay`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in settings:
            groups.setdefault(settings[name], []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def learning_rate(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: int
) -> float:
    """Returns the learning rate at a point of the training; it is 0 at the first step of a warm-up.

    Args:
        epoch: Number of epochs seen, with fractions.
        lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the training.
        warmup_epochs: Length of the warm-up.
        epochs: Length of the training.

    Example:
        >>> schedule = dict(lr=1e-3, min_lr=0.0, warmup_epochs=1.0, epochs=5)
        >>> [learning_rate(epoch, **schedule) for epoch in (0, 0.5, 1, 3, 5)]
        [0.0, 0.0005, 0.001, 0.0005, 0.0]
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of each group, scaled by its `lr_scale`."""
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def check_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Writes the inputs of a run, or compares them with those of the run in the folder.

    Raises:
        ValueError: If the folder holds a run with other inputs; names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, wanted = folder / "config.json", json.loads(json.dumps(inputs))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != wanted:
            names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise ValueError(
                f"{folder}: holds a run with other {', '.join(names)}; name a new output folder"
            )
        return
    write_json(file, wanted)
