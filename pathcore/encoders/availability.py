"""Checks whether an encoder can be built on this machine, without building it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from pathcore.encoders.presets import get_preset
from pathcore.extras import install_line

_IMPORTS = {"timm": "timm", "own": "timm", "transformers": "transformers", "open_clip": "open_clip"}
_CONFIGS = {"transformers": "config.json", "open_clip": "open_clip_config.json"}


@dataclass(frozen=True)
class Availability:
    """Result of checking a preset.

    Attributes:
        name: Name of the preset.
        ready: Whether `create_encoder(name)` would find library and weights on this machine.
        reason: Where the weights are, or what is missing and how to get it.
    """

    name: str
    ready: bool
    reason: str


def availability(name: str) -> Availability:
    """Checks whether library and weights of a preset are on this machine.

    Raises:
        UnknownEncoderError: If the preset is unknown.
    """
    preset = get_preset(name)
    module = preset.package or _IMPORTS[preset.library]
    extra = "pathgen" if module == "open_clip" else "gigapath"
    if importlib.util.find_spec(module) is None:
        return Availability(
            name, False, f"{module} is missing: {preset.install or install_line(module, extra)}"
        )
    if not preset.hub:
        return Availability(
            name, False, f"weights from {preset.source}: name them, {name}@/path/{preset.files[0]}"
        )
    try:
        from huggingface_hub import get_token, try_to_load_from_cache
    except ModuleNotFoundError:
        fetched = f"{install_line('huggingface_hub', extra)} fetches weights"
        return Availability(name, False, fetched)

    for file in preset.files or (_CONFIGS[preset.library],):
        if isinstance(try_to_load_from_cache(preset.hub, file), (str, os.PathLike)):
            ready = "weights in the hub's cache"
            if preset.remote_code:
                ready += "; runs code of its repository, pass trust_remote_code=True"
            return Availability(name, True, ready)
    if preset.gated and not get_token():
        return Availability(
            name,
            False,
            f"accept the terms at https://huggingface.co/{preset.hub}, then set HF_TOKEN",
        )
    return Availability(name, False, f"would be fetched from https://huggingface.co/{preset.hub}")
