"""Hooks that make checkpoints portable, check inputs, and resume without rereading data."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from cite.mm.samplers import DrawSampler
from cite.text_scores import TextScores
from pathcore.exit_codes import EXIT_SKIPPED
from pathcore.files import write_text
from pathcore.weights import CheckpointError, shorten

_PLAIN = (str, int, float, bool, type(None), torch.Tensor)
"""Types that `torch.load(weights_only=True)` accepts; subclasses are refused."""
_LAST = "last_checkpoint"
_FEATURES_OF = "features_of"
_DATA_OF = "data_of"


@HOOKS.register_module()
class PortableCheckpointHook(Hook):
    """Makes checkpoints load with `weights_only=True`, also after the folder was moved.

    MMEngine stores log buffers as objects, which torch refuses to load since 2.6; they are removed.
    Plain values, such as the best score so far, are kept. `last_checkpoint` contains the name of
    the file in the same folder instead of an absolute path.
    """

    priority = "LOWEST"  # after CheckpointHook, which writes `last_checkpoint`

    def before_run(self, runner: Any) -> None:
        """Resolves the checkpoint of `--resume` relative to `last_checkpoint`."""
        file = os.path.join(runner.work_dir, _LAST)
        if runner._resume and runner._load_from is None and os.path.isfile(file):
            with open(file, encoding="utf-8") as content:
                name = os.path.basename(content.read().strip())
            checkpoint = os.path.join(runner.work_dir, name)
            if not os.path.isfile(checkpoint):
                raise FileNotFoundError(
                    f"{file} names {name}, which is not beside it; resume from another by "
                    "--resume FILE, or start over without --resume"
                )
            runner._load_from = checkpoint

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Removes everything but plain values from the checkpoint's message hub."""
        info = checkpoint.get("message_hub", {}).get("runtime_info", {})
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": _plain_info(info),
            "resumed_keys": {},
        }

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Makes `last_checkpoint` relative."""
        self._make_relative(runner)

    def after_train_epoch(self, runner: Any) -> None:
        """Makes `last_checkpoint` relative."""
        self._make_relative(runner)

    def _make_relative(self, runner: Any) -> None:
        file = os.path.join(runner.work_dir, _LAST)
        if not is_main_process() or not os.path.isfile(file):
            return
        with open(file, encoding="utf-8") as content:
            path = content.read().strip()
        if os.path.basename(path) != path:
            write_text(file, os.path.basename(path))


def _plain_info(info: dict[str, Any]) -> dict[str, Any]:
    # numpy.float64 is a subclass of float, but torch refuses it.
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in info.items()}
    return {k: v for k, v in values.items() if type(v) in _PLAIN}


@HOOKS.register_module()
class ResumeDataHook(Hook):
    """Continues a resumed run at its next batch.

    MMEngine would read and transform all batches that were already consumed. With a sampler of
    `cite.mm.samplers`, the sequence starts after them. Batch size times ranks must be that of the
    interrupted run; otherwise some patches would be repeated or left out.
    """

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Writes into the checkpoint what the position in the data depends on."""
        checkpoint.setdefault("meta", {})[_DATA_OF] = _data_of(runner)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compares batches and data of a resumed run with those of the interrupted one.

        Raises:
            ValueError: If the batches have another size.
        """
        before = (checkpoint.get("meta") or {}).get(_DATA_OF)
        if not runner._resume or before is None:
            return
        (samples, patches), (now, patches_now) = before, _data_of(runner)
        if now != samples:
            raise ValueError(
                f"--resume: the run had {samples} patches an iteration, this one has {now}; choose "
                "train_dataloader.batch_size and the number of processes with the same product"
            )
        if patches_now != patches:
            runner.logger.warning(
                f"--resume: the run began with {patches:,} patches, this one has {patches_now:,}: "
                "it draws others than it would have drawn"
            )

    def before_train(self, runner: Any) -> None:
        """Advances the sampler, and replaces the batches that the loop skips by None."""
        loop = runner.train_loop
        dataloader = loop.dataloader
        sampler = getattr(dataloader, "sampler", None)
        if not (
            isinstance(loop, IterBasedTrainLoop) and loop.iter and isinstance(sampler, DrawSampler)
        ):
            return
        sampler.set_start(loop.iter * dataloader.batch_size * sampler.world_size)
        loop.dataloader_iterator = _Behind(loop.iter, iter(dataloader))
        runner.logger.info(f"Data continues at iteration {loop.iter}; nothing is read again")


def _data_of(runner: Any) -> list[int]:
    """Returns the patches of an iteration of all ranks, and those of the data set."""
    dataloader = runner.train_loop.dataloader
    return [dataloader.batch_size * get_world_size(), len(dataloader.dataset)]


class _Behind:
    """Iterator that yields None for the first `count` batches, which MMEngine's loop skips."""

    def __init__(self, count: int, batches: Any) -> None:
        self.count = count
        self.batches = batches

    def __iter__(self) -> _Behind:
        return self

    def __next__(self) -> Any:
        if self.count:
            self.count -= 1
            return None
        return next(self.batches)


