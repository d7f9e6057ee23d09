"""The base model of a merge: its stored tensors, and what transformers' class says about them.

`config.json` alone does not tell how a model is built: Gemma, OPT and GPT-2 tie their output layer
to their embeddings without writing so, and GPT-2 stores some of its matrices transposed. The class
is therefore built on the meta device, which takes a fraction of a second for any size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pallava.release.weights import TensorInfo, WeightFolder
from pathcore.weights import CheckpointError

_SHOWN = 10


class BaseModel:
    """A Hugging Face folder of a causal language model.

    Args:
        folder: `config.json` and weights.

    Attributes:
        config: What `config.json` says.
        model: transformers' model on the meta device; None for an architecture that transformers
            does not know, and for quantised weights.
        unexpected_names: Stored tensors that the class has no use for.
        is_tied: Whether the output layer is the input embeddings.
        input_embeddings: Name of the input embeddings' weight; None if unknown.
        output_embeddings: Name of the output layer's weight; None if unknown.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no weights.
        CheckpointError: If the weights are damaged or are not those of the config's class.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.weights = WeightFolder(self.folder)
        self.is_quantised = bool(self.config.get("quantization_config"))
        self.model: Any = None
        self.unexpected_names: set[str] = set()
        if not self.is_quantised and self.config.get("model_type") in CONFIG_MAPPING:
            self.model, report = load_on_meta(self.folder)
            check_report(report, self.folder)
            self.unexpected_names = set(report["unexpected_keys"])
        self.is_tied = False
        self.input_embeddings: str | None = None
        self.output_embeddings: str | None = None
        if self.model is not None:
            layers = self.model.get_input_embeddings(), self.model.get_output_embeddings()
            self.is_tied = layers[1] is not None and layers[0].weight is layers[1].weight
            names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
            self.input_embeddings = names.get(layers[0])
            self.output_embeddings = names.get(layers[1]) if layers[1] is not None else None
        self._stored_names = self._map_names()

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def shards(self) -> list[list[str]]:
        """Returns the names of the tensors, file by file."""
        names = {stored: name for name, stored in self._stored_names.items()}
        return [
            [names[stored] for stored in file.tensors if stored in names]
            for file in self.weights.files
        ]

    def info(self, name: str) -> TensorInfo:
        """Returns a tensor's type and shape."""
        info = self.weights.info(self._stored_names[name])
        return TensorInfo(name, info.dtype, info.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads the rows `start:stop` of a tensor into memory of their own."""
        return self.weights.read(self._stored_names[name], start, stop)

    def stores_transposed(self, name: str) -> bool | None:
        """Whether a weight is stored as (inputs, outputs); None if the class does not know it."""
        if self.model is None:
            return None
        try:
            module = self.model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None
        return isinstance(module, Conv1D)

    def _map_names(self) -> dict[str, str]:
        """Name in the class -> name in the files, without the second copy of tied embeddings.

        Files of a model without its head, as GPT-2's own, lack the prefix `transformer.`.
        """
        prefix = getattr(self.model, "base_model_prefix", "")
        known = set(self.model.state_dict()) if self.model is not None else set()
        names = {}
        for stored in self.weights:
            prefixed = f"{prefix}.{stored}"
            names[prefixed if stored not in known and prefixed in known else stored] = stored
        if self.is_tied and self.output_embeddings is not None:
            # transformers ties after loading: whatever is stored here is not what the model uses.
            output = names.pop(self.output_embeddings, None)
            if output is not None and self.input_embeddings not in names:
                names[str(self.input_embeddings)] = output  # the only copy under the other name
        return names


def load_on_meta(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Loads a folder as transformers would, without reading the values of its tensors.

    Returns:
        The model on the meta device, and transformers' loading info.

    Raises:
        CheckpointError: If transformers cannot load it.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # our error says it better than its warning
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder.absolute()),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported and refused below, all at once
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises a dozen types for a config that does not fit
        raise CheckpointError(
            f"{folder}: transformers cannot load this model: {error or type(error).__name__}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Refuses a folder from which transformers would draw tensors at random.

    Raises:
        CheckpointError: If tensors are missing or of another shape.
    """
    missing = sorted(report["missing_keys"])
    misshapen = [
        entry if isinstance(entry, str) else f"{entry[0]}: {tuple(entry[1])}, not {tuple(entry[2])}"
        for entry in report["mismatched_keys"]
    ]
    if missing or misshapen:
        found = [f"lack {', '.join(missing[:_SHOWN])}"] if missing else []
        found += [f"hold other shapes: {'; '.join(misshapen[:_SHOWN])}"] if misshapen else []
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: they {' and '.join(found)} "
            f"({len(missing)} missing, {len(misshapen)} of another shape)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a model folder.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model {folder}: a folder with config.json and weights expected")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: a JSON object expected")
    return config
