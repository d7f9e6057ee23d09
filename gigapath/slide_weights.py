"""Weights of the slide encoder: found on the hub or on disk, and loaded only if every one fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pathcore.weights import check_finite, check_names, read_state_dict

HUB_PREFIX = "hf_hub:"
FILE_NAMES = ("slide_encoder.pth", "slide_encoder.safetensors")
"""The released file's name, and the same without pickle."""


def find_weights(pretrained: str | os.PathLike[str], cache_dir: str | None = None) -> Path:
    """Finds the weights, downloading them from the hub when they are not in its cache.

    Args:
        pretrained: `hf_hub:owner/name`, optionally with `@revision`; a file; or a folder that
            holds `slide_encoder.pth` or `slide_encoder.safetensors`.
        cache_dir: The hub's cache; by default the usual one (`HF_HOME`, `HF_HUB_CACHE`).

    Raises:
        FileNotFoundError: There are none, or the hub did not give them.
    """
    name = os.fspath(pretrained)
    if name.startswith(HUB_PREFIX):
        return _download(name[len(HUB_PREFIX) :], cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        for file_name in FILE_NAMES:
            if (path / file_name).is_file():
                return path / file_name
        raise FileNotFoundError(f"{path}: holds neither {' nor '.join(FILE_NAMES)}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected slide encoder weights, a folder with them, or "
            f"{HUB_PREFIX}owner/name. For random weights ask for '' "
        )
    return path


def _download(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        path = hf_hub_download(
            repository, FILE_NAMES[0], revision=revision or None, cache_dir=cache_dir
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{HUB_PREFIX}{name}: {FILE_NAMES[0]} is neither in the local cache nor could it be "
            f"downloaded ({type(error).__name__}: {error}). Accept the terms at "
            f"https://huggingface.co/{repository} and set HF_TOKEN, or give the path of a "
            "downloaded file"
        ) from error
    return Path(path)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    hint: Callable[[Mapping[str, Tensor]], str] | None = None,
) -> None:
    """Loads a file of weights into a model whose parameters may still be on the meta device.

    Args:
        model: Takes copies, in float32, as its parameters.
        path: The file.
        hint: Returns a sentence about tensors that do not fit, for the error.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, of another shape or not finite.
    """
    state = read_state_dict(path, mmap=True)
    check_names(model.state_dict(), state, what="slide encoder", source=path, hint=hint)
    check_finite(state, path)
    # Copies, since the file may change while the model lives.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
