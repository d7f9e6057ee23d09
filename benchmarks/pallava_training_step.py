"""Compares PA-LLaVA's training step with XTuner's own LLaVA, and with stored features.

    OMP_NUM_THREADS=1 python -m benchmarks.pallava_training_step

All cases have the same language model, the same LoRA, texts and images: a Llama of 8 layers, 768
wide, LoRA with r=128, ViT-B/16, batches of four. A step reads the images, and runs forward,
backward and AdamW. The cases run in turn in one process, and memory is measured in a process of its
own for each. XTuner's LLaVA reads the thumbnail alone, through its projector of two layers.

The cases of the "vision-bound recipe" have a ViT-L/14, four sub-images, a connector of two layers
and a language model of two layers, 256 wide, with batches of one.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from benchmarks._flops import count_gflop
from benchmarks._memory import peak_resident_mib
from benchmarks._ratios import Ratio

BASELINES = {
    "ours, thumbnail": "XTuner, thumbnail",
    "ours, six sub-images": "XTuner, thumbnail",
    "ours, six sub-images, stored": "XTuner, thumbnail",
    "vision-bound, stored": "vision-bound",
}
"""What each case is compared with."""

CASES = ("XTuner, thumbnail", *(name for name in BASELINES if name.startswith("ours")),
         "vision-bound", "vision-bound, stored")  # fmt: skip

_IMAGE_PX = {6: (640, 480), 4: (512, 512)}
"""Image sizes by number of sub-images of 224 px."""
_TEXT_TOKENS = 64
_LEARNED = 32


class Sizes:
    """Sizes of the models of a case.

    Args:
        quick: Whether to use tiny sizes.
        vision_bound: Whether the vision encoder is the larger part.
        batch: Number of samples if it is not.
    """

    def __init__(self, quick: bool, vision_bound: bool, batch: int = 4) -> None:
        self.batch = 1 if vision_bound else batch
        self.sub_images = 4 if vision_bound else 6
        self.connector_layers = 2 if vision_bound else 6
        width, layers, patch_px = (1024, 24, 14) if vision_bound else (768, 12, 16)
        llm_width, llm_layers, self.rank = (256, 2, 128) if vision_bound else (768, 8, 128)
        image_px = 224
        if quick:
            width, layers, patch_px, image_px = 32, 3, 16, 32
            llm_width, llm_layers, self.rank = 32, 2, 4
        self.vision: dict[str, Any] = {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": max(2, width // 64), "image_size": image_px,
            "patch_size": patch_px,
        }  # fmt: skip
        self.llm: dict[str, Any] = {
            "vocab_size": 300 if quick else 32000, "hidden_size": llm_width,
            "intermediate_size": llm_width * 8 // 3, "num_hidden_layers": llm_layers,
            "num_attention_heads": max(2, llm_width // 64),
        }  # fmt: skip


class Case:
    """One model with its data and optimizer.

    Args:
        name: One of `CASES`.
        quick: Whether to use tiny sizes.
        folder: Folder for images and features.
        batch: Number of samples.
    """

    def __init__(self, name: str, quick: bool, folder: Path, batch: int = 4) -> None:
        from pallava.anyres import AnyRes
        from pallava.engine.runtime import prepare_host

        prepare_host()
        self.name = name
        self.sizes = Sizes(quick, name.startswith("vision"), batch)
        self.files = _write_images(folder, self.sizes, quick)
        self.xtuner = name.startswith("XTuner")
        thumbnail = name.endswith("thumbnail")
        self.anyres = AnyRes(self.sizes.vision["image_size"], sub_images=not thumbnail)
        self.cache = None
        if name.endswith("stored"):
            from pallava.feature_cache import FeatureCache

            self.cache = FeatureCache(folder / name.replace(" ", "_"), self.anyres)
        torch.manual_seed(0)
        self.model = self._xtuner() if self.xtuner else self._ours(thumbnail)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.randint(5, self.sizes.llm["vocab_size"], (self.sizes.batch, _TEXT_TOKENS))
        ids[:, 4] = -200
        self.ids, self.labels = ids, ids.clone()
        self.labels[:, :-_LEARNED] = -100
        self.num_steps = 0

    def step(self) -> float:
        """Reads the images and trains for a step; returns the loss."""
        self.num_steps += 1
        torch.manual_seed(self.num_steps)  # dropout is the same with and without stored features
        data: dict[str, Any] = {"input_ids": self.ids.clone(), "labels": self.labels.clone()}
        data["attention_mask"] = torch.ones_like(self.ids, dtype=torch.bool)
        images = [self._read(file) for file in self.files]
        data["pixel_values"] = torch.cat(images) if self.xtuner else images
        loss = self.model(data)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _read(self, file: Path) -> Any:
        from pallava.feature_cache import CachedImage
        from pathcore.images import load_image

        if self.cache is None:
            return self.anyres(load_image(file))
        features = self.cache.file_of(file)
        stored = self.cache.read(features)
        return stored or CachedImage(self.anyres(load_image(file)), str(features))

    def _llm(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**self.sizes.llm))

    def _lora(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.sizes.rank, lora_alpha=256, lora_dropout=0.05, task_type="CAUSAL_LM"
        )

    def _xtuner(self) -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModel
        from xtuner.model import LLaVAModel

        encoder = CLIPVisionModel(CLIPVisionConfig(**self.sizes.vision))
        return LLaVAModel(
            self._llm(), encoder, freeze_llm=True, freeze_visual_encoder=True, llm_lora=self._lora()
        )

    def _ours(self, thumbnail: bool) -> Any:
        from transformers import CLIPVisionConfig

        from pallava.model import LLaVAModel
        from pallava.modeling.plip import PLIPVisionEncoder

        return LLaVAModel(
            self._llm(),
            PLIPVisionEncoder(CLIPVisionConfig(**self.sizes.vision)),
            freeze_llm=True,
            freeze_visual_encoder=True,
            llm_lora=self._lora(),
            cross_attention=not thumbnail,
            num_hidden_layers=self.sizes.connector_layers,
        )


def _write_images(folder: Path, sizes: Sizes, quick: bool) -> list[Path]:
    from pallava.anyres import AnyRes

    size = _IMAGE_PX[sizes.sub_images]
    if quick:
        size = tuple(side * sizes.vision["image_size"] // 224 for side in size)
    if (found := AnyRes(sizes.vision["image_size"]).num_sub_images(*size)) != sizes.sub_images:
        raise RuntimeError(f"images of {size} px have {found} sub-images")
    files = []
    for number in range(sizes.batch):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        files.append(folder / f"{sizes.sub_images}_{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def measure_times(cases: list[Case], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns wall and processor time and loss of each step; the cases run in turn."""
    taken: dict[str, dict[str, list[float]]] = {
        case.name: {"wall_s": [], "cpu_s": [], "loss": []} for case in cases
    }
    for turn in range(rounds + 1):
        for case in cases:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = case.step()
            step = (time.perf_counter() - wall, time.process_time() - cpu, loss)
            click.echo(f"  {turn}/{rounds} {case.name}: {step[1]:.2f} s CPU", err=True)
            if turn:  # the first step also stores features and allocates AdamW's state
                for key, value in zip(("wall_s", "cpu_s", "loss"), step, strict=True):
                    taken[case.name][key].append(value)
    return taken