@HOOKS.register_module()
class MissingPatchesHook(Hook):
    """Ends a run with exit code 3 if patches were skipped (`max_missing` of `PatchDataset`)."""

    priority = "LOWEST"

    def after_run(self, runner: Any) -> None:
        """Writes `missing_patches.txt` to the work folder and ends the run.

        Raises:
            SystemExit: If patches were skipped.
        """
        loops = (runner._train_loop, runner._val_loop, runner._test_loop)
        datasets = [loop.dataloader.dataset for loop in loops if hasattr(loop, "dataloader")]
        missing = sorted({line for data in datasets for line in getattr(data, "missing", ())})
        if not missing:
            return
        file = os.path.join(runner.work_dir, "missing_patches.txt")
        if is_main_process():
            write_text(file, "\n".join(missing) + "\n")
            runner.logger.error(
                f"{len(missing)} patch(es) were skipped, for instance {missing[0]}. All: {file}"
            )
        raise SystemExit(EXIT_SKIPPED)


@HOOKS.register_module()
class ZeroShotHook(Hook):
    """Allows `mim test ... --checkpoint none` for models without trained parameters."""

    def before_run(self, runner: Any) -> None:
        """Prevents loading if the checkpoint is `none`.

        Raises:
            ValueError: If the model has trainable parameters, which would be random.
        """
        if runner._load_from != "none":
            return
        trained = [name for name, p in runner.model.named_parameters() if p.requires_grad]
        if trained:
            raise ValueError(
                f"--checkpoint none: {len(trained)} tensors of this config are trained and would "
                f"be random ({shorten(trained)}); give a checkpoint, or use a zeroshot config"
            )
        runner._load_from = None


@HOOKS.register_module()
class CheckpointFitsHook(Hook):
    """Stops a run if a checkpoint does not fit the model.

    MMEngine loads what fits and only logs the rest, so a checkpoint of another model would be
    tested, or fine-tuned, with random weights.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Checks names and shapes before MMEngine loads the checkpoint.

        Raises:
            CheckpointError: If a tensor is missing, unexpected or of a different shape.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state_dict = checkpoint.get("state_dict", checkpoint)
        state_dict = {name.removeprefix("module."): t for name, t in state_dict.items()}
        try:
            # Loading by torch instead of comparing names, because load hooks rename tensors.
            model.load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{runner._load_from} is not a checkpoint of this config: {_shorten_lines(error)}"
            ) from error


@HOOKS.register_module()
class ClassesAgreeHook(Hook):
    """Stops a run if head and data have different classes, so that labels would be mixed up."""

    def before_train(self, runner: Any) -> None:
        """Checks the training data, and warns of slides that are also used for validation."""
        _check_classes(runner, runner.train_loop.dataloader.dataset)
        if runner._val_loop is not None:
            shared = _slides(runner.train_loop.dataloader.dataset) & _slides(
                runner.val_loop.dataloader.dataset
            )
            if shared:
                runner.logger.warning(
                    f"{len(shared)} slide(s) both train and validate, for instance {min(shared)}: "
                    "validation scores will be too high"
                )

    def before_val(self, runner: Any) -> None:
        """Checks the validation data."""
        _check_classes(runner, runner.val_loop.dataloader.dataset)

    def before_test(self, runner: Any) -> None:
        """Checks the test data."""
        _check_classes(runner, runner.test_loop.dataloader.dataset)


@HOOKS.register_module()
class FeaturesAgreeHook(Hook):
    """Stops if features come from another encoder than the classifier was trained on.

    Different encoders often have the same width, and the wrong one would only lower the scores.
    """

    def before_train(self, runner: Any) -> None:
        """Compares training and validation features."""
        trained = _features_of(runner.train_loop)
        if runner._val_loop is not None:
            _check_origin(trained, runner.val_loop)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Writes into the checkpoint which features it was trained on."""
        if origin := _features_of(runner.train_loop):
            checkpoint.setdefault("meta", {})[_FEATURES_OF] = origin

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint with the features of every loop."""
        trained = (checkpoint.get("meta") or {}).get(_FEATURES_OF, "")
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            if hasattr(loop, "dataloader"):
                _check_origin(trained, loop)


def _features_of(loop: Any) -> str:
    cache = getattr(loop.dataloader.dataset, "cache", None)
    return cache.origin if cache is not None else ""


def _check_origin(trained: str, loop: Any) -> None:
    found = _features_of(loop)
    if trained and found and trained != found:
        raise ValueError(
            f"{loop.dataloader.dataset.cache.source}: features of {found}, but the classifier is "
            f"trained on those of {trained}; compute them with the same encoder, pixels and "
            "checkpoint by `xtuner-add cite-features`"
        )


def _check_classes(runner: Any, dataset: Any) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    head, classes = getattr(model, "head", None), list(dataset.metainfo.get("classes") or ())
    named = list(head.classes) if isinstance(head, TextScores) else None
    count = len(named) if named is not None else getattr(head, "num_classes", None)
    if not classes or count is None:
        return
    source = getattr(dataset, "ann_file", type(dataset).__name__)
    if count != len(classes):
        raise ValueError(
            f"{source}: {len(classes)} classes ({', '.join(classes)}), but the head has {count}"
        )
    if named is not None and named != classes and set(named) == set(classes):
        raise ValueError(
            f"{source}: classes in the order {', '.join(classes)}, but the head has "
            f"{', '.join(named)}; use the same order in both"
        )


def _slides(dataset: Any) -> set[str]:
    if len(dataset) == 0 or "slide" not in dataset.get_data_info(0):
        return set()
    return {dataset.get_data_info(index)["slide"] for index in range(len(dataset))}


def _shorten_lines(error: Exception) -> str:
    return "\n".join(line[:300] for line in str(error).splitlines()[:20])
