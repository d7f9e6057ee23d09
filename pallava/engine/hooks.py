"""MMEngine hooks for training."""

from __future__ import annotations

import math
import os
import random
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from pallava.engine.conversations import ConversationDataset
from pallava.feature_cache import describe
from pallava.pairs import PairDataset
from pathcore.files import folder_lock
from pathcore.garbage import collect_as_usual

# Primes: two pairs of iteration and rank have the same sum only if there are 100,003 ranks.
_ITERATION_STRIDE = 100_003
_RANK_STRIDE = 1_000_003


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds the random generators from seed, iteration and rank before every iteration.

    Dropout is then the same whether or not a run was interrupted; together with the data order that
    MMEngine restores, a resumed run continues bit for bit. Accumulated gradients that have not been
    applied are not part of a checkpoint, so checkpoints should be saved at multiples of
    `accumulative_counts`.
    """

    priority = "VERY_HIGH"

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Seeds Python, NumPy and torch."""
        del batch_idx, data_batch
        seed = (runner.seed or 0) + runner.iter * _ITERATION_STRIDE + get_rank() * _RANK_STRIDE
        seed %= 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module()
class SkippedSamplesHook(Hook):
    """Logs at the end of training how many samples were skipped, and where they are listed."""

    priority = "VERY_LOW"

    def after_train(self, runner: Any) -> None:
        """Logs the number of skipped samples if it is not zero."""
        from pallava.engine.skipping import default_skip_log

        log = default_skip_log()
        skipped = log.read()
        if skipped and get_rank() == 0:
            runner.logger.warning(
                f"{len(skipped)} sample(s) were skipped, for instance {skipped[0].file}: "
                f"{skipped[0].reason}. All of them: {log.path}"
            )


class DivergedError(RuntimeError):
    """Raised if loss or weights are NaN or infinite, since further training would be futile."""


@HOOKS.register_module()
class StopOnDivergenceHook(Hook):
    """Stops a run whose loss or trained weights are NaN or infinite, before they are saved.

    `adapt_config` adds this hook to every config that `xtuner-add train` loads.

    Raises:
        DivergedError: If the run has diverged; the message names the iteration and remedies.
    """

    # Runs before CheckpointHook (VERY_LOW), so that no checkpoint of such weights is saved.
    priority = "LOW"

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Checks the losses of one iteration."""
        del batch_idx, data_batch
        for name, value in (outputs or {}).items():
            is_loss = "loss" in name and isinstance(value, torch.Tensor) and value.numel() == 1
            if is_loss and not torch.isfinite(value):
                raise DivergedError(self._message(runner, f"{name} is {value.item()}"))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Checks the trained weights, which the step after the last loss may have corrupted."""
        del checkpoint
        for name, parameter in runner.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise DivergedError(self._message(runner, f"{name} holds NaN or infinite values"))

    @staticmethod
    def _message(runner: Any, what: str) -> str:
        return (
            f"training diverged at iteration {runner.iter + 1}: {what}; nothing was saved from it. "
            "Resume from an earlier checkpoint (--resume), or start again with a lower "
            "optim_wrapper.optimizer.lr, a longer warm-up or bfloat16; if iteration 1 is affected, "
            "check model.pretrained_pth and the data"
        )


