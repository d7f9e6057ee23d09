"""Where a training run writes down the samples it left out."""

from __future__ import annotations

from pathlib import Path

from mmengine.logging import MMLogger

from pallava.skipping import SKIP_LOG_NAME, SkipLog


def default_skip_log() -> SkipLog:
    """The skip log beside the log file of the current run, the same on every rank.

    Call it where the dataset is built, not in a data-loader worker. Without a run, for instance
    in a notebook, it lies in the current folder.
    """
    log_file = MMLogger.get_current_instance().log_file
    folder = Path(log_file).resolve().parent if log_file else Path.cwd()
    return SkipLog(folder / SKIP_LOG_NAME)
