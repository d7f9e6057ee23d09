"""Quantises the language model of an exported folder to 8 or 4 bits."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from pallava.folder_build import MANIFEST_NAME, FolderBuild
from pallava.release.base_model import read_config
from pallava.release.merge import copy_files, folder_identity, write_config
from pathcore.device_claims import choose_device
from pathcore.files import StrPath
from pathcore.weights import CheckpointError, check_loading_report

Bits = Literal[8, 4]

_KEPT_WHOLE = ["visual_encoder", "projector", "lm_head"]
"""Modules that keep their dtype; so do embeddings and norms."""

_METHOD = {8: "LLM.int8()", 4: "NF4 with double quantisation"}


def quantise(
    model: StrPath, out: StrPath, *, bits: Bits, device: str | None = None
) -> dict[str, str]:
    """Writes an exported model again with the linear layers of its language model quantised.

    The result is in the form in which transformers stores models quantised by bitsandbytes, and is
    loaded by everything that loads the exported folder.

    Args:
        model: Folder written by `xtuner-add export`.
        out: Output folder.
        bits: 8 for LLM.int8(), 4 for NF4 with double quantisation.
        device: `cpu` or `cuda`. Defaults to a GPU if there is one.

    Returns:
        SHA-256 digest by file name.

    Raises:
        CheckpointError: If the folder is no exported model, or is quantised already.
        ImportError: If bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    from pallava.modeling.hf import PALLaVAForConditionalGeneration

    folder = Path(model)
    config = read_config(folder)
    if config.get("model_type") != "pallava":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {config.get('model_type')!r}, expected a folder "
            "that `xtuner-add export` wrote"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder}: is quantised already; quantise the exported model")
    inputs = {"operation": "quantise", "bits": bits, "model": folder_identity(folder)}
    with FolderBuild(out, inputs) as build:
        if not build.complete:
            loaded, report = PALLaVAForConditionalGeneration.from_pretrained(
                str(folder),
                quantization_config=BitsAndBytesConfig(
                    load_in_8bit=bits == 8,
                    load_in_4bit=bits == 4,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                    llm_int8_skip_modules=_KEPT_WHOLE,
                ),
                device_map={"": str(choose_device(device))},
                dtype="auto",
                output_loading_info=True,
            )
            check_loading_report(report, loaded, what="exported model", source=folder)
            _write(loaded, build)
            others = [
                path.name
                for path in sorted(folder.iterdir())
                if not path.name.startswith(("model.safetensors", "model-"))
                and path.name not in ("config.json", "README.md", MANIFEST_NAME)
            ]
            copy_files(folder, build, others)
            with build.file("README.md") as partial:
                partial.write_text(_card(folder, bits), encoding="utf-8")
            settings = loaded.config.quantization_config.to_dict()
            write_config(build, config | {"quantization_config": settings})
        return build.finish()


def _write(loaded: Any, build: FolderBuild) -> None:
    with tempfile.TemporaryDirectory(dir=build.folder) as temporary:
        loaded.save_pretrained(temporary)
        for file in sorted(Path(temporary).glob("model*")):
            with build.file(file.name) as partial:
                shutil.move(file, partial)


def _card(folder: Path, bits: int) -> str:
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return (
        f"{text.rstrip()}\n\n## Quantised\n\nThe linear layers of the language model have {bits} "
        f"bits ({_METHOD[bits]}, bitsandbytes); encoder, connector, embeddings and output layer "
        "have not. Scores above are those of the model before.\n"
    )
