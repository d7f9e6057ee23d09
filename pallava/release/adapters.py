"""LoRA adapters as PEFT saves them, read for merging.

PEFT itself (github.com/huggingface/peft) is the reference: every rule here is held to its
`merge_and_unload` by tests. It is not imported, because that takes longer than merging a model of
a few billion parameters, and because it merges whole models in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pallava.release.weights import WeightFolder
from pathcore.weights import CheckpointError

CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|"
    r"lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_UNSUPPORTED = {
    "layer_replication": "layers that are used twice",
    "target_parameters": "LoRA on parameters that belong to no linear layer",
    "trainable_token_indices": "single trained tokens",
    "alora_invocation_tokens": "activated LoRA, which depends on the text",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing, which depends on the text",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Settings under which the trained model is not base + B A, or which nobody here has checked."""


class AdapterError(CheckpointError):
    """An adapter that is damaged, of an unsupported kind, or made for another base model."""


@dataclass
class LoraPart:
    """The tensors of one adapted layer: names in the adapter's files."""

    module: str
    scaling: float
    rank: int
    transposed: bool = False
    embedding: bool = False
    names: dict[str, str] = field(default_factory=dict)

    @property
    def a_name(self) -> str:
        """The matrix that reads the layer's input."""
        return self.names["lora_embedding_A" if self.embedding else "lora_A.weight"]

    @property
    def b_name(self) -> str:
        """The matrix that writes the layer's output."""
        return self.names["lora_embedding_B" if self.embedding else "lora_B.weight"]


class Adapter:
    """A folder that PEFT's `save_pretrained` wrote.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Attributes:
        parts: What LoRA adds, by the name of the base weight that it is added to.
        replacements: Tensors that were trained as they are (`modules_to_save`, biases, resized
            embeddings): name in the base model -> name in the adapter.

    Raises:
        FileNotFoundError: No folder, or no adapter in it.
        AdapterError: A damaged adapter, or a kind that cannot be merged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.weights = WeightFolder(self.folder, "adapter_model")
        self.parts: dict[str, LoraPart] = {}
        self.replacements: dict[str, str] = {}
        for name in self.weights:
            self._sort_in(name)
        for weight_name, part in self.parts.items():
            self._check(weight_name, part)
        if not self.parts and not self.replacements:
            raise AdapterError(f"{self.folder}: the adapter holds no tensors")

    @property
    def base_model(self) -> str:
        """What the adapter was trained on, as its config says."""
        return str(self.config.get("base_model_name_or_path") or "")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads rows of a tensor, in fp32 where it is stored in half precision.

        PEFT loads adapters that way, too (`autocast_adapter_dtype`).

        Raises:
            AdapterError: It holds infinities or NaN.
        """
        tensor = self.weights.read(name, start, stop)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if tensor.is_floating_point() and not is_finite(tensor, tensor.dtype):
            raise AdapterError(f"{self.folder}: {name} holds infinities or NaN; training diverged")
        return tensor

    def _sort_in(self, name: str) -> None:
        if ".default." in name:
            raise AdapterError(
                f"{self.folder}: {name} is a name of a training checkpoint, not of an adapter; "
                "convert it first with `xtuner-add pth-to-hf`"
            )
        base_name = name.removeprefix(_PREFIX)
        match = _LORA_NAME.fullmatch(base_name)
        if match is None:
            if "lora_" in base_name:
                raise AdapterError(f"{self.folder}: tensor {name} is of a kind not known here")
            self.replacements[base_name.replace(".base_layer.", ".")] = name
            return
        module, part_name = match["module"], match["part"]
        part = self.parts.setdefault(f"{module}.weight", self._new_part(module))
        part.names[part_name] = name
        part.embedding |= part_name.startswith("lora_embedding")

    def _new_part(self, module: str) -> LoraPart:
        """Rank and scaling of a layer: `peft.tuners.lora.model`, `get_pattern_key`."""
        rank = int(_pattern_value(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = _pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        if rank < 1:
            raise AdapterError(f"{self.folder}: rank {rank} for {module}; at least 1 expected")
        # rsLoRA: arXiv:2312.03732
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        transposed = bool(self.config.get("fan_in_fan_out"))
        return LoraPart(module, float(alpha) / divisor, rank, transposed)

    def _check(self, weight_name: str, part: LoraPart) -> None:
        wanted = {"lora_embedding_A", "lora_embedding_B"} if part.embedding else _LINEAR
        missing = sorted(wanted - set(part.names))
        if missing:
            raise AdapterError(
                f"{self.folder}: {part.module} has {sorted(part.names)} but lacks {missing}"
            )
        a, b = (self.weights.info(name).shape for name in (part.a_name, part.b_name))
        if len(a) != 2 or len(b) != 2:
            raise AdapterError(
                f"{self.folder}: {part.module} has LoRA matrices of shape {a} and {b}; only linear "
                "layers and embeddings can be merged"
            )
        if (a[0], b[1]) != (part.rank, part.rank):
            raise AdapterError(
                f"{self.folder}: {weight_name} has LoRA matrices of rank {a[0]} and {b[1]}, but "
                f"{CONFIG_NAME} says {part.rank}"
            )
        if bool(self.config.get("use_dora")) != ("lora_magnitude_vector" in part.names):
            raise AdapterError(
                f"{self.folder}: {CONFIG_NAME} says use_dora={self.config.get('use_dora')}, which "
                f"the tensors of {part.module} contradict: {sorted(part.names)}"
            )


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether no value is NaN or lies outside the range of a type; one pass over the memory."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    limit = torch.finfo(dtype).max
    return bool(low >= -limit) and bool(high <= limit)


_LINEAR = {"lora_A.weight", "lora_B.weight"}


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"adapter {folder}: a folder with {CONFIG_NAME} and adapter_model.safetensors expected"
        )
    try:
        config = json.loads(file.read_bytes())
        kind = str(config["peft_type"]).upper()
        numbers = config["r"], config["lora_alpha"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{file}: no adapter config: {error!r}") from error
    if kind != "LORA":
        raise AdapterError(f"{file}: peft_type {kind}; only LoRA can be merged")
    if not all(isinstance(number, int | float) for number in numbers):
        raise AdapterError(f"{file}: r and lora_alpha are {numbers}; numbers expected")
    for setting, meaning in _UNSUPPORTED.items():
        if config.get(setting):
            raise AdapterError(f"{file}: {setting} is set ({meaning}); this cannot be merged here")
    return config
