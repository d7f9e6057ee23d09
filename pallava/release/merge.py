"""LoRA adapters merged into a base model, shard by shard, without building the model.

Every weight is read, changed and written in blocks of rows: memory is bounded by a few blocks (in
fp32 by a few copies of one weight), whatever the size of the model. A killed merge continues at the
shards where it stopped; at the end every file is read again and compared with what was written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pallava.folder_build import FileDigest, FolderBuild
from pallava.release.merge_plan import MergePlan, Merger, OutputTensor
from pallava.release.weights import INDEX_NAME, SafetensorsWriter, TensorInfo, write_index

_SHARDS_AT_A_TIME = 4
"""On the CPU; each holds a few blocks in memory, or a few copies of one weight in fp32."""

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template.*"),
)
_COPIED = (
    *(*_TOKENIZER_FILES, "generation_config.json", "*.py"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    device: str | None = None,
    one_tensor_per_shard: bool = False,
    progress: bool = True,
) -> dict[str, str]:
    """Merges LoRA adapters into a base model and writes a folder that loads without PEFT.

    The base model's types and shards are kept; `.bin` becomes safetensors. The result equals
    PEFT's `merge_and_unload` bit for bit in fp32, and is rounded once in half precision. Where
    embeddings are tied and an adapter changed one side only, they are untied, as in training.

    Args:
        base: Folder of a Hugging Face causal language model.
        adapters: Folders that PEFT wrote, merged in this order; none to rewrite the base model.
        out: The folder to write; a killed merge continues in `OUT.partial`.
        device: `cpu` or `cuda`; by default a GPU where there is one.
        one_tensor_per_shard: Give every tensor a shard of its own.
        progress: Show a progress bar.

    Returns:
        SHA-256 digest by file name; verified by reading the files again.

    Raises:
        FileNotFoundError: A folder that is not there, or holds no weights.
        CheckpointError: Damaged weights, or adapters that do not fit them.
        OutputExistsError: `out` holds something else.
    """
    merger = Merger(base, adapters, device)
    plan = merger.plan(one_tensor_per_shard=one_tensor_per_shard)
    inputs = {"operation": "merge", "split": one_tensor_per_shard, **merger.identity()}
    with FolderBuild(out, inputs) as build:
        if not build.complete:
            write_shards(merger, plan, build, progress=progress)
            tokenizers = [a.folder for a in merger.adapters if _has_tokenizer(a.folder)]
            copy_files(merger.base.folder, build, _COPIED)
            for folder in tokenizers[-1:]:
                copy_files(folder, build, _TOKENIZER_FILES)
            write_config(build, merger.config | plan.config_changes)
        return build.finish()


def write_shards(
    merger: Merger,
    plan: MergePlan,
    build: FolderBuild,
    *,
    prefix: str = "",
    extra: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> None:
    """Writes the shards of a plan and their index into a folder that is being built.

    Args:
        merger: What computes the tensors.
        plan: What to write.
        build: The folder; shards that an earlier run finished are kept.
        prefix: Put before every name.
        extra: Further tensors, already in memory, for a last shard of their own.
        progress: Show a progress bar.
    """
    total = len(plan.shards) + bool(extra)
    weight_map: dict[str, str] = {}
    num_bytes = plan.num_bytes
    due: list[tuple[str, list[TensorInfo], list[OutputTensor]]] = []
    done_bytes = 0
    for number, shard in enumerate(plan.shards, 1):
        name = _shard_name(number, total)
        infos = [replace(t.info, name=prefix + t.info.name) for t in shard]
        weight_map |= dict.fromkeys((info.name for info in infos), name)
        if build.has(name):
            done_bytes += sum(info.num_bytes for info in infos)
        else:
            due.append((name, infos, shard))
    with tqdm(
        total=num_bytes,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc="Writing",
    ) as bar:
        _write_due(merger, due, build, bar)
    if extra:
        name = _shard_name(total, total)
        infos = [TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in extra.items()]
        infos.sort(key=lambda info: -info.dtype.itemsize)
        weight_map |= dict.fromkeys(extra, name)
        num_bytes += sum(info.num_bytes for info in infos)
        if not build.has(name):
            with new_shard(build, name, infos) as writer:
                for info in infos:
                    writer.write(info.name, extra[info.name])
    if total > 1:
        with build.file(INDEX_NAME) as partial:
            write_index(partial, weight_map, num_bytes)


def _write_due(
    merger: Merger,
    due: Sequence[tuple[str, list[TensorInfo], list[OutputTensor]]],
    build: FolderBuild,
    bar: tqdm,
) -> None:
    """Writes several shards at a time on the CPU, since reading, hashing and writing do not scale.

    The first error stops the others at their next block.
    """
    stopped = Event()

    def write(name: str, infos: list[TensorInfo], shard: list[OutputTensor]) -> None:
        with new_shard(build, name, infos) as writer:
            for info, tensor in zip(infos, shard, strict=True):
                for rows in merger.blocks(tensor):
                    if stopped.is_set():
                        raise CancelledError
                    writer.write(info.name, rows)
                    bar.update(rows.numel() * rows.dtype.itemsize)

    num_threads = torch.get_num_threads()
    at_a_time = 1 if merger.device.startswith("cuda") else min(_SHARDS_AT_A_TIME, num_threads)
    at_a_time = max(1, min(at_a_time, len(due)))
    torch.set_num_threads(max(1, num_threads // at_a_time))
    try:
        with ThreadPoolExecutor(at_a_time) as pool:
            try:
                for step in as_completed([pool.submit(write, *shard) for shard in due]):
                    step.result()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def new_shard(
    build: FolderBuild, name: str, infos: Sequence[TensorInfo]
) -> Iterator[SafetensorsWriter]:
    """Gives a writer for one shard of a folder that is being built."""
    digest = FileDigest()
    with (
        build.file(name, digest) as partial,
        SafetensorsWriter(partial, infos, digest) as writer,
    ):
        yield writer


def copy_files(folder: Path, build: FolderBuild, patterns: Sequence[str]) -> None:
    """Copies files beside the weights: tokenizer, generation settings, licence, code."""
    for pattern in patterns:
        for source in sorted(folder.glob(pattern)):
            if source.is_file():
                with build.file(source.name) as partial:
                    shutil.copyfile(source, partial)


def write_config(build: FolderBuild, config: dict[str, Any]) -> None:
    """Writes config.json, the last file of a folder: without it nothing loads."""
    with build.file("config.json") as partial:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()
