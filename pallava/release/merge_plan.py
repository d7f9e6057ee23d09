"""What merging writes where: every tensor of the output, and how it is computed in blocks."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pallava.release.adapters import Adapter, AdapterError
from pallava.release.lora import load_part, merge_rows, needs_whole_weight
from pallava.release.weights import TensorInfo, TorchFile, WeightFolder, row_blocks
from pathcore.files import file_identity
from pathcore.weights import CheckpointError

BLOCK_NUMEL = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Elements merged at a time: on the CPU 4 MiB in fp32, which stay in its caches."""

_BLOCKS_AT_A_TIME = 2
"""One is read while another is merged."""

_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_OUTPUT_EMBEDDINGS = "lm_head.weight"


@dataclass(frozen=True)
class OutputTensor:
    """Where a tensor of the merged model comes from.

    Args:
        info: Its name, type and shape in the output.
        source: Name in the base model or, if `adapter` is set, in that adapter.
        adapter: Index of the adapter that replaces the base weight.
        weight: The base weight's name under which adapters add to it; None for a plain copy.
    """

    info: TensorInfo
    source: str
    adapter: int | None = None
    weight: str | None = None


@dataclass
class MergePlan:
    """Every tensor of the output, by shard, and what changes in config.json."""

    shards: list[list[OutputTensor]]
    config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.info.num_bytes for shard in self.shards for tensor in shard)


