"""Compares PA-LLaVA's frozen encoder and connector with a straightforward implementation.

    python -m benchmarks.pallava_encoder_connector

Both sides have the same weights and give the same output, which is checked first. A step is a
training step: forward, and backward as far as gradients are required. Times are medians over rounds
in which the cases run in turn in one process; memory and operations are measured in a separate
process per case.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor
from transformers import CLIPVisionConfig

from benchmarks._flops import count_gflop
from benchmarks._memory import peak_resident_mib
from benchmarks._ratios import Ratio
from benchmarks.straightforward import (
    StraightforwardConnector,
    StraightforwardEncoder,
    pad_sub_images,
    visible_sub_images,
)
from pallava.anyres import AnyRes
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector

IMAGE_SIZES_PX = ((1280, 720), (640, 480), (1000, 600), (512, 512), (600, 1200), (1024, 768))
"""A batch of usual sizes: 8, 6, 8, 4, 8 and 6 sub-images. Half of the samples get copies as
padding, which are 15 % of what is encoded."""

BASELINES = {
    "encoder, packed": "encoder, straightforward",
    "encoder, released mode": "encoder, straightforward",
    "connector, packed": "connector, straightforward",
    "connector, packed, recomputed": "connector, straightforward, recomputed",
    "connector, one by one": "connector, straightforward",
    "connector, padded and masked SDPA": "connector, straightforward",
    "both, packed, recomputed": "both, straightforward, recomputed",
}
"""What each case is compared with."""

_MIB = 2**20


@dataclass
class Result:
    """Measurements of one case.

    Attributes:
        name: The case.
        wall_s: Median wall time of a step.
        cpu_s: Median processor time of a step.
        gflop: Operations of matrix products and attention in a step.
        saved_mib: Memory that autograd keeps between forward and backward, without weights.
        peak_mib: Peak resident memory during a step minus that before it.
        ratio: How many times as fast as its baseline, in processor time.
        ratio_range: Least and largest of this over the rounds.
    """

    name: str
    wall_s: float
    cpu_s: float
    gflop: float
    saved_mib: float
    peak_mib: float
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None


class Bench:
    """The models, their inputs, and the cases by name.

    Args:
        quick: Whether to use tiny sizes.
    """

    def __init__(self, quick: bool) -> None:
        torch.manual_seed(0)
        if quick:
            vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
            vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
            llm_width, depth = 48, 2
        else:
            vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
            vision |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
            llm_width, depth = 4096, 6
        self.encoder = PLIPVisionEncoder(CLIPVisionConfig(**vision)).requires_grad_(False).train()
        self.connector = ScaleInvariantConnector(
            ConnectorConfig(
                visual_hidden_size=vision["hidden_size"],
                num_attention_heads=vision["num_attention_heads"],
                intermediate_size=vision["intermediate_size"],
                llm_hidden_size=llm_width,
                num_hidden_layers=depth,
            )
        ).train()
        anyres = AnyRes(tile_px=vision["image_size"])
        self.counts = [anyres.num_sub_images(*size) for size in IMAGE_SIZES_PX]
        side = vision["image_size"]
        self.stacks = [torch.randn(1 + count, 3, side, side) for count in self.counts]
        tokens, width = self.encoder.num_patches, vision["hidden_size"]
        self.thumbnails = torch.randn(len(self.counts), tokens, width)
        self.sub_images = torch.randn(sum(self.counts), tokens, width)
        self.cotangent = torch.randn(len(self.counts), tokens, llm_width)
        self.tiles = len(self.counts) + sum(self.counts)
        self.tiles_padded = len(self.counts) * (1 + max(self.counts))

    def check(self) -> float:
        """Returns the largest difference between both sides' outputs.

        Raises:
            RuntimeError: If the two sides disagree.
        """
        self.connector.eval()
        baseline = StraightforwardConnector(self.connector).eval()
        with torch.no_grad():
            encoded = StraightforwardEncoder(self.encoder).eval()(self.stacks)
            expected = baseline(*encoded)
            features = self._ours_encoded()
            found = self.connector(*features, self.counts)
        self.connector.train()
        difference = float((found - expected).abs().max())
        if not difference < 1e-3:
            raise RuntimeError(f"the two sides differ by {difference}")
        return difference

    def cases(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """Maps names to functions that build a case's modules and return its forward pass."""
        return {
            "encoder, straightforward": self._straightforward_encoder,
            "encoder, packed": lambda: self._ours_encoded,
            "encoder, released mode": lambda: self._released_encoded,
            "connector, straightforward": self._padded_connector,
            "connector, packed": self._packed_connector,
            "connector, padded and masked SDPA": lambda: self._padded_connector("sdpa", 0.0),
            "connector, one by one": self._looped_connector,
            "connector, straightforward, recomputed": lambda: self._padded_connector(
                checkpointing=True
            ),
            "connector, packed, recomputed": lambda: self._packed_connector(checkpointing=True),
            "both, straightforward, recomputed": self._straightforward_whole,
            "both, packed, recomputed": self._ours_whole,
        }

    def backward(self, output: object) -> None:
        """Runs the backward pass of outputs with a graph, as the language model would."""
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
        wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        if wanted:
            if wanted[0].shape == self.cotangent.shape:
                torch.autograd.backward(wanted, [self.cotangent])
            else:
                torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
        self.connector.zero_grad(set_to_none=True)

    def _straightforward_encoder(self) -> Callable[[], object]:
        encoder = StraightforwardEncoder(self.encoder).train()
        return lambda: encoder(self.stacks)[:2]

    def _ours_encoded(self) -> tuple[Tensor, Tensor]:
        tiles = [stack[:1] for stack in self.stacks] + [stack[1:] for stack in self.stacks]
        features = self.encoder.features(torch.cat(tiles))
        return features[: len(self.stacks)], features[len(self.stacks) :]

    def _released_encoded(self) -> Tensor:
        return self.encoder.features(torch.cat([stack[:1] for stack in self.stacks]))

    def _padded_connector(
        self, attention: str = "eager", dropout: float = 0.1, checkpointing: bool = False
    ) -> Callable[[], object]:
        connector = StraightforwardConnector(self.connector, attention, dropout, checkpointing)
        connector.train()
        # The graph of the frozen encoder requires gradients of these inputs too.
        thumbnails = self.thumbnails.clone().requires_grad_()
        padded = pad_sub_images(self.sub_images, self.counts).requires_grad_()
        visible = visible_sub_images(self.counts)

        def forward() -> object:
            thumbnails.grad = padded.grad = None
            return connector(thumbnails, padded, visible)

        return forward

    def _packed_connector(self, checkpointing: bool = False) -> Callable[[], object]:
        def forward() -> object:
            self.connector.gradient_checkpointing = checkpointing
            return self.connector(self.thumbnails, self.sub_images, self.counts)

        return forward

    def _looped_connector(self) -> Callable[[], object]:
        def forward() -> object:
            self.connector.gradient_checkpointing = False
            pieces = self.sub_images.split(self.counts)
            outputs = [
                self.connector(self.thumbnails[i : i + 1], piece, [len(piece)])
                for i, piece in enumerate(pieces)
            ]
            return torch.cat(outputs)

        return forward

    def _straightforward_whole(self) -> Callable[[], object]:
        encoder = StraightforwardEncoder(self.encoder).train()
        connector = StraightforwardConnector(self.connector, checkpointing=True).train()
        return lambda: connector(*encoder(self.stacks))

    def _ours_whole(self) -> Callable[[], object]:
        def forward() -> object:
            self.connector.gradient_checkpointing = True
            return self.connector(*self._ours_encoded(), self.counts)

        return forward


