"""One process of a CLIP training: runs open_clip's trainer with arguments from a file.

Started as `python -m pathgen.clip.worker JOB.json`, or several times by torchrun. Arguments come
from a file because a list of a thousand shards exceeds the length limit of a command-line argument.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import random
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pathcore.encoders.encoder import num_cut_by_open_clip
from pathcore.files import StrPath
from pathcore.rows import encode_row

_BAD_SAMPLE = "Handling webdataset error"
_CAPTIONS_COUNTED = 1000  # tokenising all of 1.6 million would delay the training by minutes


class SkippedSamples(logging.Handler):
    """Log handler that records the samples open_clip's pipeline skips, which it only logs.

    Data workers are forked and append to the same file, one line at a time.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Records a warning of the pipeline; ignores all others."""
        message = record.getMessage()
        if message.startswith(_BAD_SAMPLE):
            error = sys.exc_info()[
                1
            ]  # webdataset names the sample in the arguments, not in the message
            row = {"id": getattr(error, "key", None), "shard": getattr(error, "url", None)}
            cause = getattr(error, "__cause__", None) or error
            row = {**row, "reason": f"cannot be decoded: {cause!r:.300}"}
            with self._path.open("ab") as file:
                file.write(encode_row(row))


@contextmanager
def cpu_data_parallel(active: bool) -> Iterator[None]:
    """Lets open_clip's trainer run in several processes on CPUs.

    The trainer always passes `device_ids` to DistributedDataParallel, which refuses them for models
    on the CPU. Nothing changes on GPUs.
    """
    import torch

    original = torch.nn.parallel.DistributedDataParallel
    if not active:
        yield
        return

    class CPUDataParallel(original):  # type: ignore[misc, valid-type]
        """DistributedDataParallel without `device_ids`."""

        def __init__(self, module: Any, device_ids: Any = None, **settings: Any) -> None:
            super().__init__(module, **settings)

    torch.nn.parallel.DistributedDataParallel = CPUDataParallel  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.nn.parallel.DistributedDataParallel = original  # type: ignore[misc]


@contextmanager
def shards_without_end_marks() -> Iterator[None]:
    """Lets open_clip's trainer read shards through webdataset 0.2.96 and later.

    Since that version an empty sample marks the end of each shard, at which open_clip's grouping
    stops (https://github.com/mlfoundations/open_clip/issues/935). This switches the marks off.
    """
    from open_clip_train import data
    from webdataset.tariterators import tar_file_expander

    original = data.tar_file_expander
    if "eof_value" in inspect.signature(tar_file_expander).parameters:
        data.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    try:
        yield
    finally:
        data.tar_file_expander = original


class SeededShuffle:
    """Pipeline stage that shuffles as webdataset does, but from a seed instead of the clock.

    Args:
        buffer_size: Number of samples from which one is drawn.
        initial: Number of samples read before the first is yielded.
        seed: Seed of the run.
        rank: Rank of the process.
        epoch: Function that returns the current epoch.
    """

    def __init__(
        self, buffer_size: int, initial: int, seed: int, rank: int, epoch: Callable[[], int]
    ) -> None:
        self._sizes = (buffer_size, initial)
        self._seed = (seed, rank)
        self._epoch = epoch

    def __call__(self, source: Iterator[Any]) -> Iterator[Any]:
        """Shuffles one epoch in one data worker."""
        from torch.utils.data import get_worker_info
        from webdataset.filters import _shuffle

        worker = get_worker_info()
        drawn_by = (*self._seed, self._epoch(), worker.id if worker else 0)
        return _shuffle(source, *self._sizes, random.Random(repr(drawn_by)))


@contextmanager
def samples_in_seeded_order() -> Iterator[None]:
    """Makes the order of samples depend on the trainer's seed and the epoch.

    The trainer shuffles shards by its seed, but samples by webdataset's default, which depends on
    clock and process id, so that no two runs are alike.
    """
    from open_clip_train import data

    original, clock_shuffle, shared = data.get_wds_dataset, data.wds.shuffle, data.SharedEpoch

    def get_wds_dataset(args: Any, *given: Any, **named: Any) -> Any:
        """Builds the trainer's dataset with `SeededShuffle` in place of its own shuffle."""
        epochs: list[Any] = []

        def shared_epoch(*given: Any, **named: Any) -> Any:
            epochs.append(shared(*given, **named))
            return epochs[-1]

        def shuffle(bufsize: int, initial: int) -> SeededShuffle:
            epoch = epochs[-1].get_value
            return SeededShuffle(bufsize, initial, args.seed, args.rank, epoch)

        data.SharedEpoch, data.wds.shuffle = shared_epoch, shuffle
        try:
            return original(args, *given, **named)
        finally:
            data.SharedEpoch, data.wds.shuffle = shared, clock_shuffle

    data.get_wds_dataset = get_wds_dataset
    try:
        yield
    finally:
        data.get_wds_dataset = original


def note_on_cut_captions(shard: StrPath, model: str, **tokenizer_options: Any) -> str:
    """Returns a sentence that says how many captions the text tower reads in part, if any.

    Args:
        shard: The shard, of which the first captions are counted.
        model: open_clip's name of the architecture.
        **tokenizer_options: Arguments of `open_clip.get_tokenizer`.
    """
    import open_clip

    with tarfile.open(shard) as tar:
        files = (m for m in tar if m.isreg() and m.name.endswith(".txt"))
        texts = [tar.extractfile(m).read() for m in islice(files, _CAPTIONS_COUNTED)]  # type: ignore[union-attr]
    tokenizer = open_clip.get_tokenizer(model, **tokenizer_options)
    num_cut = num_cut_by_open_clip(tokenizer, [text.decode("utf-8", "replace") for text in texts])
    if not num_cut:
        return ""
    return (
        f"{num_cut:,} of the first {len(texts):,} captions have more tokens than the "
        f"{tokenizer.context_length} that {model} reads: their ends are cut"
    )


def main(job_file: str) -> int:
    """Trains; returns the exit code."""
    import open_clip
    import torch
    from open_clip_train.main import main as train

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if job["model_file"]:
        open_clip.add_model_config(job["model_file"])
    if os.environ.get("RANK", "0") == "0" and (note := note_on_cut_captions(**job["captions"])):
        print(f"Warning: {note}", flush=True)
    logging.getLogger().addHandler(SkippedSamples(Path(job["skipped"])))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = job["device"] == "cpu" or not torch.cuda.is_available()
    bridges = (cpu_data_parallel(several and on_cpu), shards_without_end_marks())
    with bridges[0], bridges[1], samples_in_seeded_order():
        code = train(job["arguments"])
    if several and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 1 if code == -1 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
