"""Vision encoders for PA-LLaVA by a name of `pathcore.encoders`, such as `virchow2@FILE`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pallava.modeling.folders import save_module
from pallava.registry import ENCODERS
from pathcore.encoders import Transform, find_transform, open_image_tower
from pathcore.encoders.patch_tokens import PatchTokens
from pathcore.encoders.towers import EncoderError, Tower, open_tower
from pathcore.files import StrPath, read_json, sha256_of
from pathcore.weights import read_state_dict

MODEL_TYPE = "pallava_named_encoder"
PREFIX = "encoder:"
"""Before a name in places that also take a folder: `encoder:virchow2@FILE`."""


class NamedVisionEncoder(nn.Module):
    """Vision encoder that returns the patch tokens of any named vision transformer.

    In a config: `visual_encoder=dict(type="NamedVisionEncoder", encoder="virchow2@FILE")`, with
    `image_processor=dict(type="EncoderImageProcessor", encoder="virchow2@FILE")`.

    Args:
        encoder: Name of the encoder, see `pathcore.encoders`.
        arguments: Arguments of the architecture that override those of the preset.

    Raises:
        EncoderError: If the encoder is unknown, has no patch tokens, or its images are not square.
        FileNotFoundError: If weights are missing.
        CheckpointError: If the weights do not fit.
    """

    def __init__(self, encoder: str, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        name = encoder.removeprefix(PREFIX)
        tower = open_image_tower(name, **(arguments or {}))
        self._set_up(tower, find_transform(name), name.partition("@")[0])

    def _set_up(self, tower: Tower, transform: Transform, name: str) -> None:
        if transform.output_px is None:
            raise EncoderError(f"encoder {name}: its transform does not give square images")
        self.name, self.transform = name, transform
        self.model = tower.module
        self.description = dict(tower.description)
        self.files = tower.files
        tokens = PatchTokens(tower)
        self.config = SimpleNamespace(
            hidden_size=tokens.hidden_size,
            num_attention_heads=tokens.num_heads,
            num_hidden_layers=tokens.num_layers,
            image_size=transform.output_px,
            patch_size=tokens.patch_px,
        )

    @property
    def num_patches(self) -> int:
        """Number of visual tokens per image."""
        return (self.config.image_size // self.config.patch_size) ** 2

    def features(self, pixel_values: Tensor, select_layer: int = -2) -> Tensor:
        """Returns the patch features of one layer.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`, normalised.
            select_layer: Index into the `num_hidden_layers + 1` hidden states.

        Returns:
            `(B, P, D)`, without class and register tokens.

        Raises:
            ValueError: If the layer does not exist, or the images have another size.
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values: expected (batch, 3, {size}, {size}), as {self.name} takes them, "
                f"found {tuple(pixel_values.shape)}"
            )
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        read = PatchTokens(Tower(self.model, self.model, 0, "", self.description))
        with torch.no_grad() if frozen else nullcontext():
            return read(pixel_values, select_layer)

    def save(self, folder: StrPath) -> None:
        """Writes `config.json` and `model.safetensors` for `load_named_encoder`.

        Raises:
            ValueError: If only the code of its authors can build the network.
        """
        if not self.description:
            raise ValueError(f"encoder {self.name}: built by code of its authors, cannot be saved")
        config = {
            "model_type": MODEL_TYPE,
            "name": self.name,
            "description": self.description,
            "transform": self.transform.to_dict(),
        }
        save_module(self.model, config, folder)


def load_named_encoder(folder: StrPath) -> NamedVisionEncoder:
    """Loads an encoder that `NamedVisionEncoder.save` wrote.

    Raises:
        FileNotFoundError: If the folder has no `config.json`.
        CheckpointError: If the weights do not fit.
    """
    config = read_json(Path(folder) / "config.json", what="vision encoder")
    tower = open_tower(
        config["description"], read_state_dict(folder), name=config["name"], source=folder
    )
    encoder = NamedVisionEncoder.__new__(NamedVisionEncoder)
    nn.Module.__init__(encoder)
    encoder._set_up(tower, Transform.from_dict(config["transform"]), config["name"])
    return encoder


def is_named_encoder(folder: Path) -> bool:
    """Returns whether `NamedVisionEncoder.save` wrote a folder."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_bytes()).get("model_type") == MODEL_TYPE


def image_processor(encoder: str) -> Any:
    """Returns a processor with the image size and statistics of an encoder."""
    from transformers import CLIPImageProcessor

    transform = find_transform(encoder.removeprefix(PREFIX))
    size = transform.output_px
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
    )


def identity(encoder: NamedVisionEncoder) -> str:
    """Returns name and digests of the weights of an encoder that was opened by name."""
    return json.dumps([encoder.name, *map(sha256_of, encoder.files)])


ENCODERS.register("encoder")(NamedVisionEncoder)
