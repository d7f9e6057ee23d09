"""A folder in which the tiny configs run: golden models, and images of two colours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.warm_python import run_module

REPOSITORY = Path(__file__).resolve().parents[3]
GOLDEN = REPOSITORY / "tests" / "golden" / "pallava"
CONFIGS = REPOSITORY / "configs" / "pallava"
STAGE1 = CONFIGS / "pallava_domain_alignment_tiny.py"
STAGE2 = CONFIGS / "pallava_instruction_tuning_tiny.py"
SIZES_PX = [(64, 64), (96, 40), (40, 120), (64, 32)]


def save_encoder(folder: Path) -> None:
    """Writes the golden vision encoder as the folder that configs name."""
    from transformers import CLIPVisionConfig

    from pallava.modeling.folders import save_vision_encoder
    from pallava.modeling.plip import PLIPVisionEncoder, published_names
    from pathcore.weights import load_strict, read_state_dict

    config = json.loads((GOLDEN / "visual_encoder/img32_config.json").read_text())
    encoder = PLIPVisionEncoder(CLIPVisionConfig(**config))
    weights = read_state_dict(GOLDEN / "visual_encoder/img32_weights.safetensors")
    load_strict(encoder, published_names(weights), what="encoder")
    save_vision_encoder(encoder, folder)


def save_image(path: Path, index: int) -> str:
    """Writes a red or a blue image; returns which."""
    width_px, height_px = SIZES_PX[index % len(SIZES_PX)]
    pixels = np.random.default_rng(index).integers(0, 60, (height_px, width_px, 3), dtype=np.uint8)
    channel, name = (0, "red") if index % 2 else (2, "blue")
    pixels[..., channel] += 180
    Image.fromarray(pixels).save(path)
    return name


def question(index: object, image: str | None, answer: str) -> dict[str, object]:
    """One row of conversations.jsonl."""
    mark = "<image>\n" if image else ""
    row: dict[str, object] = {
        "id": index,
        "conversations": [
            {"from": "human", "value": f"{mark}Is it red?"},
            {"from": "gpt", "value": answer},
        ],
    }
    return row | ({"image": image} if image else {})


def make_folder(root: Path, num_images: int = 40) -> Path:
    """Fills `root/data/tiny` with what the tiny configs expect, one missing image included."""
    data = root / "data" / "tiny"
    (data / "images").mkdir(parents=True)
    shutil.copytree(GOLDEN / "model/tiny_llama", data / "llama")
    save_encoder(data / "plip")
    rows = []
    for index in range(num_images):
        colour = save_image(data / "images" / f"{index}.png", index)
        rows.append(question(index, f"{index}.png", "yes" if colour == "red" else "no"))
    rows.append(question("text", None, "I cannot see an image."))
    rows.append(question("absent", "absent.png", "no"))
    (data / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(
    root: Path,
    *arguments: object,
    processes: int = 1,
    program: str = "xtuner-add",
    timeout: int = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the environment in `root`; returns exit code and output.

    `xtuner-add` is forked off a Python that has imported XTuner before; `xtuner` is not.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes)}
    if program == "xtuner-add":
        words = list(map(str, arguments))
        return run_module("xtuner_add.cli", words, cwd=root, environ=environment, timeout_s=timeout)
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )


def losses(output: str) -> list[float]:
    """The losses that a run logged."""
    return [float(value) for value in re.findall(r"Iter\(train\).*? loss: ([\d.]+)", output)]