class Merger:
    """A base model and adapters, ready to be merged.

    Args:
        base: Folder of a Hugging Face causal language model.
        adapters: Folders that PEFT wrote, merged in this order.
        device: `cpu` or `cuda`; by default a GPU where there is one.

    Raises:
        FileNotFoundError: A folder that is not there, or holds no weights.
        CheckpointError: Damaged weights, or adapters that do not fit them.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        adapters: Sequence[str | os.PathLike[str]] = (),
        device: str | None = None,
    ) -> None:
        self.base = WeightFolder(base)
        self.config = read_config(self.base.folder)
        self.adapters = [Adapter(folder) for folder in adapters]
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._check_targets()

    def plan(self, *, untie: bool = False, one_tensor_per_shard: bool = False) -> MergePlan:
        """Decides what is written where.

        Args:
            untie: Write the output embeddings even if they equal the input embeddings.
            one_tensor_per_shard: Give every tensor a shard of its own.
        """
        dropped = self._duplicates_of_tied()
        shards = [
            [self._output(name) for name in file.tensors if name not in dropped]
            for file in self.base.files
        ]
        changes = self._tied_embeddings(shards, untie)
        changes |= self._vocabulary(shards)
        if one_tensor_per_shard:
            shards = [[tensor] for shard in shards for tensor in shard]
        # Wide types first, so that each tensor starts at a multiple of its element's size.
        for shard in shards:
            shard.sort(key=lambda tensor: -tensor.info.dtype.itemsize)
        return MergePlan([shard for shard in shards if shard], changes)

    def blocks(self, tensor: OutputTensor) -> Iterator[Tensor]:
        """Computes a tensor of the output in blocks of rows, on the CPU."""
        info = self._source_info(tensor)
        block = BLOCK_NUMEL["cuda" if self.device.startswith("cuda") else "cpu"]
        parts = []
        if tensor.weight is not None:
            parts = [
                load_part(adapter, adapter.parts[tensor.weight], info, self.device)
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
        """What the output depends on, to recognise a build of the same inputs."""
        return {
            "base": folder_identity(self.base.folder),
            "adapters": [folder_identity(adapter.folder) for adapter in self.adapters],
        }

    def _output(self, name: str) -> OutputTensor:
        info = self.base.info(name)
        weight = name if any(name in adapter.parts for adapter in self.adapters) else None
        for index, adapter in reversed(list(enumerate(self.adapters))):
            if name in adapter.replacements:
                source = adapter.replacements[name]
                shape = adapter.weights.info(source).shape
                return OutputTensor(replace(info, shape=shape), source, index, weight)
        return OutputTensor(info, name, None, weight)

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
        """LoRA's own bias (`lora_bias`), which goes into the bias of the layer."""
        weight = tensor.info.name.removesuffix(".bias") + ".weight"
        if not tensor.info.name.endswith(".bias"):
            return []
        return [
            (adapter.read(part.names["lora_B.bias"]), part.scaling)
            for adapter in self.adapters
            if (part := adapter.parts.get(weight)) and "lora_B.bias" in part.names
        ]

    def _check_targets(self) -> None:
        names = {*self.base, *self._added_names()}
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
        for name in {name for adapter in self.adapters for name in adapter.parts}:
            if name in self.base and not self.base.info(name).dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.base.folder}: {name} is quantised ({self.base.info(name).dtype}); "
                    "merge into the unquantised base model"
                )
        if self.config.get("quantization_config") and self.adapters:
            raise CheckpointError(
                f"{self.base.folder}: config.json has a quantization_config; merge into the "
                "unquantised base model"
            )

    def _added_names(self) -> list[str]:
        """Output embeddings that the base does not store because they equal the input's."""
        tied = self.config.get("tie_word_embeddings") and _OUTPUT_EMBEDDINGS not in self.base
        return [_OUTPUT_EMBEDDINGS] if tied and self._input_embeddings() else []

    def _input_embeddings(self) -> str | None:
        found = [name for name in self.base if name.endswith(_INPUT_EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def _duplicates_of_tied(self) -> set[str]:
        """`.bin` files may hold the output embeddings as a second name of the input's."""
        if not self.config.get("tie_word_embeddings"):
            return set()
        groups = [
            group
            for file in self.base.files
            if isinstance(file, TorchFile)
            for group in file.shared_names()
        ]
        return {
            _OUTPUT_EMBEDDINGS
            for group in groups
            if _OUTPUT_EMBEDDINGS in group and self._input_embeddings() in group
        }

    def _tied_embeddings(self, shards: list[list[OutputTensor]], untie: bool) -> dict[str, Any]:
        """Unties the embeddings where an adapter changed only one side of them."""
        embeddings = self._input_embeddings()
        if not self.config.get("tie_word_embeddings") or embeddings is None:
            return {}
        outputs = {t.info.name: t for shard in shards for t in shard}
        changed = {
            name
            for adapter in self.adapters
            for name in (embeddings, _OUTPUT_EMBEDDINGS)
            if name in adapter.parts or name in adapter.replacements
        }
        if changed and self._same_replacement(embeddings):
            changed = set()
            shards[:] = [[t for t in s if t.info.name != _OUTPUT_EMBEDDINGS] for s in shards]
            outputs.pop(_OUTPUT_EMBEDDINGS, None)
        if not (changed or untie):
            return {}
        if _OUTPUT_EMBEDDINGS not in outputs:
            tensor = self._untied_output(embeddings)
            shard = next(shard for shard in shards if outputs[embeddings] in shard)
            shard.append(tensor)
        return {"tie_word_embeddings": False}

    def _same_replacement(self, embeddings: str) -> bool:
        """Whether the last adapter gives both sides one and the same new tensor."""
        for adapter in reversed(self.adapters):
            if embeddings in adapter.parts or _OUTPUT_EMBEDDINGS in adapter.parts:
                return False
            names = [adapter.replacements.get(n) for n in (embeddings, _OUTPUT_EMBEDDINGS)]
            if names[0] and not names[1] and adapter.config.get("ensure_weight_tying"):
                return True
            if names[0] and names[1]:
                return _equal(adapter, names[0], names[1])
        return False

    def _untied_output(self, embeddings: str) -> OutputTensor:
        info = replace(self.base.info(embeddings), name=_OUTPUT_EMBEDDINGS)
        in_parts = any(_OUTPUT_EMBEDDINGS in adapter.parts for adapter in self.adapters)
        weight = _OUTPUT_EMBEDDINGS if in_parts else None
        for index, adapter in reversed(list(enumerate(self.adapters))):
            source = adapter.replacements.get(_OUTPUT_EMBEDDINGS)
            if source is None and adapter.config.get("ensure_weight_tying"):
                source = adapter.replacements.get(embeddings)
            if source is not None:
                shape = adapter.weights.info(source).shape
                return OutputTensor(replace(info, shape=shape), source, index, weight)
        return OutputTensor(info, embeddings, None, weight)

    def _vocabulary(self, shards: list[list[OutputTensor]]) -> dict[str, Any]:
        embeddings = self._input_embeddings()
        for tensor in (tensor for shard in shards for tensor in shard):
            if tensor.info.name == embeddings and "vocab_size" in self.config:
                size = tensor.info.shape[0]
                return {"vocab_size": size} if size != self.config["vocab_size"] else {}
        return {}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a model folder.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: It is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model {folder}: a folder with config.json and weights expected")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: a JSON object expected")
    return config


def _equal(adapter: Adapter, first: str, second: str) -> bool:
    left, right = adapter.weights.info(first), adapter.weights.info(second)
    return (left.shape, left.dtype) == (right.shape, right.dtype) and all(
        torch.equal(adapter.weights.read(first, *block), adapter.weights.read(second, *block))
        for block in row_blocks(left, BLOCK_NUMEL["cpu"])
    )


def folder_identity(folder: Path) -> list[Any]:
    """What tells an input folder from a changed one without reading it."""
    return [file_identity(path) for path in sorted(folder.iterdir()) if path.is_file()]
