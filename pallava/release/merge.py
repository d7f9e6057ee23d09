"""Merges LoRA adapters into a base model shard by shard, without instantiating the model.

Weights are read, merged and written in blocks of rows, so memory is bounded by a few blocks (in
fp32 by a few copies of one weight) regardless of model size. An interrupted merge resumes at the
shards where it stopped. At the end, every file is read back and compared with what was written, and
`pallava.release.verify` loads the folder with transformers.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from pallava.folder_build import FileDigest, FolderBuild
from pallava.release.adapters import (
    Adapter,
    AdapterError,
    load_part,
    merge_rows,
    needs_whole_weight,
)
from pallava.release.base_match import check_trained_on
from pallava.release.base_model import BaseModel
from pallava.release.verify import verify_model
from pallava.release.weights import (
    INDEX_NAME,
    SafetensorsWriter,
    TensorInfo,
    WeightFolder,
    row_blocks,
    write_index,
)
from pathcore.device_claims import choose_device
from pathcore.files import StrPath, file_identity
from pathcore.weights import CheckpointError

BLOCK_NUMEL = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Elements per block, by device. On a CPU, a block of 4 MiB in fp32 fits in the caches."""

_BLOCKS_AT_A_TIME = 2
"""One block is read while another is merged."""

_SHARDS_AT_A_TIME = 4
"""Concurrent shards on a CPU; each holds a few blocks, or in fp32 a few copies of one weight."""

_COMMON_WITH_EFFECT = {"model_type", "is_decoder", "add_cross_attention", "pruned_heads"}
_WITHOUT_EFFECT = {"torch_dtype", "auto_map", "use_cache", "initializer_range", "pretraining_tp"}
"""Of the fields of config.json that all models have, only the former change what is computed; the
others are notes and settings of generation, as are the latter, which some models have. Whether
embeddings are tied is compared as loaded."""

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template.*"),
)
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def merge(
    base: StrPath,
    adapters: Sequence[StrPath],
    out: StrPath,
    *,
    device: str | None = None,
    one_tensor_per_shard: bool = False,
    force_base: bool = False,
    probe: bool = True,
    progress: bool = True,
) -> dict[str, str]:
    """Merges LoRA adapters into a base model and writes a folder that loads without PEFT.

    The base model's dtypes and shards are kept; `.bin` files become safetensors. The result is
    bitwise equal to PEFT's `merge_and_unload` in fp32, and rounded once in half precision. Tied
    embeddings of which an adapter changed only one side are untied, as they were in training.

    Args:
        base: Folder of a Hugging Face causal language model.
        adapters: Folders written by PEFT, merged in this order; empty to rewrite the base model.
        out: Output folder; an interrupted merge resumes in `OUT.partial`.
        device: `cpu` or `cuda`. Defaults to a GPU if there is one.
        one_tensor_per_shard: Whether to write every tensor to a separate shard.
        force_base: Whether to skip the check that the adapters were trained on `base`.
        probe: Whether to compare the result with PEFT's model on a few tokens; see
            `pallava.release.verify`.
        progress: Whether to show a progress bar.

    Returns:
        SHA-256 digest by file name, verified by reading the files back.

    Raises:
        FileNotFoundError: If a folder does not exist or contains no weights.
        CheckpointError: If weights are damaged, if an adapter does not fit them or was trained on
            another model, or if the result differs from what PEFT computes.
        OutputExistsError: If `out` holds something else.
    """
    merger = Merger(base, adapters, device, force_base=force_base)
    plan = merger.plan(one_tensor_per_shard=one_tensor_per_shard)
    inputs = {"operation": "merge", "split": one_tensor_per_shard, **merger.identity()}
    with FolderBuild(out, inputs) as build:
        if not build.complete:
            write_shards(merger, plan, build, progress=progress)
            tokenizers = [
                adapter.folder
                for adapter in merger.adapters
                if (adapter.folder / "tokenizer_config.json").is_file()
            ]
            copied = (*TOKENIZER_FILES, "generation_config.json", "*.py", *LICENCE_FILES)
            copy_files(merger.base.folder, build, copied)
            for folder in tokenizers[-1:]:
                copy_files(folder, build, TOKENIZER_FILES)
            write_config(build, merger.base.config | plan.config_changes)
            verify_model(merger.base, merger.adapters, build.folder, tied=plan.is_tied, probe=probe)
        return build.finish()


