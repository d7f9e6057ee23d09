"""Limits terminal output to what a user reads: one screen at the start, then the training.

MMEngine logs its environment, the whole config and a table of hooks, and the libraries below it
warn about their own internals. Those warnings are listed here, each with the reason to hide it.
The log file of a run still has all of MMEngine's output.
"""

from __future__ import annotations

import logging
from typing import Any

HIDDEN: tuple[tuple[str, str, str], ...] = (
    # Logger, beginning of the message, reason.
    ("mmengine", "\n----", "environment of the run; for reports of errors, in the log file"),
    ("mmengine", "Config:", "the whole config; in the log file, and as a file beside it"),
    ("mmengine", "Hooks will be executed", "order of MMEngine's hooks, which no option changes"),
    ("mmengine", "Failed to search registry with scope", "XTuner's registry has another name"),
    ("mmengine", "Distributed training is not used", "about SyncBatchNorm, which no model has"),
    ("mmengine", "Dataset ", "the visualizer draws no datasets, so metainfo is not needed"),
    ("mmengine", '"FileClient" will be deprecated', "MMEngine calls its own old name"),
    ("mmengine", '"HardDiskBackend" is the alias', "MMEngine calls its own old name"),
    ("mmengine", "Reach the end of the dataloader", "XTuner's loop counts iterations, as intended"),
    ("mmengine", "Set the random seed", "the start screen names the seed"),
    ("mmengine", "Num train samples", "the start screen counts the samples"),
    ("transformers.configuration_utils", "`torch_dtype` is deprecated",
     "the published configs' name, which transformers still takes"),
    ("transformers.modeling_utils", "`torch_dtype` is deprecated", "as above"),
    ("transformers.models.auto.auto_factory", "`torch_dtype` is deprecated", "as above"),
    ("DeepSpeed", "Setting accelerator to", "DeepSpeed is imported even if not used"),
    ("DeepSpeed", "Warning: The cache directory for DeepSpeed Triton", "as above"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm", "an optional kernel for 4 bits"),
    ("torch.distributed.elastic.multiprocessing.redirects", "NOTE: Redirects are currently",
     "about Windows and MacOS"),
)  # fmt: skip


class _Hide(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not record.getMessage().startswith(
            self._beginnings
        )


def shorten_console() -> None:
    """Hides the messages in `HIDDEN`; those of MMEngine stay in the log file."""
    from mmengine.logging import MMLogger

    by_logger: dict[str, tuple[str, ...]] = {}
    for name, beginning, _ in HIDDEN:
        by_logger[name] = (*by_logger.get(name, ()), beginning)
    ours = _Hide(by_logger.pop("mmengine"))
    for name, beginnings in by_logger.items():
        logging.getLogger(name).addFilter(_Hide(beginnings))

    original = MMLogger.__init__

    def with_filter(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _filter_terminal(self, ours)

    for logger in MMLogger._instance_dict.values():
        _filter_terminal(logger, ours)
    # Runners create their loggers by name, in the middle of their constructors.
    MMLogger.__init__ = with_filter  # type: ignore[method-assign]


def _filter_terminal(logger: logging.Logger, hide: logging.Filter) -> None:
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(hide)
