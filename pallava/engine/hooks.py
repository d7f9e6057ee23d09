"""MMEngine hooks for training."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

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