@HOOKS.register_module()
class StartScreenHook(Hook):
    """Logs at the start what is trained, on which data, and for how long.

    `adapt_config` adds this hook to every config that `xtuner-add train` loads.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Any) -> None:
        """Logs the summary.

        Raises:
            ValueError: If `feature_cache` is set and does not suit the encoder or the disk, or if a
                resumed training had other batches or epochs of another length.
        """
        collect_as_usual()  # imports are done, and no tensor of a step is to wait
        _check_batches(runner)
        _check_data(runner)
        lines = start_screen(runner)  # on every rank, for its checks
        if get_rank() == 0:
            runner.logger.info("\n".join(("", *lines, "")))


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Holds the lock of the work directory, and warns if it holds an earlier training.

    `adapt_config` adds this hook to every config that `xtuner-add train` loads.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._stack = ExitStack()

    def before_run(self, runner: Any) -> None:
        """Takes the lock.

        Raises:
            FolderInUseError: If another training uses the directory, since both would write the
                same checkpoints.
        """
        if get_rank() != 0:
            return
        work_dir = Path(runner.work_dir)
        self._stack.enter_context(folder_lock(work_dir / ".lock", folder=f"--work-dir {work_dir}"))
        # Data loader workers that outlive a killed training must not keep its lock.
        os.register_at_fork(after_in_child=self._stack.close)
        last = work_dir / "last_checkpoint"
        if last.is_file() and not runner._resume:
            runner.logger.warning(
                f"{work_dir} holds checkpoints of an earlier training, the last is "
                f"{Path(last.read_text().strip()).name}: those of this one come among them, and "
                "replace those of the same iteration; name another folder with --work-dir"
            )

    def after_run(self, runner: Any) -> None:
        """Releases the lock."""
        del runner
        self._stack.close()


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs `samples_per_s`, the samples of all processes per second, over the log's window.

    `adapt_config` adds this hook to every config that `xtuner-add train` loads.
    """

    priority = "NORMAL"  # between IterTimerHook, registered earlier, and LoggerHook

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Adds the scalar of one iteration."""
        del batch_idx, data_batch, outputs
        if "train/time" in runner.message_hub.log_scalars:
            step_s = runner.message_hub.get_scalar("train/time").mean(
                runner.log_processor.window_size
            )
            samples = _batch_size(runner) * get_world_size()
            runner.message_hub.update_scalar("train/samples_per_s", samples / step_s)


def start_screen(runner: Any) -> list[str]:
    """Returns the lines that describe a training which is about to start.

    Args:
        runner: MMEngine's runner, with model, data loader and training loop built.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    loader, loop, cfg = runner.train_dataloader, runner.train_loop, runner.cfg
    parts = {}
    for name, part in model.named_children():
        parameters = list(part.parameters())
        trained = sum(_size(p) for p in parameters if p.requires_grad)
        parts[name] = (sum(map(_size, parameters)), trained)
    lines = [
        f"{'Model':<10}{type(model).__name__}, {sum(map(_size, model.parameters())):,} parameters"
    ]
    for name, (number, trained) in parts.items():
        if number:
            what = f"{trained:,} of {number:,} trained" if trained else f"{number:,}, frozen"
            lines.append(f"{'':<10}{name}: {what}")
    dataset = loader.dataset
    images = ""
    if isinstance(dataset, ConversationDataset) and dataset.knows_sub_images:
        counts = dataset.num_sub_images
        images = f", {sum(counts) / max(len(counts), 1):.1f} sub-images a sample"
    lines.append(f"{'Data':<10}{len(dataset):,} samples{images}")
    if getattr(dataset, "feature_cache", None) is not None:
        lines.append(f"{'Features':<10}{describe(model, dataset)}")
    batch, world = _batch_size(runner), get_world_size()
    counts = (cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    counts = (cfg.get("strategy") or {}).get("gradient_accumulation_steps", counts)
    lines.append(
        f"{'Batch':<10}{batch} x {world} process(es) x accumulation {counts} = "
        f"{batch * world * counts} samples an update"
    )
    lines.append(
        f"{'Steps':<10}{loop.max_iters:,} iterations, {len(loader):,} an epoch; "
        f"{math.ceil(loop.max_iters / counts):,} updates"
    )
    held = sum(_size(p) * p.element_size() for p in model.parameters())
    learned = [p for p in model.parameters() if p.requires_grad]
    state = sum(_size(p) * (p.element_size() + 8) for p in learned)
    if any(hasattr(p, "ds_numel") for p in learned):
        held, state = held / world, state / world
    device = next(model.parameters()).device
    lines.append(
        f"{'Memory':<10}weights {held / 2**20:,.0f} MiB, gradients and AdamW {state / 2**20:,.0f} "
        f"MiB on {device}, plus activations"
    )
    lines.append(f"{'Seed':<10}{runner.seed}")
    lines.append(f"{'Log':<10}{runner.logger.log_file} (config and environment too)")
    return lines


def _check_batches(runner: Any) -> None:
    """Refuses to resume with batches of another size.

    A checkpoint holds the number of iterations done. With other batches they stand for other
    samples, so that the training would end early, or train some samples again.
    """
    hub, name = runner.message_hub, "samples_per_iteration"  # part of every checkpoint
    batch, world = _batch_size(runner), get_world_size()
    before = hub.get_info(name, batch * world)
    if before != batch * world:
        raise ValueError(
            f"--resume: the training had {before} samples an iteration, this one has "
            f"{batch * world}: batch {batch} x {world} process(es); set "
            "train_dataloader.batch_size and NPROC_PER_NODE to the same product, or start a new "
            "training from the weights by model.pretrained_pth"
        )
    hub.update_info(name, before)


def _check_data(runner: Any) -> None:
    """Refuses to resume with epochs of another length, and warns if the samples are others.

    Epochs and learning rates follow from the length, and the order of the samples, of which those
    before the checkpoint are passed over, from their costs.
    """
    hub, dataset = runner.message_hub, runner.train_dataloader.dataset
    epoch = len(runner.train_dataloader)
    before = hub.get_info("iterations_per_epoch", epoch)
    samples = len(dataset)
    if before != epoch:
        raise ValueError(
            f"--resume: an epoch of the training had {before} iterations of "
            f"{hub.get_info('num_samples'):,} samples, this one has {epoch} of {samples:,}; give "
            "it the data that it began with, or start a new training from the weights by "
            "model.pretrained_pth"
        )
    hub.update_info("iterations_per_epoch", epoch)
    hub.update_info("num_samples", samples)
    order: Any = [samples]
    if isinstance(dataset, ConversationDataset):
        order = dataset.modality_length
    elif isinstance(dataset, PairDataset):
        order = dataset.caption_ids
    digest = zlib.crc32(np.asarray(order, dtype=np.int64).tobytes())
    if hub.get_info("samples_digest", digest) != digest and get_rank() == 0:
        runner.logger.warning(
            "--resume: the data set is not the one that the training began with: its rows are "
            "others or in another order, so that this epoch repeats some samples and leaves out "
            "others"
        )
    hub.update_info("samples_digest", digest)


def _batch_size(runner: Any) -> int:
    """Returns the samples of one process in one iteration."""
    batch_size: int = runner.cfg.train_dataloader.get("batch_size", 1)
    return batch_size


def _size(parameter: torch.Tensor) -> int:
    """Returns the number of values, also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel())
