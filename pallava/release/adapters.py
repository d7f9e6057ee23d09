"""Reads LoRA adapters saved by PEFT and computes what they add to the weights of a base model.

LoRA, arXiv:2106.09685: `W + s B A`. DoRA, arXiv:2402.09353, equation 5: `m (W + s B A) / norm`,
where the norm of each output is taken over its inputs. PEFT (github.com/huggingface/peft) is the
reference: the operations and their order follow `peft/tuners/lora/layer.py` and `variants.py`
(0.21), so that fp32 results are bitwise equal. PEFT itself is not used because it merges whole
models in memory.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pallava.release.weights import TensorInfo, WeightFolder
from pathcore.files import StrPath
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
"""Settings under which the trained model is not base + B A, or which our tests do not cover."""

_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not modify the base weights. PiSSA, OLoRA, CorDA, LoftQ and
LoRA-GA subtract the initial `B A` from them: such an adapter belongs to a modified base model that
is not stored, and that PEFT recomputes whenever it loads the adapter."""

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


_LINEAR = {"lora_A.weight", "lora_B.weight"}


class AdapterError(CheckpointError):
    """Raised for an adapter that is damaged, unsupported, or made for another base model."""


@dataclass
class LoraPart:
    """Names of the tensors of one adapted layer in the adapter's files."""

    module: str
    scaling: float
    rank: int
    fan_in_fan_out: bool = False
    embedding: bool = False
    names: dict[str, str] = field(default_factory=dict)

    @property
    def a_name(self) -> str:
        """Name of the matrix A, which is applied to the layer's input."""
        return self.names["lora_embedding_A" if self.embedding else "lora_A.weight"]

    @property
    def b_name(self) -> str:
        """Name of the matrix B, which produces the layer's output."""
        return self.names["lora_embedding_B" if self.embedding else "lora_B.weight"]


