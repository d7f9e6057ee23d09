"""Default location of the skip log of a training run."""

from __future__ import annotations

from pathlib import Path

from mmengine.logging import MMLogger

from pallava.skipping import SKIP_LOG_NAME, SkipLog


def default_skip_log() -> SkipLog:
    """Returns the skip log beside the log file of the current run, which is the same on every rank.

    It must be called where the dataset is built, not in a data loader worker. Without a run, for
    instance in a notebook, the log is in the current folder.
    """
    log_file = MMLogger.get_current_instance().log_file
    folder = Path(log_file).resolve().parent if log_file else Path.cwd()
    return SkipLog(folder / SKIP_LOG_NAME)
