"""Weights of the slide encoder: found on the hub or on disk, and loaded only if every one fits."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

HUB_PREFIX = "hf_hub:"
FILE_NAMES = ("slide_encoder.pth", "slide_encoder.safetensors")
"""The released file's name, and the same without pickle."""

_SHOWN = 6


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


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a file of weights: tensors only, code in it is refused.

    Args:
        path: A checkpoint with the weights under `model`, as released, or bare; or safetensors.

    Raises:
        ValueError: It is damaged, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = _torch_load(path)
    except (
        SafetensorError,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{path}: cannot be read as weights: {error}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected tensors by name, bare or under 'model'")
    return dict(state)


def _torch_load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Written before torch 1.6: such files cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def describe_mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Says what is missing, unknown or of another shape; empty when all fits."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    parts = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for what, names in parts
        if names
    ]


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    hint: Callable[[Mapping[str, Tensor]], str] = lambda state: "",
) -> None:
    """Puts the weights of a file into a model whose parameters may still be on `meta`.

    Args:
        model: Takes copies, in float32, as its parameters.
        path: The file.
        hint: Says something about tensors that do not fit, for the message.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or not finite.
    """
    state = read_weights(path)
    problems = describe_mismatch(state, model.state_dict())
    if problems:
        raise ValueError(f"{path}: does not fit this model: {'; '.join(problems)}.{hint(state)}")
    copies = {}
    for name, tensor in state.items():
        copies[name] = tensor.to(torch.float32, copy=True)
        if not bool(torch.isfinite(copies[name]).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite")
    model.load_state_dict(copies, assign=True)