class Adapter:
    """An adapter folder written by PEFT's `save_pretrained`.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Attributes:
        parts: Adapted layers, by the name of the base weight that LoRA adds to.
        replacements: Names of tensors that were trained in full (`modules_to_save`, biases, resized
            embeddings), as name in the base model -> name in the adapter.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no adapter.
        AdapterError: If the adapter is damaged or cannot be merged.
    """

    def __init__(self, folder: StrPath) -> None:
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
            raise AdapterError(f"{self.folder}: the adapter contains no tensors")

    @property
    def base_model(self) -> str:
        """Name of the base model, as stated in the adapter's config."""
        return str(self.config.get("base_model_name_or_path") or "")

    def check_mergeable(self) -> None:
        """Rejects kinds of LoRA whose trained model is not base + B A.

        Raises:
            AdapterError: If the adapter is of such a kind.
        """
        file = self.folder / CONFIG_NAME
        for setting, meaning in _UNSUPPORTED.items():
            if self.config.get(setting):
                raise AdapterError(
                    f"{file}: {setting} is set ({meaning}); this cannot be merged here"
                )
        initialisation = self.config.get("init_lora_weights")
        if initialisation not in _PLAIN_INITIALISATIONS:
            raise AdapterError(
                f"{file}: init_lora_weights {initialisation!r} changed the base model's weights "
                "before training, so that the adapter does not fit the stored ones. Convert it to "
                "plain LoRA with PEFT: save the untrained adapter, and after training call "
                "save_pretrained(..., path_initial_model_for_weight_conversion=UNTRAINED)"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads rows of a tensor; half precision is converted to fp32.

        PEFT converts adapters in the same way when it loads them (`autocast_adapter_dtype`).

        Raises:
            AdapterError: If the tensor contains infinity or NaN.
        """
        tensor = self.weights.read(name, start, stop)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if tensor.is_floating_point() and not is_finite(tensor, tensor.dtype):
            raise AdapterError(f"{self.folder}: {name} holds infinities or NaN; training diverged")
        return tensor

    def is_copy(self, name: str) -> bool:
        """Returns whether a tensor repeats or precedes one that was trained in full.

        For a resized vocabulary, PEFT saves embeddings in `modules_to_save` under their own name,
        and again as the parts of its wrapper.
        """
        plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        return name != plain and plain in self.weights

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
            if not self.is_copy(name):
                self.replacements[base_name.replace(".base_layer.", ".")] = name
            return
        module, part_name = match["module"], match["part"]
        part = self.parts.setdefault(f"{module}.weight", self._new_part(module))
        part.names[part_name] = name
        part.embedding |= part_name.startswith("lora_embedding")

    def _new_part(self, module: str) -> LoraPart:
        """Looks up rank and scaling of a layer as `peft.tuners.lora.model` does."""
        rank = int(_pattern_value(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = _pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        if rank < 1:
            raise AdapterError(f"{self.folder}: rank {rank} for {module}; expected at least 1")
        # rsLoRA: arXiv:2312.03732
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return LoraPart(module, alpha / divisor, rank, bool(self.config.get("fan_in_fan_out")))

    def _check(self, weight_name: str, part: LoraPart) -> None:
        wanted = {"lora_embedding_A", "lora_embedding_B"} if part.embedding else _LINEAR
        missing = sorted(wanted - set(part.names))
        if missing:
            raise AdapterError(
                f"{self.folder}: {part.module} has {sorted(part.names)} but lacks {missing}"
            )
        for name in part.names.values():
            if self.weights.info(name).dtype not in _FLOAT_TYPES:
                raise AdapterError(
                    f"{self.folder}: {name} is stored as {self.weights.info(name).dtype}; "
                    "expected an adapter in fp32, fp16 or bf16"
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


@dataclass
class LoadedPart:
    """The matrices of one adapter for one layer, loaded to memory."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    transposed: bool
    source: str

    def delta(self, start: int, stop: int | None) -> Tensor:
        """Returns what LoRA adds to the rows `start:stop` of the weight, `(rows, columns)`."""
        if self.transposed:
            product = (self.b @ self.a[:, start:stop]).T
        else:
            product = self.b[start:stop] @ self.a
        return product.mul_(self.scaling)

    def add_to(self, rows: Tensor, start: int, stop: int | None) -> Tensor:
        """Adds the delta to rows of the weight in place, in one pass over memory."""
        if self.transposed:
            return rows.addmm_(self.a[:, start:stop].T, self.b.T, alpha=self.scaling)
        return rows.addmm_(self.b[start:stop], self.a, alpha=self.scaling)


def load_part(
    adapter: Adapter,
    part: LoraPart,
    info: TensorInfo,
    device: str,
    stores_transposed: bool | None = None,
) -> LoadedPart:
    """Loads the matrices of a layer and checks that they fit the base weight.

    Args:
        adapter: Adapter to read from.
        part: Layer to load.
        info: Shape and dtype of the base weight.
        device: Device to put the matrices on.
        stores_transposed: Whether the layer's class stores its weight as (inputs, outputs); None if
            the class is unknown.

    Raises:
        AdapterError: If the matrices do not fit the weight.
    """
    a = adapter.read(part.a_name).to(device)
    b = adapter.read(part.b_name).to(device)
    shape = (b.shape[0], a.shape[1])
    flipped = (shape[1], shape[0])
    if part.embedding:
        transposed = True
    elif stores_transposed is not None:
        transposed = stores_transposed
    else:
        # PEFT saves a single `fan_in_fan_out` for all layers, that of the last one, so it is used
        # only if the shape is ambiguous.
        transposed = part.fan_in_fan_out if shape == flipped else info.shape != shape
    if info.shape != (flipped if transposed else shape):
        raise AdapterError(
            f"{adapter.folder}: {info.name} is {info.shape} in the base model, but the adapter "
            f"was trained on {flipped if transposed else shape}; is it the right base model "
            f"({adapter.base_model or 'not named by the adapter'})?"
        )
    name = part.names.get("lora_magnitude_vector")
    magnitude = adapter.read(name).reshape(-1).to(device) if name else None
    if magnitude is not None and magnitude.numel() != shape[0]:
        raise AdapterError(
            f"{adapter.folder}: {name} has {magnitude.numel()} values, expected {shape[0]}"
        )
    return LoadedPart(a, b, part.scaling, magnitude, transposed, str(adapter.folder))


def needs_whole_weight(info: TensorInfo, parts: list[LoadedPart]) -> bool:
    """Returns whether a weight must be merged in one piece rather than in blocks of rows.

    This is the case in fp32, because the matrix product of a block may round differently from
    PEFT's, and for DoRA on a transposed weight, which needs the norm of whole columns.
    """
    half = info.dtype in (torch.float16, torch.bfloat16)
    return not half or any(part.transposed and part.magnitude is not None for part in parts)


def merge_rows(rows: Tensor, parts: list[LoadedPart], start: int, stop: int | None) -> Tensor:
    """Merges adapters one after another into rows of a weight.

    Args:
        rows: Rows `start:stop` of the base weight, of any floating-point dtype.
        parts: Matrices of each adapter, on the device of `rows`.
        start: Index of the first row.
        stop: Index after the last row; None for the end.

    Returns:
        The merged rows in the dtype of `rows`, rounded once.

    Raises:
        AdapterError: If the result overflows the dtype.
    """
    half = rows.dtype in (torch.float16, torch.bfloat16)
    merged = rows.float() if half else rows.clone()
    keeps_base = len(parts) > 1 and any(part.magnitude is not None for part in parts)
    original = merged.clone() if keeps_base else merged
    for part in parts:
        if part.magnitude is not None:
            merged = _dora(part, original, merged, part.delta(start, stop), start, stop)
        elif half:
            merged = part.add_to(merged, start, stop)
        else:  # same operations as PEFT; a fused add rounds differently
            merged = merged.add_(part.delta(start, stop))
    if not is_finite(merged, rows.dtype):
        raise AdapterError(
            f"{', '.join(part.source for part in parts)}: merging gives values that {rows.dtype} "
            "cannot hold; the adapter is damaged, or the base model needs a wider type"
        )
    return merged.to(rows.dtype)


def _dora(
    part: LoadedPart,
    original: Tensor,
    merged: Tensor,
    delta: Tensor,
    start: int,
    stop: int | None,
) -> Tensor:
    assert part.magnitude is not None
    outputs_last = part.transposed
    adapted = original.T + delta.T if outputs_last else original + delta
    norm = torch.linalg.norm(adapted, dim=1)
    magnitude = part.magnitude if outputs_last else part.magnitude[start:stop]
    factor = (magnitude / norm).view(-1, 1)
    return (factor.T if outputs_last else factor) * (merged + delta)


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether all values are finite and within the range of a dtype, in one pass."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    limit = torch.finfo(dtype).max
    return bool(low >= -limit) and bool(high <= limit)


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Looks up a module as PEFT's `get_pattern_key` does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"adapter {folder}: expected a folder with {CONFIG_NAME} and adapter_model.safetensors"
        )
    try:
        config = json.loads(file.read_bytes())
        kind = str(config["peft_type"]).upper()
        numbers = config["r"], config["lora_alpha"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"{file}: no adapter config: {error!r}") from error
    if kind != "LORA":
        raise AdapterError(f"{file}: peft_type {kind}; only LoRA can be merged")
    if not all(map(_is_number, numbers)):
        raise AdapterError(f"{file}: r and lora_alpha are {numbers}; expected numbers")
    for setting in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(setting), f"{file}: {setting}")
    return config


def _check_pattern(pattern: Any, what: str) -> None:
    if pattern is not None and not isinstance(pattern, dict):
        raise AdapterError(f"{what} is {pattern!r:.80}; expected names of modules with numbers")
    for key, value in (pattern or {}).items():
        if not _is_number(value):
            raise AdapterError(f"{what}: {key!r} is {value!r:.80}; expected a number")
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(f"{what}: {key!r} is not a regular expression: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
