"""Compares the slide encoder with a straightforward implementation of the published code.

    python -m benchmarks.gigapath_slide_encoder

The *straightforward* side reimplements what the published code computes without flash-attn: the
sequence padded to whole segments, groups of heads gathered into dense copies, a softmax over
materialised scores, and the results of each branch scattered into zeros. The *floor* is the time of
the matrix products only: the linear layers, and the operations of the attention at the speed
measured for those layers, in the precision of the case; *training* is a forward and a backward
pass. The cases run in turn in one process; memory is measured in separate processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from benchmarks._memory import peak_resident_mib
from benchmarks._processor import describe, has_bf16
from benchmarks._ratios import Ratio
from gigapath.dilated_attention import branch_calls
from gigapath.longnet import DilatedSelfAttention, EncoderLayer
from gigapath.slide_encoder import LongNetViT

STRAIGHTFORWARD, OURS, BF16, FLOOR = "straightforward", "ours", "ours, bf16", "floor"
TRAINING, STRAIGHTFORWARD_TRAINING = "ours, training", "straightforward, training"
FLOORS = {
    BF16: "floor, bf16",
    TRAINING: "floor, training",
    STRAIGHTFORWARD_TRAINING: "floor, training",
}
"""Floors of the cases other than those in fp32 without gradients."""

_ATTENTION_BACKWARD = 2.5
"""Operations of the backward pass of attention relative to the forward pass, if the scores are
computed again instead of kept (Dao 2023, arXiv:2307.08691, section 4.1)."""


def dense_branch(
    query: Tensor, key: Tensor, value: Tensor, segment: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Computes one padded branch; returns output `(B, L, H, D)` and log-sum-exp `(B, L, H)`."""
    batch, length, heads, width = query.shape
    segment = min(segment, length)
    count = -(-length // segment)
    per_group = -(-heads // dilation)
    inner = -(-segment // dilation) * dilation

    def gather(tensor: Tensor) -> Tensor:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, count * segment - length))
        tensor = tensor.reshape(batch * count, segment, heads, width)
        tensor = F.pad(tensor, (0, 0, 0, per_group * dilation - heads, 0, inner - segment))
        tensor = tensor.reshape(-1, inner // dilation, dilation, dilation, per_group, width)
        # Head group p attends to offset p of each stride.
        return tensor.diagonal(dim1=2, dim2=3).permute(0, 4, 2, 1, 3).contiguous()

    queries, keys, values = gather(query), gather(key), gather(value)
    scores = queries @ keys.transpose(-1, -2) / width**0.5
    lse = scores.logsumexp(-1)
    outputs = scores.softmax(-1) @ values

    shape = (batch * count, inner // dilation, dilation, dilation, per_group)
    spread = query.new_zeros(*shape, width)
    spread.diagonal(dim1=2, dim2=3).copy_(outputs.permute(0, 3, 2, 4, 1))
    sums = query.new_full(shape, -1e8)
    sums.diagonal(dim1=2, dim2=3).copy_(lse.permute(0, 3, 2, 1))
    spread = spread.reshape(batch * count, inner, -1, width)[:, :segment, :heads]
    sums = sums.reshape(batch * count, inner, -1)[:, :segment, :heads]
    return (
        spread.reshape(batch, count * segment, heads, width)[:, :length],
        sums.reshape(batch, count * segment, heads)[:, :length],
    )


def dense_attention(module: DilatedSelfAttention, tokens: Tensor) -> Tensor:
    """Self-attention of `(B, L, D)` with every branch computed densely."""
    config = module.config
    query, key, value = (
        projection(tokens).unflatten(-1, (config.num_heads, -1))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    branches = [
        dense_branch(query, key, value, segment, dilation)
        for segment, dilation in zip(config.segment_lengths, config.dilated_ratios, strict=True)
    ]
    weights = torch.stack([sums for _, sums in branches]).softmax(0).detach()
    mixed = sum(
        output * weight.unsqueeze(-1) for (output, _), weight in zip(branches, weights, strict=True)
    )
    assert isinstance(mixed, Tensor)
    projected: Tensor = module.out_proj(module.inner_attn_ln(mixed.flatten(2)))
    return projected


def straightforward(model: LongNetViT, table: Tensor, x: Tensor, coords: Tensor) -> Tensor:
    """Returns the slide embedding `(B, D)`, computed with the weights of our model."""
    cells = torch.floor(coords / model.tile_size).long()
    index = cells[..., 0] * model.slide_ngrids + cells[..., 1]
    tokens = model.patch_embed(x) + table[index]
    tokens = torch.cat([model.cls_token.expand(len(x), 1, -1), tokens], dim=1)
    for layer in model.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        tokens = tokens + dense_attention(layer.self_attn, layer.self_attn_layer_norm(tokens))
        hidden = F.gelu(layer.ffn.fc1(layer.final_layer_norm(tokens)))
        tokens = tokens + layer.ffn.fc2(layer.ffn.ffn_layernorm(hidden))
    vector: Tensor = model.norm(model.encoder.layer_norm(tokens))[:, 0]
    return vector


def attention_flops(model: LongNetViT, num_tokens: int) -> int:
    """Returns the operations of scores and weighted sums in one layer, without padding."""
    config = model.encoder.config
    calls = (
        call
        for segment, dilation in zip(config.segment_lengths, config.dilated_ratios, strict=True)
        for call in branch_calls(1, num_tokens, config.num_heads, segment, dilation)
    )
    width = config.embed_dim // config.num_heads
    return sum(4 * call.sizes[0] * call.sizes[1] * call.sizes[2] ** 2 * width for call in calls)


class Bench:
    """The encoder, its inputs, and the cases.

    Args:
        layers: Number of layers.
        quick: Whether to use tiny sizes.
        with_table: Whether to build the position table of the whole grid for the straightforward
            side.
    """

    def __init__(self, layers: int, quick: bool, with_table: bool = True) -> None:
        torch.manual_seed(0)
        sizes = {"embed_dim": 64, "in_chans": 32} if quick else {}
        self.ngrids = 40 if quick else 400
        self.model = LongNetViT(depth=layers, slide_ngrids=self.ngrids, **sizes)  # type: ignore[arg-type]
        self.model.init_weights()
        self.model.eval().requires_grad_(False)
        if with_table:
            axis = self.model.pos_axis
            rows = axis.expand(self.ngrids, -1, -1)
            self.table = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)

    def inputs(self, num_tiles: int) -> tuple[Tensor, Tensor]:
        """Returns tiles of a square of tissue, `(1, L, C)`, and their coordinates."""
        side = int(num_tiles**0.5) + 1
        places = torch.arange(num_tiles)
        coords = torch.stack([places % side, places // side], dim=-1) * self.model.tile_size
        return torch.randn(1, num_tiles, self.model.in_chans), coords.float().unsqueeze(0)

    def ours(self, x: Tensor, coords: Tensor) -> Tensor:
        """Computes the slide embedding as users do."""
        vector = self.model(x, coords)
        assert isinstance(vector, Tensor)
        return vector[0]

    def bf16(self, x: Tensor, coords: Tensor) -> Tensor:
        """Computes the slide embedding under bf16 autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.ours(x, coords)

    def straightforward(self, x: Tensor, coords: Tensor) -> Tensor:
        """Computes the slide embedding of the straightforward side."""
        return straightforward(self.model, self.table, x, coords)

    def training(self, x: Tensor, coords: Tensor) -> None:
        """Computes the gradients of all weights."""
        self._backward(self.ours, x, coords)

    def straightforward_training(self, x: Tensor, coords: Tensor) -> None:
        """Computes the gradients of all weights by the straightforward side."""
        self._backward(self.straightforward, x, coords)

    def _backward(
        self, forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, coords: Tensor
    ) -> None:
        self.model.requires_grad_(True)
        with torch.enable_grad():
            forward(x, coords).sum().backward()
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)

    def floor(self, x: Tensor, name: str) -> float:
        """Returns the seconds of the matrix products only, on one processor.

        Args:
            x: Tiles `(1, L, C)`.
            name: `FLOOR` or one of `FLOORS`.
        """
        training = name == FLOORS[TRAINING]
        dtype = torch.bfloat16 if name == FLOORS[BF16] else torch.float32
        config, layer = self.model.encoder.config, self.model.encoder.layers[0]
        assert isinstance(layer, EncoderLayer)
        layer = deepcopy(layer).to(dtype).requires_grad_(training)
        embed = deepcopy(self.model.patch_embed).to(dtype).requires_grad_(training)
        tokens = torch.randn(x.shape[1] + 1, config.embed_dim, dtype=dtype, requires_grad=training)
        with torch.set_grad_enabled(training):
            start = time.process_time()
            tiles = embed(x.to(dtype))
            if training:
                tiles.sum().backward()
            embedding = time.process_time() - start
            start = time.process_time()
            outputs = [layer.self_attn.out_proj(tokens) for _ in range(4)]
            outputs.append(layer.ffn.fc2(layer.ffn.fc1(tokens)))
            if training:
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            linear = time.process_time() - start
        flops = 2 * len(tokens) * config.embed_dim**2 * (4 + 2 * config.mlp_ratio)
        attention = attention_flops(self.model, len(tokens)) * linear / flops
        if training:  # the backward pass of linear layers has twice the operations of the forward
            attention *= (1 + _ATTENTION_BACKWARD) / 3
        return embedding + config.depth * (linear + attention)


def peak_of(case: str, num_tiles: int, layers: int, quick: bool) -> float:
    """Returns peak MiB of a case minus model and inputs, in a separate process."""
    command = [sys.executable, "-m", "benchmarks.gigapath_slide_encoder", "--peak", case]
    command += ["--tiles", str(num_tiles), "--layers", str(layers), *["--quick"] * quick]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1])


@dataclass
class Result:
    """Measurements of a case for a number of tiles.

    Attributes:
        num_tiles: Number of tiles of the slide.
        name: The case.
        cpu_s: Median processor time.
        ratio: Median over the rounds of the straightforward side's time by this one's.
        ratio_range: Least and largest of these.
        over_floor: Median over the rounds of this one's time by its floor's.
        over_floor_range: Least and largest of these.
        peak_kib: Peak memory per tile, without model and inputs.
    """

    num_tiles: int
    name: str
    cpu_s: float
    ratio: float | None
    ratio_range: tuple[float, float] | None
    over_floor: float | None
    over_floor_range: tuple[float, float] | None
    peak_kib: float | None = None


def measure(bench: Bench, num_tiles: int, rounds: int, names: list[str]) -> list[Result]:
    """Runs the cases in turn, and returns medians."""
    x, coords = bench.inputs(num_tiles)
    cases: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
        STRAIGHTFORWARD: bench.straightforward,
        OURS: bench.ours,
        BF16: bench.bf16,
        TRAINING: bench.training,
        STRAIGHTFORWARD_TRAINING: bench.straightforward_training,
    }
    if STRAIGHTFORWARD in names:
        ours, theirs = bench.ours(x, coords), bench.straightforward(x, coords)
        difference = float((ours - theirs).abs().max())
        if not difference < 1e-4:
            raise RuntimeError(f"{num_tiles} tiles: the two sides differ by {difference}")
    floor_of = {name: FLOORS.get(name, FLOOR) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in (*names, *floor_of.values())}
    for _ in range(rounds):
        for name in names:
            start = time.process_time()
            cases[name](x, coords)
            seconds[name].append(time.process_time() - start)
        for name in dict.fromkeys(floor_of.values()):
            seconds[name].append(bench.floor(x, name))

    def ratio_of(above: str, below: str | None) -> Ratio | None:
        if below is None or above == below or not seconds.get(above):
            return None
        return Ratio.of(seconds[above], seconds[below])

    results = []
    for name, times in seconds.items():
        is_training = name in (TRAINING, STRAIGHTFORWARD_TRAINING)
        alternative = STRAIGHTFORWARD_TRAINING if is_training else STRAIGHTFORWARD
        ratio = ratio_of(alternative, name) if name in floor_of else None
        over_floor = ratio_of(name, floor_of.get(name))
        results.append(
            Result(
                num_tiles,
                name,
                statistics.median(times),
                ratio.median if ratio else None,
                ratio.limits if ratio else None,
                over_floor.median if over_floor else None,
                over_floor.limits if over_floor else None,
            )
        )
    return results


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--layers", default=12, show_default=True)
@click.option("--tiles", multiple=True, type=int, default=[256, 1024, 4096, 16384])
@click.option("--curve", multiple=True, type=int, default=[16384, 32768, 65536, 131072])
@click.option("--training", is_flag=True, help="Measure gradients as well.")
@click.option("--threads", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option("--peak", type=click.Choice([STRAIGHTFORWARD, OURS, TRAINING]), hidden=True)
@torch.no_grad()
def main(
    rounds: int,
    layers: int,
    tiles: tuple[int, ...],
    curve: tuple[int, ...],
    training: bool,
    threads: int,
    quick: bool,
    json_file: Path | None,
    peak: str | None,
) -> None:
    """Measure the slide encoder: --tiles against the straightforward one, --curve one layer."""
    torch.set_num_threads(threads)
    if peak:
        bench = Bench(layers, quick, with_table=peak == STRAIGHTFORWARD)
        x, coords = bench.inputs(tiles[0])
        case = {
            OURS: bench.ours,
            TRAINING: bench.training,
            STRAIGHTFORWARD: bench.straightforward,
        }[peak]
        case(x[:, :64], coords[:, :64])
        with peak_resident_mib() as peaks:
            case(x, coords)
        click.echo(peaks[0])
        return
    if quick:
        rounds, layers, tiles, curve, training = 1, 2, (300,), (500,), True
    click.echo(f"{describe()}, torch {torch.__version__}")
    bench = Bench(layers, quick)
    names = [STRAIGHTFORWARD, OURS] + [BF16] * (quick or has_bf16())
    names += [STRAIGHTFORWARD_TRAINING, TRAINING] if training else []
    results = []
    for num_tiles in tiles:
        results += measure(bench, num_tiles, rounds, names)
    for result in results:
        if result.name in (STRAIGHTFORWARD, OURS, TRAINING):
            mib = peak_of(result.name, result.num_tiles, min(layers, 2), quick)
            result.peak_kib = mib * 1024 / result.num_tiles
    header = ["tiles", "case", "cpu s", "speed-up", "range", "over floor", "range", "peak KiB/tile"]
    rows = [list(asdict(result).values()) for result in results]
    click.echo(tabulate(rows, header, floatfmt=".4g"))
    single, lines = Bench(1, quick, with_table=False), []
    for num_tiles in curve:
        ours = measure(single, num_tiles, rounds, [OURS])[0]
        ours.peak_kib = peak_of(OURS, num_tiles, 1, quick) * 1024 / num_tiles
        results.append(ours)
        per_tile = 1e3 * ours.cpu_s / num_tiles
        floor = [ours.over_floor, ours.over_floor_range]
        lines.append([num_tiles, ours.cpu_s, per_tile, *floor, ours.peak_kib])
    header = ["tiles, one layer", "cpu s", "ms/tile", "over floor", "range", "peak KiB/tile"]
    click.echo(tabulate(lines, header, floatfmt=".4g"))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