@dataclass(frozen=True)
class OutputTensor:
    """Origin of one tensor of the merged model.

    Args:
        info: Name, dtype and shape in the output.
        source: Name in the base model, or in the adapter if `adapter` is set.
        adapter: Index of the adapter that replaces the base weight.
        weight: Name of the base weight that adapters add to; None for a plain copy.
    """

    info: TensorInfo
    source: str
    adapter: int | None = None
    weight: str | None = None


@dataclass
class MergePlan:
    """All tensors of the output by shard, and changes to config.json.

    Attributes:
        shards: Tensors in write order.
        is_tied: Whether the output layer shares the input embeddings and is therefore not written.
        config_changes: Fields of `config.json` that differ from the base model's.
    """

    shards: list[list[OutputTensor]]
    is_tied: bool
    config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(tensor.info.num_bytes for shard in self.shards for tensor in shard)


class Merger:
    """A base model and adapters, ready to be merged.

    Args:
        base: Folder of a Hugging Face causal language model.
        adapters: Folders written by PEFT, merged in this order.
        device: `cpu` or `cuda`. Defaults to a GPU if there is one.
        force_base: Whether to skip the check that the adapters were trained on `base`.

    Raises:
        FileNotFoundError: If a folder does not exist or contains no weights.
        CheckpointError: If weights are damaged, or an adapter does not fit them.
    """

    def __init__(
        self,
        base: StrPath,
        adapters: Sequence[StrPath] = (),
        device: str | None = None,
        *,
        force_base: bool = False,
    ) -> None:
        self.base = BaseModel(base)
        self.adapters = [Adapter(folder) for folder in adapters]
        for adapter in self.adapters:
            adapter.check_mergeable()
        self.device = str(choose_device(device))
        self._check_targets()
        if not force_base:
            for adapter in self.adapters:
                check_trained_on(adapter, self.base)

    def plan(self, *, untie: bool = False, one_tensor_per_shard: bool = False) -> MergePlan:
        """Plans which tensors are written to which shard.

        Args:
            untie: Whether to write the output layer even if it equals the input embeddings.
            one_tensor_per_shard: Whether to write every tensor to a separate shard.
        """
        shards = [[self._output(name) for name in names] for names in self.base.shards()]
        is_tied = self.base.is_tied and not untie and not self._is_one_side_changed()
        changes = self._vocabulary(shards)
        if self.base.is_tied and not is_tied:
            embeddings = str(self.base.input_embeddings)
            shard = next(s for s in shards if any(t.info.name == embeddings for t in s))
            shard.append(self._untied_output())
            changes["tie_word_embeddings"] = False
        if one_tensor_per_shard:
            shards = [[tensor] for shard in shards for tensor in shard]
        # Wide dtypes first, which aligns each tensor to its element size.
        for shard in shards:
            shard.sort(key=lambda tensor: -tensor.info.dtype.itemsize)
        return MergePlan([shard for shard in shards if shard], is_tied, changes)

    def blocks(self, tensor: OutputTensor) -> Iterator[Tensor]:
        """Computes an output tensor in blocks of rows, on the CPU."""
        info = self._source_info(tensor)
        block = BLOCK_NUMEL["cuda" if self.device.startswith("cuda") else "cpu"]
        parts = []
        if tensor.weight is not None:
            transposed = self.base.stores_transposed(tensor.weight)
            parts = [
                load_part(adapter, adapter.parts[tensor.weight], info, self.device, transposed)
                for adapter in self.adapters
                if tensor.weight in adapter.parts
            ]
        bias_parts = self._bias_parts(tensor)
        whole = bool(parts) and needs_whole_weight(info, parts)
        blocks = [(0, None)] if whole else row_blocks(info, block)

        def merged(start: int, stop: int | None) -> Tensor:
            rows = self._read(tensor, start, stop)
            if parts:
                rows = merge_rows(rows.to(self.device), parts, start, stop).cpu()
            for bias, scaling in bias_parts:
                rows = (rows + bias * scaling).to(rows.dtype)
            return rows.to(tensor.info.dtype)

        with ThreadPoolExecutor(_BLOCKS_AT_A_TIME) as pool:
            ahead: deque[Future[Tensor]] = deque()
            for span in blocks:
                ahead.append(pool.submit(merged, *span))
                if len(ahead) > _BLOCKS_AT_A_TIME:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def identity(self) -> dict[str, Any]:
        """Returns everything that the output depends on, to recognise earlier builds."""
        return {
            "base": folder_identity(self.base.folder),
            "adapters": [folder_identity(adapter.folder) for adapter in self.adapters],
        }

    def _output(self, name: str) -> OutputTensor:
        info = self.base.info(name)
        weight = name if any(name in adapter.parts for adapter in self.adapters) else None
        return self._replaced(OutputTensor(info, name, None, weight))

    def _replaced(self, tensor: OutputTensor) -> OutputTensor:
        """Takes a tensor from the last adapter that stores it in full."""
        for index, adapter in reversed(list(enumerate(self.adapters))):
            source = adapter.replacements.get(tensor.info.name)
            if source is None and self.base.is_tied:
                source = self._tied_replacement(adapter, tensor.info.name)
            if source is not None:
                info = replace(tensor.info, shape=adapter.weights.info(source).shape)
                return replace(tensor, info=info, source=source, adapter=index)
        return tensor

    def _tied_replacement(self, adapter: Adapter, name: str) -> str | None:
        """Returns the other side's tensor if an adapter stores one side for both.

        An adapter does so if PEFT was told to keep the weights tied, and for the embeddings of a
        resized vocabulary, which are saved although no module of them was trained.
        """
        sides = [str(self.base.input_embeddings), str(self.base.output_embeddings)]
        if name not in sides:
            return None
        saved = adapter.config.get("modules_to_save") or []
        modules = [side.removesuffix(".weight") for side in sides]
        trained = any(m == key or m.endswith(f".{key}") for m in modules for key in saved)
        if trained and not adapter.config.get("ensure_weight_tying"):
            return None
        return adapter.replacements.get(sides[1 - sides.index(name)])

    def _source_info(self, tensor: OutputTensor) -> TensorInfo:
        if tensor.adapter is None:
            return self.base.info(tensor.source)
        info = self.adapters[tensor.adapter].weights.info(tensor.source)
        return replace(info, name=tensor.info.name, dtype=tensor.info.dtype)

    def _read(self, tensor: OutputTensor, start: int, stop: int | None) -> Tensor:
        if tensor.adapter is None:
            return self.base.read(tensor.source, start, stop)
        rows = self.adapters[tensor.adapter].read(tensor.source, start, stop)
        return rows.to(tensor.info.dtype)

    def _bias_parts(self, tensor: OutputTensor) -> list[tuple[Tensor, float]]:
        """Returns LoRA's own biases (`lora_bias`), which are added to the layer's bias."""
        weight = tensor.info.name.removesuffix(".bias") + ".weight"
        if not tensor.info.name.endswith(".bias"):
            return []
        return [
            (adapter.read(part.names["lora_B.bias"]), part.scaling)
            for adapter in self.adapters
            if (part := adapter.parts.get(weight)) and "lora_B.bias" in part.names
        ]

    def _check_targets(self) -> None:
        if not self.adapters:
            return
        folder = self.base.folder
        if self.base.is_quantised:
            raise CheckpointError(
                f"{folder}: config.json has a quantization_config; merge into the unquantised base "
                "model"
            )
        if self.base.model is None and self.base.config.get("tie_word_embeddings") is not False:
            raise CheckpointError(
                f"{folder}: transformers does not know the architecture "
                f"{self.base.config.get('model_type')!r}, so it is unknown whether its output "
                'layer is tied to its embeddings; write "tie_word_embeddings": false into '
                "config.json if it is not"
            )
        names = set(self.base)
        if self.base.is_tied:
            names.add(str(self.base.output_embeddings))
        for adapter in self.adapters:
            targets = {*adapter.parts, *adapter.replacements}
            for weight, part in adapter.parts.items():
                if "lora_B.bias" in part.names:
                    targets.add(weight.removesuffix("weight") + "bias")
            unknown = sorted(targets - names)
            if unknown:
                raise AdapterError(
                    f"{adapter.folder}: {len(unknown)} of its {len(targets)} tensors have no place "
                    f"in {self.base.folder}: {', '.join(unknown[:5])}; is it the right base model "
                    f"({adapter.base_model or 'not named by the adapter'})?"
                )
        for adapter, other in permutations(self.adapters, 2):
            # An adapter with LoRA for embeddings also holds their untrained weight.
            twice = (set(adapter.replacements) - set(adapter.parts)) & set(other.parts)
            if twice:
                raise AdapterError(
                    f"{adapter.folder} holds {min(twice)} trained in full, and {other.folder} LoRA "
                    "for it, which PEFT cannot combine. If one was trained on the other's model, "
                    "merge that one first, and the later one into the result"
                )
        for name in {name for adapter in self.adapters for name in adapter.parts}:
            # One-byte dtypes, fp8 included, are quantised values.
            if name in self.base and self.base.info(name).dtype.itemsize == 1:
                raise CheckpointError(
                    f"{self.base.folder}: {name} is quantised ({self.base.info(name).dtype}); "
                    "merge into the unquantised base model"
                )

    def _is_one_side_changed(self) -> bool:
        """Returns whether adapters make tied input and output embeddings differ from each other.

        In training, PEFT changes only the side that it wraps. Its own merge changes both because
        they are one tensor; this one unties them, so that the result computes what was trained.
        """
        sides = str(self.base.input_embeddings), str(self.base.output_embeddings)
        if any(side in adapter.parts for adapter in self.adapters for side in sides):
            return True
        for adapter in reversed(self.adapters):
            sources = [
                adapter.replacements.get(side) or self._tied_replacement(adapter, side)
                for side in sides
            ]
            if sources[0] and sources[1]:
                return not _equal(adapter.weights, sources[0], sources[1])
            if sources[0] or sources[1]:
                return True
        return False

    def _untied_output(self) -> OutputTensor:
        embeddings, output = str(self.base.input_embeddings), str(self.base.output_embeddings)
        info = replace(self.base.info(embeddings), name=output)
        in_parts = any(output in adapter.parts for adapter in self.adapters)
        return self._replaced(OutputTensor(info, embeddings, None, output if in_parts else None))

    def _vocabulary(self, shards: list[list[OutputTensor]]) -> dict[str, Any]:
        name = self.base.input_embeddings
        sizes = [t.info.shape[0] for shard in shards for t in shard if t.info.name == name]
        if not sizes or sizes[0] == self.base.info(str(name)).shape[0]:
            return {}
        return {"vocab_size": sizes[0]}


