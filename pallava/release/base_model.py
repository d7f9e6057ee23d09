"""Base model of a merge: its stored tensors, and what its transformers class reveals about them.

`config.json` alone does not determine how a model is built: Gemma, OPT and GPT-2 tie the output
layer to the embeddings without stating so, and GPT-2 stores some matrices transposed. The class is
therefore instantiated on the meta device, which takes a fraction of a second for any size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pallava.release.weights import TensorInfo, WeightFolder
from pathcore.files import StrPath
from pathcore.weights import CheckpointError

_SHOWN = 10


class BaseModel:
    """A Hugging Face folder of a causal language model.

    Args:
        folder: Folder with `config.json` and weights.

    Attributes:
        config: Content of `config.json`.
        model: Model on the meta device; None for quantised weights and for architectures that
            transformers does not know.
        unexpected_names: Stored tensors that the class does not use.
        is_tied: Whether the output layer shares the weight of the input embeddings.
        input_embeddings: Name of the input embeddings' weight; None if unknown.
        output_embeddings: Name of the output layer's weight; None if unknown.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no weights.
        CheckpointError: If the weights are damaged or do not match the config's class.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.weights = WeightFolder(self.folder)
        self.is_quantised = bool(self.config.get("quantization_config"))
        self.model: Any = None
        self.unexpected_names: set[str] = set()
        if not self.is_quantised and self.config.get("model_type") in CONFIG_MAPPING:
            self.model, report = load_on_meta(self.weights)
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
        self._known = set(self.model.state_dict()) if self.model is not None else set()
        self._stored_names = self._map_names()

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def shards(self) -> list[list[str]]:
        """Returns the names of the tensors, grouped by file."""
        names = {stored: name for name, stored in self._stored_names.items()}
        return [
            [names[stored] for stored in file.tensors if stored in names]
            for file in self.weights.files
        ]

    def ignores(self, name: str) -> bool:
        """Returns whether transformers neither loads nor reports a tensor, as old buffers."""
        return self.model is not None and name not in self._known | self.unexpected_names

    def info(self, name: str) -> TensorInfo:
        """Returns dtype and shape of a tensor."""
        info = self.weights.info(self._stored_names[name])
        return TensorInfo(name, info.dtype, info.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads a copy of the rows `start:stop` of a tensor."""
        return self.weights.read(self._stored_names[name], start, stop)

    def stores_transposed(self, name: str) -> bool | None:
        """Returns whether a weight is stored as (inputs, outputs); None if its class is unknown."""
        if self.model is None:
            return None
        try:
            module = self.model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None
        return isinstance(module, Conv1D)

    def _map_names(self) -> dict[str, str]:
        """Maps names in the class to names in the files; tied embeddings appear once.

        Files of a headless model, such as GPT-2's own, lack the prefix `transformer.`.
        """
        prefix = getattr(self.model, "base_model_prefix", "")
        known = self._known
        names = {}
        for stored in self.weights:
            prefixed = f"{prefix}.{stored}"
            names[prefixed if stored not in known and prefixed in known else stored] = stored
        if self.is_tied and self.output_embeddings is not None:
            # transformers ties weights after loading, so a stored output layer is not used.
            output = names.pop(self.output_embeddings, None)
            if output is not None and self.input_embeddings not in names:
                names[str(self.input_embeddings)] = output  # the only stored copy
        return names


def load_on_meta(weights: WeightFolder, model_class: Any = None) -> tuple[Any, dict[str, Any]]:
    """Loads a folder as transformers does, from the names and shapes of its tensors alone.

    `from_pretrained` of a path would read every weight, even for the meta device.

    Args:
        weights: Weights in a folder with `config.json`.
        model_class: Class of transformers; by default that of the causal language model.

    Returns:
        The model on the meta device, and the loading info of transformers.

    Raises:
        CheckpointError: If transformers cannot load the folder.
    """
    folder = weights.folder
    infos = [weights.info(name) for name in weights]
    tensors = {i.name: torch.empty(i.shape, dtype=i.dtype, device="meta") for i in infos}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # replaced by our own, clearer errors
    try:
        if model_class is None:
            config = AutoConfig.from_pretrained(str(folder.absolute()), trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model_class = type(model)
        else:
            config = model_class.config_class.from_pretrained(str(folder.absolute()))
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # all mismatches are reported together below
        )
    except Exception as error:  # an unsuitable config can raise any exception
        raise CheckpointError(
            f"{folder}: transformers cannot load this model: {error or type(error).__name__}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Rejects a folder for which transformers would initialise tensors at random.

    Raises:
        CheckpointError: If tensors are missing or have another shape.
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
        FileNotFoundError: If there is no `config.json`.
        CheckpointError: If it is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model {folder}: expected a folder with config.json and weights")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return config