def measure_times(
    bench: Bench, names: Sequence[str], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Returns wall and processor time of each step; the cases run in turn."""
    forwards = {name: bench.cases()[name]() for name in names}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(1, rounds + 1):
        for name, forward in forwards.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            bench.backward(forward())
            samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            click.echo(f"  {turn}/{rounds} {name}: {samples[name][-1][0]:.2f} s wall", err=True)
    return samples


def measure_memory(bench: Bench, name: str) -> dict[str, Any]:
    """Measures operations, kept and peak memory of a step; needs a fresh process."""
    forward = bench.cases()[name]()
    gc.collect()
    with peak_resident_mib() as peak:
        bench.backward(forward())
    saved_mib = float("nan")

    def step() -> None:
        nonlocal saved_mib
        # Only before the backward pass: what checkpointed layers recompute there is not kept
        # memory.
        with kept_storages(bench) as kept:
            output = forward()
        saved_mib = sum(kept.values()) / _MIB
        bench.backward(output)

    gflop = count_gflop(step)
    return {
        "gflop": gflop,
        "saved_mib": saved_mib,
        "peak_mib": peak[0],
    }


@contextmanager
def kept_storages(bench: Bench) -> Iterator[dict[int, int]]:
    """Collects the storages that autograd keeps, each once, without weights and inputs."""
    kept: dict[int, int] = {}
    outside = [*bench.encoder.parameters(), *bench.connector.parameters(), *bench.stacks]
    outside += [bench.thumbnails, bench.sub_images]
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, torch.nn.Parameter):
            kept[storage.data_ptr()] = (
                storage.nbytes()
            )  # keep them alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def measure_in_child(name: str) -> dict[str, Any]:
    """Runs `measure_memory` in a fresh process."""
    module = "benchmarks.pallava_encoder_connector"
    result = subprocess.run(
        [sys.executable, "-m", module, "--only-memory", name],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        # The straightforward side takes 14 GB; without that much memory, report the times only.
        click.echo(f"  {name}: no memory figures, exit code {result.returncode}", err=True)
        return dict.fromkeys(("gflop", "saved_mib", "peak_mib"), float("nan"))
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def table(results: Sequence[Result]) -> str:
    """Formats the results, each with its baseline."""
    by_name = {result.name: result for result in results}
    rows = []
    for result in results:
        baseline = by_name.get(BASELINES.get(result.name, ""))
        times = ""
        if result.ratio and result.ratio_range:
            times = str(Ratio(result.ratio, result.ratio_range))
        operations = f"{baseline.gflop / result.gflop:.2f}" if baseline else ""
        rows.append(
            [
                result.name,
                result.wall_s,
                result.cpu_s,
                times,
                result.gflop,
                operations,
                result.saved_mib,
                result.peak_mib,
            ]
        )
    headers = ["step of", "wall s", "CPU s", "speed-up", "GFLOP", "times fewer"]
    headers += ["kept MiB", "peak MiB"]
    formats = ("", ".2f", ".2f", "", ".1f", "", ".0f", ".0f")
    return tabulate(rows, headers, tablefmt="github", floatfmt=formats, disable_numparse=[3, 5])


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here."
)
@click.option("--only-memory", hidden=True, help="Measure one case's memory; used by itself.")
def main(quick: bool, rounds: int, json_path: Path | None, only_memory: str | None) -> None:
    """Measure PA-LLaVA's encoder and connector against a straightforward implementation."""
    bench = Bench(quick)
    if only_memory:
        click.echo(json.dumps(measure_memory(bench, only_memory)))
        return
    click.echo(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} "
        f"cores, {platform.machine()}, fp32; batch {len(bench.counts)}, sub-images {bench.counts}: "
        f"{bench.tiles} tiles, {bench.tiles_padded} with padding"
    )
    click.echo(f"largest difference of the outputs: {bench.check():.1e}")
    names = list(bench.cases())
    times = measure_times(bench, names, rounds)
    memory = {}
    if not quick:
        del bench  # free memory for the child processes
        gc.collect()
    for name in names:
        click.echo(f"  memory: {name}", err=True)
        memory[name] = measure_memory(bench, name) if quick else measure_in_child(name)
    results = []
    for name in names:
        wall, cpu = zip(*times[name], strict=True)
        result = Result(name, statistics.median(wall), statistics.median(cpu), **memory[name])
        if name in BASELINES:
            _, before = zip(*times[BASELINES[name]], strict=True)
            result.ratio, result.ratio_range = Ratio.of(before, cpu)
        results.append(result)
    click.echo(table(results))
    if json_path:
        json_path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