@dataclass(frozen=True)
class MergeCheck:
    """Comparison of a merged model with base and adapters.

    Attributes:
        num_tensors: Number of compared tensors.
        num_equal: Number of bitwise equal tensors.
        worst: Name of the tensor with the largest deviation.
        roundings: Largest deviation, in units in the last place.
    """

    num_tensors: int
    num_equal: int
    worst: str
    roundings: float


def check_merge(
    base: StrPath,
    adapters: Sequence[StrPath],
    merged: StrPath,
    *,
    force_base: bool = False,
    progress: bool = True,
) -> MergeCheck:
    """Repeats a merge without writing it and compares it with a previously merged model.

    Args:
        base: Folder of the base model.
        adapters: Folders of the adapters, in merge order.
        merged: Folder of the merged model, written by any program.
        force_base: Whether to skip the check that the adapters were trained on `base`.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: If names or shapes differ, or fields of config.json that change what is
            computed.
    """
    merger, found = Merger(base, adapters, force_base=force_base), BaseModel(merged)
    plan = merger.plan()
    _check_config(merger.base, plan, found)
    tensors = _check_names(merger.base, plan, found)
    equal, worst, roundings = 0, "", 0.0
    for tensor in tqdm(tensors, disable=not progress, desc="Comparing"):
        name = tensor.info.name
        if found.info(name).shape != tensor.info.shape:
            raise CheckpointError(
                f"{found.folder}: {name} is {found.info(name).shape}, expected {tensor.info.shape}"
            )
        start, distance = 0, 0.0
        for rows in merger.blocks(tensor):
            stop = start + len(rows) if rows.dim() else None
            distance = max(distance, _roundings(rows, found.read(name, start, stop)))
            start = stop or 0
        equal += distance == 0
        if distance > roundings:
            worst, roundings = name, distance
    return MergeCheck(len(tensors), equal, worst, roundings)


