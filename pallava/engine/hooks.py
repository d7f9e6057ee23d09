"""MMEngine hooks of a training run."""

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

    Dropout is then the same whether a run went through or was resumed: with the data order that
    MMEngine restores, a resumed run continues bit for bit. Gradients that were accumulated but not
    applied are not in a checkpoint: save at multiples of `accumulative_counts`.
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
    """Says at the end of training how many samples were left out, and where the list is."""

    priority = "VERY_LOW"

    def after_train(self, runner: Any) -> None:
        """Logs the count, if there is one."""
        from pallava.engine.skipping import default_skip_log

        log = default_skip_log()
        skipped = log.read()
        if skipped and get_rank() == 0:
            runner.logger.warning(
                f"{len(skipped)} sample(s) were left out, for instance {skipped[0].file}: "
                f"{skipped[0].reason}. All of them: {log.path}"
            )
