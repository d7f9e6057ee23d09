"""Compares a training step of CITE with a straightforward implementation of the published code.

    python -m benchmarks.cite_step

Both sides have the same weights and give the same features and gradients, which is checked first.
A step is a training step: encoder with one prompt, neck, head, backward to prompt and neck. The
cases run in turn in one process. Cached baselines only train the head, on features.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._processor import describe, has_bf16
from benchmarks._ratios import Ratio
from cite.encoders import build_encoder
from cite.projection import Projection
from cite.prompted import PromptedEncoder
from cite.text_embeddings import TextEmbeddings
from cite.text_scores import TextScores

BASELINES = {
    "CITE, fp32": "CITE, straightforward",
    "CITE, bf16": "CITE, straightforward",
    "linear, cached": "linear, straightforward",
    "CITE head, cached": "linear, straightforward",
}
"""What each case is compared with."""

NUM_CLASSES, TEXT_WIDTH = 3, 1024


class StraightforwardBlock(nn.Module):
    """CLIP block with tokens first, full attention and unfused activation."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps `(tokens, batch, width)` to the same shape."""
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.c_fc(self.ln_2(tokens))
        return tokens + self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class StraightforwardEncoder(nn.Module):
    """CLIP's image tower as the published code runs it, with one prompt before the first block.

    Args:
        ours: Encoder whose weights to use.
        prompted: Whether to use the prompt.
    """

    def __init__(self, ours: PromptedEncoder, prompted: bool = True) -> None:
        super().__init__()
        self.prompted = prompted
        model, self.width = ours.encoder.model, ours.encoder.width
        blocks = ours.encoder.blocks()
        self.blocks = nn.ModuleList(
            StraightforwardBlock(self.width, block.num_heads) for block in blocks
        )
        state = model.state_dict()
        for index, block in enumerate(self.blocks):
            prefix = f"transformer.resblocks.{index}."
            names = {name: name.replace("c_", "mlp.c_", 1) for name in block.state_dict()}
            block.load_state_dict({name: state[prefix + names[name]] for name in names})
        self.stem = model
        self.prompt = nn.Parameter(torch.zeros(1, 1, self.width))
        self.requires_grad_(False)
        self.prompt.requires_grad_(prompted)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns `(batch, embed_dim)`."""
        stem = self.stem
        patches = stem.conv1(pixel_values).flatten(2).transpose(1, 2)
        class_token = stem.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + stem.positional_embedding
        tokens = stem.ln_pre(tokens)
        if self.prompted:
            prompt = self.prompt.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)
        tokens = tokens.permute(1, 0, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return stem.ln_post(tokens.permute(1, 0, 2)[:, 0]) @ stem.proj


@dataclass
class Result:
    """Measurements of one case.

    Attributes:
        name: The case.
        wall_s: Median wall time of a step.
        cpu_s: Median processor time of a step.
        ratio: Median over the rounds of the baseline's processor time by this one's.
        ratio_range: Least and largest of this over the rounds.
    """

    name: str
    wall_s: float
    cpu_s: float
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None


class Bench:
    """The models, a batch, and the cases by name.

    Args:
        quick: Whether to use tiny sizes.
        batch_size: Number of images per step.
    """

    def __init__(self, quick: bool, batch_size: int) -> None:
        torch.manual_seed(0)
        vision: dict[str, Any] = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
        if quick:
            vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3}
        self.arch: dict[str, Any] = {
            "embed_dim": vision["width"] * 2 // 3,
            "quick_gelu": True,
            "vision_cfg": vision,
        }
        self.wide = self._encoder("fp32")
        state = self.wide.state_dict()
        self.narrow = self._encoder("bf16")
        self.narrow.load_state_dict(state)
        self.baseline = StraightforwardEncoder(self.wide)
        self.neck = Projection(self.wide.embed_dim, TEXT_WIDTH)
        texts = TextEmbeddings(
            torch.randn(NUM_CLASSES, TEXT_WIDTH),
            torch.arange(NUM_CLASSES),
            ("a", "b", "c"),
            ("a", "b", "c"),
        )
        self.head = TextScores(texts)
        self.linear = nn.Linear(self.wide.embed_dim, NUM_CLASSES)
        self.plain = StraightforwardEncoder(self.wide, prompted=False)
        side = vision["image_size"]
        self.images = torch.randn(batch_size, 3, side, side)
        self.labels = torch.randint(NUM_CLASSES, (batch_size,))
        with torch.no_grad():
            self.features = self.wide(self.images)

    def check(self) -> tuple[float, float]:
        """Returns the relative differences of features and of the prompt's gradient in fp32.

        Raises:
            RuntimeError: If the two sides disagree.
        """
        self.wide.zero_grad()
        self.baseline.zero_grad()
        cotangent = torch.randn_like(self.features)
        ours, theirs = self.wide(self.images), self.baseline(self.images)
        (ours * cotangent).sum().backward()
        (theirs * cotangent).sum().backward()
        assert self.wide.prompts is not None
        pairs = [
            (ours.detach(), theirs.detach()),
            (self.wide.prompts.prompt.grad, self.baseline.prompt.grad),
        ]
        first, second = (float((a - b).norm() / b.norm()) for a, b in pairs)  # type: ignore[operator, union-attr]
        if not max(first, second) < 1e-4:
            raise RuntimeError(f"the two sides differ by {first} and {second}")
        return first, second

    def cases(self) -> dict[str, Callable[[], Tensor]]:
        """Returns, by name, functions that compute the loss of a step."""
        return {
            "CITE, straightforward": lambda: self._cite(self.baseline(self.images)),
            "CITE, fp32": lambda: self._cite(self.wide(self.images)),
            "CITE, bf16": lambda: self._cite(self.narrow(self.images)),
            "linear, straightforward": lambda: self._linear(self.plain(self.images)),
            "linear, cached": lambda: self._linear(self.features),
            "CITE head, cached": lambda: self._cite(self.features),
        }

    def _encoder(self, precision: str) -> PromptedEncoder:
        encoder = build_encoder({"library": "open_clip", "config": self.arch})
        return PromptedEncoder(
            encoder, prompt_length=1, prompt_init="zero", precision=precision
        ).train()

    def _cite(self, features: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.neck(features)), self.labels)

    def _linear(self, features: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(features), self.labels)


def measure(cases: dict[str, Callable[[], Tensor]], rounds: int) -> list[Result]:
    """Runs the cases in turn, and returns medians."""
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, loss in cases.items():
            start, used = time.perf_counter(), time.process_time()
            loss().backward()
            if number:  # the first round is a warm-up
                cpu[name].append(time.process_time() - used)
                wall[name].append(time.perf_counter() - start)
    results = []
    for name in cases:
        baseline = BASELINES.get(name)
        result = Result(name, statistics.median(wall[name]), statistics.median(cpu[name]))
        if baseline:
            result.ratio, result.ratio_range = Ratio.of(cpu[baseline], cpu[name])
        results.append(result)
    return results


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Steps of each case.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
def main(rounds: int, batch_size: int, threads: int, quick: bool, json_file: Path | None) -> None:
    """Measure a training step of CITE and of its cached baselines."""
    torch.set_num_threads(threads)
    bench = Bench(quick, batch_size)
    features, gradient = bench.check()
    click.echo(f"{describe()}, torch {torch.__version__}")
    click.echo(f"relative difference: features {features:.1e}, gradient {gradient:.1e}")
    cases = bench.cases()
    if not (quick or has_bf16()):
        del cases["CITE, bf16"]
    results = measure(cases, rounds)
    rows: list[list[Any]] = [[r.name, r.wall_s, r.cpu_s] for r in results]
    for row, result in zip(rows, results, strict=True):
        if result.ratio and result.ratio_range:
            row.append(str(Ratio(result.ratio, result.ratio_range)))
    click.echo(tabulate(rows, ["step of", "wall s", "cpu s", "speed-up"], floatfmt=".4g"))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