def _check_config(base: BaseModel, plan: MergePlan, found: BaseModel) -> None:
    """Rejects a model whose config.json makes the same weights compute something else."""
    expected = _settings(base, base.config | plan.config_changes)
    settings = _settings(found, found.config)
    wrong = [
        f"{name} is {settings.get(name)!r:.80}, expected {value!r:.80}"
        for name, value in sorted(expected.items())
        if settings.get(name) != value
    ]
    if found.is_tied and not plan.is_tied:
        wrong.append("it ties the output layer to the embeddings, which differ after this merge")
    if found.is_quantised:
        wrong.append("it has a quantization_config; check the model before it is quantised")
    if wrong:
        raise CheckpointError(
            f"{found.folder / 'config.json'}: another model than the merge: {'; '.join(wrong)}"
        )


def _settings(model: BaseModel, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that change what is computed, with their defaults."""
    if model.model is not None:
        config = type(model.model.config).from_dict(config).to_dict()
    without_effect = set(PretrainedConfig().to_dict()) - _COMMON_WITH_EFFECT | _WITHOUT_EFFECT

    def with_effect(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: with_effect(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in without_effect and "dropout" not in name and "pdrop" not in name
        }

    return with_effect(config)


def _check_names(base: BaseModel, plan: MergePlan, found: BaseModel) -> list[OutputTensor]:
    """Rejects a model with lacking or additional tensors; returns those to compare."""
    planned = {tensor.info.name: tensor for shard in plan.shards for tensor in shard}
    dispensable = base.unexpected_names | {name for name in planned if base.ignores(name)}
    lacking = sorted(set(planned) - set(found) - dispensable)
    if lacking:
        raise CheckpointError(f"{found.folder}: lacks {len(lacking)} tensors: {lacking[:5]}")
    # `found` itself leaves out a stored copy of tied embeddings, which must be equal.
    extra = {name for name in {*found, *found.weights} - set(planned) if not found.ignores(name)}
    sides = {str(base.input_embeddings), str(base.output_embeddings)}
    if plan.is_tied and sides <= set(found.weights) and _equal(found.weights, *sides):
        extra -= sides
    if extra:
        raise CheckpointError(
            f"{found.folder}: holds {len(extra)} tensors that this merge does not have: "
            f"{sorted(extra)[:5]}"
        )
    return [tensor for name, tensor in planned.items() if name in found]


def write_shards(
    merger: Merger,
    plan: MergePlan,
    build: FolderBuild,
    *,
    prefix: str = "",
    extra: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> None:
    """Writes the shards of a plan and their index into a folder under construction.

    Args:
        merger: Source of the tensors.
        plan: Shards to write.
        build: Folder under construction; shards finished by an earlier run are kept.
        prefix: Prefix of every tensor name.
        extra: Further tensors, already in memory, for an additional last shard.
        progress: Whether to show a progress bar.
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
    """Writes several shards concurrently on the CPU.

    Reading, hashing and writing of a single shard do not scale with the number of threads. The
    first error stops the other shards at their next block.
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
    """Yields a writer for one shard of a folder under construction."""
    digest = FileDigest()
    with (
        build.file(name, digest) as partial,
        SafetensorsWriter(partial, infos, digest) as writer,
    ):
        yield writer


def copy_files(folder: Path, build: FolderBuild, patterns: Sequence[str]) -> None:
    """Copies files that accompany the weights: tokenizer, generation settings, licence, code."""
    for pattern in patterns:
        for source in sorted(folder.glob(pattern)):
            if source.is_file():
                with build.file(source.name) as partial:
                    shutil.copyfile(source, partial)


def write_config(build: FolderBuild, config: dict[str, Any]) -> None:
    """Writes config.json last, because a folder cannot be loaded without it."""
    with build.file("config.json") as partial:
        partial.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _equal(weights: WeightFolder, first: str, second: str) -> bool:
    left, right = weights.info(first), weights.info(second)
    return (left.shape, left.dtype) == (right.shape, right.dtype) and all(
        torch.equal(weights.read(first, *block), weights.read(second, *block))
        for block in row_blocks(left, BLOCK_NUMEL["cpu"])
    )


def folder_identity(folder: Path) -> list[Any]:
    """Identifies the content of an input folder without reading it."""
    return [file_identity(path) for path in sorted(folder.iterdir()) if path.is_file()]


def _roundings(expected: Tensor, found: Tensor) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    if not expected.numel():
        return 0.0
    limits = torch.finfo(
        found.dtype if found.dtype.itemsize < expected.dtype.itemsize else expected.dtype
    )
    expected, found = expected.double(), found.double()
    unit = torch.maximum(expected.abs(), found.abs()).clamp(min=limits.tiny) * limits.eps
    return float(((expected - found).abs() / unit).nan_to_num(float("inf")).max())