def peak_mib(name: str, quick: bool, batch: int) -> float:
    """Measures peak memory of two steps in a fresh process, frozen and trained weights apart."""
    module = "benchmarks.pallava_training_step"
    command = [sys.executable, "-m", module, "--only-memory", name, "--batch", str(batch)]
    command += ["--quick"] * quick
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def _ratio(taken: dict[str, dict[str, list[float]]], name: str) -> Ratio | None:
    baseline = taken.get(BASELINES.get(name, ""))
    return Ratio.of(baseline["cpu_s"], taken[name]["cpu_s"]) if baseline else None


def table(
    taken: dict[str, dict[str, list[float]]],
    memory: dict[str, float],
    operations: dict[str, float],
) -> str:
    """Formats medians and ranges, each case with its baseline."""
    rows = []
    for name, values in taken.items():
        cpu = statistics.median(values["cpu_s"])
        rows.append(
            [
                name,
                f"{cpu:.2f}",
                f"{min(values['cpu_s']):.2f}-{max(values['cpu_s']):.2f}",
                f"{statistics.median(values['wall_s']):.2f}",
                str(_ratio(taken, name) or ""),
                f"{operations[name]:,.0f}",
                f"{memory[name]:,.0f}" if name in memory else "",
                f"{values['loss'][-1]:.2f}",
            ]
        )
    headers = ["step of", "CPU s", "range", "wall s", "speed-up", "GFLOP", "peak MiB", "loss"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1))
@click.option("--case", "names", multiple=True, type=click.Choice(CASES), default=CASES)
@click.option("--memory/--no-memory", default=True, help="Whether to measure peak memory too.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
@click.option("--only-memory", hidden=True, help="Measure one case's memory; used by itself.")
def main(
    quick: bool,
    rounds: int,
    batch: int,
    names: tuple[str, ...],
    memory: bool,
    json_path: Path | None,
    only_memory: str | None,
) -> None:
    """Measure a training step of PA-LLaVA against XTuner's LLaVA."""
    with tempfile.TemporaryDirectory() as folder:
        make: Callable[[str], Case] = lambda name: Case(name, quick, Path(folder), batch)  # noqa: E731
        if only_memory:
            case = make(only_memory)
            gc.collect()
            with peak_resident_mib() as peak:
                case.step()
                case.step()  # now AdamW's state exists, and features are stored
            click.echo(peak[0])
            return
        cases = [make(name) for name in names]
        taken = measure_times(cases, rounds)
        operations = {case.name: count_gflop(case.step) for case in cases}
    peaks = {name: peak_mib(name, quick, batch) for name in names} if memory else {}
    click.echo(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} "
        f"cores, fp32, batch {batch}, {rounds} rounds"
    )
    click.echo(table(taken, peaks, operations))
    if json_path:
        rows = [
            {
                "name": name,
                "ratio": ratio.median if (ratio := _ratio(taken, name)) else None,
                "gflop": operations[name],
                "peak_mib": peaks.get(name),
                **values,
            }
            for name, values in taken.items()
        ]
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
