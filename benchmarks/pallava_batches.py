"""Compares ways of forming batches for PA-LLaVA: at random, grouped by cost, and packed.

    OMP_NUM_THREADS=1 python -m benchmarks.pallava_batches

The samples have the spread of instruction tuning: short questions about figures of a book, as in
PathVQA, and questions with four choices, as in PMC-VQA, with images of many shapes. *Padded* is
what the published code does: samples in random order, texts padded to the longest of a batch, and
sub-images padded with copies to the most of a batch. *Random* pads texts alone. *Grouped* is the
recipe's `SubImageGroupedSampler`. *Packed* puts the tokens of a random batch into one row, with
positions that begin again and attention within each sample; its loss equals that of *random*, which
is checked. A step is forward and backward of the whole model, with a small language model.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tabulate import tabulate

from benchmarks._ratios import Ratio
from pallava.anyres import AnyRes
from pallava.engine.samplers import SubImageGroupedSampler
from pallava.text.encoding import IGNORE_INDEX

WAYS = ("padded", "random", "grouped", "packed")

_TILE_PX = 224
_TOKENS_PER_WORD = 1.4  # of English in a vocabulary of 128,000
_TEMPLATE_TOKENS = 15  # of a question and its answer in Llama 3's template
_PATHVQA_SHARE = 0.5


@dataclass
class Samples:
    """Costs of samples, as the sampler reads them from a data set.

    Attributes:
        modality_length: Number of text tokens of each sample.
        num_sub_images: Number of sub-images of each sample.
        answers: Number of answer tokens of each sample.
    """

    modality_length: list[int]
    num_sub_images: list[int]
    answers: list[int]

    def __len__(self) -> int:
        return len(self.modality_length)

    @classmethod
    def draw(cls, count: int, seed: int) -> Samples:
        """Draws texts and image sizes; the ranges are assumptions, not statistics of the sets."""
        rng, anyres = np.random.default_rng(seed), AnyRes(_TILE_PX)
        lengths, sub_images, answers = [], [], []
        for _ in range(count):
            if rng.random() < _PATHVQA_SHARE:
                question = rng.integers(4, 17)
                answer = rng.choice(np.array([1, rng.integers(1, 7)]))
            else:  # four choices
                question, answer = rng.integers(8, 31) + rng.integers(1, 13, 4).sum(), 1
                answer += rng.integers(1, 13)
            answers.append(int(np.ceil(answer * _TOKENS_PER_WORD)))
            text = int(np.ceil(question * _TOKENS_PER_WORD)) + answers[-1]
            lengths.append(text + _TEMPLATE_TOKENS)
            width, height = rng.integers(200, 1601), rng.integers(200, 1201)
            sub_images.append(anyres.num_sub_images(int(width), int(height)))
        return cls(lengths, sub_images, answers)


def batches(samples: Samples, way: str, size: int, seed: int) -> Iterator[list[int]]:
    """Yields full batches of an epoch."""
    if way == "grouped":
        order = list(SubImageGroupedSampler(samples, size, seed=seed, round_up=False))
    else:
        order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]


def cost_of(samples: Samples, batch: list[int]) -> tuple[int, int]:
    """Returns sub-images and longest text of a batch."""
    return (
        sum(samples.num_sub_images[i] for i in batch),
        max(samples.modality_length[i] for i in batch),
    )


def padding(samples: Samples, way: str, size: int, num_visual: int) -> tuple[float, float]:
    """Returns computed tokens and sub-images of an epoch, relative to those of the samples."""
    tokens = sub_images = needed_tokens = needed_sub_images = 0
    for batch in batches(samples, way, size, seed=0):
        lengths = [num_visual + samples.modality_length[i] for i in batch]
        counts = [samples.num_sub_images[i] for i in batch]
        needed_tokens += sum(lengths)
        needed_sub_images += sum(counts)
        tokens += sum(lengths) if way == "packed" else max(lengths) * size
        sub_images += max(counts) * size if way == "padded" else sum(counts)
    return tokens / needed_tokens, sub_images / needed_sub_images


def make_model(quick: bool) -> Any:
    """Makes the model with random weights, LoRA on the language model and a frozen encoder."""
    from peft import LoraConfig
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    from pallava.engine.runtime import prepare_host
    from pallava.model import LLaVAModel
    from pallava.modeling.plip import PLIPVisionEncoder

    prepare_host()
    torch.manual_seed(0)
    vision, width, layers = (32, 64, 2) if quick else (192, 512, 8)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300 if quick else 8000, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=layers, num_attention_heads=width // 32,
        )
    )  # fmt: skip
    encoder = PLIPVisionEncoder(
        CLIPVisionConfig(
            hidden_size=vision, intermediate_size=4 * vision, num_hidden_layers=4,
            num_attention_heads=vision // 16, image_size=_TILE_PX, patch_size=16,
        )
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = LLaVAModel(
        llm, encoder, freeze_llm=True, freeze_visual_encoder=True, llm_lora=lora,
        cross_attention=True, num_hidden_layers=2, connector={"hidden_dropout_prob": 0.0},
        use_activation_checkpointing=False,
    )  # fmt: skip
    return model.train()


def make_batch(samples: Samples, batch: list[int], way: str, vocabulary: int) -> dict[str, Any]:
    """Makes the tensors of a batch; a sample has the same values in each way."""
    from pallava.default_collate_fn import default_collate_fn

    most = max(samples.num_sub_images[i] for i in batch)
    rows = []
    for i in batch:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(5, vocabulary, (samples.modality_length[i],), generator=generator)
        labels = ids.clone()
        labels[: -samples.answers[i]] = IGNORE_INDEX
        count = samples.num_sub_images[i]
        ids = torch.cat([ids[:4], torch.tensor([-200]), ids[4:]])
        labels = torch.cat([labels[:4], torch.tensor([IGNORE_INDEX]), labels[4:]])
        pixels = torch.randn(1 + count, 3, _TILE_PX, _TILE_PX, generator=generator)
        if way == "padded":
            pixels = torch.cat([pixels, *[pixels[-1:]] * (most - count)])
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    data: dict[str, Any] = default_collate_fn(rows)["data"]
    return data


def loss_of(model: Any, data: dict[str, Any], *, packed: bool) -> torch.Tensor:
    """Returns the loss of a batch, padded or in one row."""
    if not packed:
        loss: torch.Tensor = model(data)["loss"]
        return loss
    inputs = model.prepare_inputs(
        data["input_ids"], data["pixel_values"], data["attention_mask"], data["labels"]
    )
    return model.language_model_loss(pack(inputs))


def pack(inputs: Any) -> Any:
    """Puts the tokens of a padded batch into one row, each sample with its own attention."""
    mask = inputs.attention_mask.bool()
    labels = inputs.labels.clone()
    labels[:, 0] = IGNORE_INDEX  # nothing is predicted from another sample
    sample = mask.nonzero()[:, 0]
    within = (sample[:, None] == sample) & torch.ones(len(sample), len(sample)).tril().bool()
    lowest = torch.finfo(inputs.inputs_embeds.dtype).min
    return replace(
        inputs,
        inputs_embeds=inputs.inputs_embeds[mask][None],
        attention_mask=torch.zeros(within.shape).masked_fill(~within, lowest)[None, None],
        position_ids=(mask.cumsum(dim=1) - 1)[mask][None],
        labels=labels[mask][None],
    )


def measure(
    model: Any, samples: Samples, size: int, num_batches: int, rounds: int
) -> dict[str, list[float]]:
    """Returns CPU seconds per sample of every way, for each round; the ways run in turn."""
    vocabulary = model.llm.config.vocab_size
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS:
            epoch = list(batches(samples, way, size, seed=turn))
            # Grouped batches differ in cost, and few at random would not have the epoch's mean.
            epoch.sort(key=lambda batch: cost_of(samples, batch))
            chosen = [
                epoch[(2 * i + 1) * len(epoch) // (2 * num_batches)] for i in range(num_batches)
            ]
            total = 0.0
            for batch in chosen:
                data = make_batch(samples, batch, way, vocabulary)
                start = time.process_time()
                loss = loss_of(model, data, packed=way == "packed")
                loss.backward()  # type: ignore[no-untyped-call]
                total += time.process_time() - start
                model.zero_grad(set_to_none=True)
            seconds[way].append(total / (len(chosen) * size))
            click.echo(f"  {turn + 1}/{rounds} {way}: {seconds[way][-1]:.3f} s", err=True)
    return seconds


def check_packing(model: Any, samples: Samples, size: int) -> float:
    """Returns the relative difference of the losses of a packed and a padded batch.

    Raises:
        RuntimeError: If it is above 1e-5.
    """
    data = make_batch(samples, list(range(size)), "random", model.llm.config.vocab_size)
    with torch.no_grad():
        one, other = (float(loss_of(model, dict(data), packed=p)) for p in (False, True))
    difference = abs(one - other) / one
    if not difference < 1e-5:
        raise RuntimeError(f"losses of the packed and the padded batch: {one} and {other}")
    return difference


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=6, show_default=True, help="The recipe's per GPU.")
@click.option("--num-batches", default=8, show_default=True, help="Per way and round.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
def main(quick: bool, rounds: int, batch: int, num_batches: int, json_path: Path | None) -> None:
    """Measure training steps of differently formed batches."""
    if quick:
        rounds, batch, num_batches = 1, 2, 1
    samples, model = Samples.draw(3000, seed=0), make_model(quick)
    num_visual = model.visual_encoder.config.image_size**2 // 16**2
    check_packing(model, samples, batch)
    seconds = measure(model, samples, batch, num_batches, rounds)
    rows = []
    for way in WAYS:
        tokens, sub_images = padding(samples, way, batch, num_visual)
        rows.append(
            [
                way, f"{tokens:.3f}", f"{sub_images:.3f}", f"{statistics.median(seconds[way]):.3f}",
                str(Ratio.of(seconds["padded"], seconds[way])),
            ]
        )  # fmt: skip
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores, batch {batch}")
    headers = ["batches", "tokens", "sub-images", "CPU s a sample", "speed-up"]
    click.echo(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    if json_path:
        json_path.write_text(json.dumps({"cpu_s": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
