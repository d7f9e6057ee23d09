"""Answering many clients: together, and one at a time.

    python -m benchmarks.serving [--clients 1,4,20] [--images 4] [--rounds 3] [--json FILE]

Every client shows an image and asks; when it has the whole answer, it asks the next question of its
conversation (`--turns`). All begin at the same moment, or each waits before it asks, at random
(`--pause`). Each has an image of its own, or one of `--images` that they share, as the
readers of a cohort do. *Together* is `ModelService`, behind the page and the endpoint. *One at a
time* is what it was before: a queue, and `generate` of transformers for one conversation, from its
first token to its last. Both sides are measured in turn in one process, on the same conversations,
and their answers are compared.

The language model is a Llama with random weights whose decoding is bound by memory: 1,024 wide,
8 layers, 32,000 words, fp32. The encoder is small in the same proportion as PA-LLaVA's is beside
8 billion parameters.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks._ratios import Ratio
from pallava.anyres import AnyRes
from pallava.inference.answer_text import AnswerText, Completion
from pallava.inference.assistant import Assistant
from pallava.inference.sampling import Sampling
from pallava.modeling.llava import PALLaVA
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.serving.service import ModelService
from pallava.text.turns import Turn

SIDES = ("together", "one at a time")
QUESTION_WORDS = 12


@dataclass
class Asked:
    """One question: seconds until the first words and until the end, and the tokens."""

    first_s: float
    whole_s: float
    num_tokens: int
    text: str


@dataclass
class Run:
    """All questions of a number of clients."""

    side: str
    clients: int
    wall_s: float
    cpu_s: float
    asked: list[Asked]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, of all clients together."""
        return sum(asked.num_tokens for asked in self.asked) / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float:
        """Generated tokens per second of processor time."""
        return sum(asked.num_tokens for asked in self.asked) / self.cpu_s


def make_assistant(width: int, layers: int, words: int) -> Assistant:
    """Makes a model with random weights; its tokens are words `w0`, `w1`, and so on."""
    vocabulary = {f"w{index}": index for index in range(words)}
    vocabulary |= {"</s>": words, "<|eot_id|>": words + 1}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 256 or 1,
            vocab_size=words + 2, max_position_embeddings=4096, bos_token_id=None,
            eos_token_id=words,
        )
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3,
        image_size=224, patch_size=16,
    )  # fmt: skip
    connector = ConnectorConfig(
        visual_hidden_size=192, llm_hidden_size=width, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=768,
    )  # fmt: skip
    parts = PALLaVA(llm, PLIPVisionEncoder(vision), ScaleInvariantConnector(connector))
    return Assistant(parts.requires_grad_(False), tokenizer, AnyRes(tile_px=224))


def ask_together(service: ModelService) -> Callable[..., Awaitable[Completion]]:
    """Returns a function that answers through the service."""

    async def ask(
        turns: Sequence[Turn], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Completion:
        async for _, item in service.ask(turns, sampling):
            if isinstance(item, Completion):
                return item
            on_text(item)
        raise RuntimeError("no answer")

    return ask


def ask_one_at_a_time(assistant: Assistant) -> Callable[..., Awaitable[Completion]]:
    """Returns a function that answers by `generate`, behind a queue."""
    worker = ThreadPoolExecutor(max_workers=1)

    def answer(
        turns: Sequence[Turn], sampling: Sampling, on_text: Callable[[str], None]
    ) -> Completion:
        text = AnswerText(assistant, sampling.stop, on_text)
        images = [assistant.pixel_values(image) for turn in turns for image in turn.images]
        ids = torch.tensor([assistant.encode_turns(turns)])
        assistant.model.generate_answer(
            ids,
            images,
            stopping_criteria=StoppingCriteriaList([_Listener(text)]),
            **assistant.generation_kwargs(sampling.max_new_tokens),
        )
        return Completion(text.finish(), "length", 0, len(text.ids))

    async def ask(*arguments: Any) -> Completion:
        return await asyncio.get_running_loop().run_in_executor(worker, answer, *arguments)

    return ask


class _Listener(StoppingCriteria):
    def __init__(self, text: AnswerText) -> None:
        self._text = text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([self._text.add(int(input_ids[0, -1]))])


async def run_clients(
    ask: Callable[..., Awaitable[Completion]],
    clients: int,
    turns: int,
    tokens: int,
    words: int,
    images: int,
    pause: float,
) -> list[Asked]:
    """Lets clients ask; answers are 3/4 to 5/4 of `tokens` long."""

    async def client(number: int) -> list[Asked]:
        """Holds one conversation, whose questions and lengths depend on the number only."""
        random = np.random.default_rng(number)
        pixels = np.random.default_rng(number % images if images else number)
        image = Image.fromarray(pixels.integers(0, 255, (448, 448, 3), np.uint8))
        conversation: list[Turn] = []
        found = []
        for turn in range(turns):
            question = " ".join(f"w{word}" for word in random.integers(words, size=QUESTION_WORDS))
            conversation.append(Turn("user", question, () if turn else (image,)))
            length = int(random.integers(tokens * 3 // 4, tokens * 5 // 4 + 1))
            first: list[float] = []
            await asyncio.sleep(random.exponential(pause))
            start = time.perf_counter()

            def heard(_: str, first: list[float] = first) -> None:
                first.append(time.perf_counter())

            end = await ask(list(conversation), Sampling(length), heard)
            whole_s = time.perf_counter() - start
            found.append(Asked(first[0] - start, whole_s, end.completion_tokens, end.text))
            conversation.append(Turn("assistant", end.text))
        return found

    rows = await asyncio.gather(*(client(number) for number in range(clients)))
    return [asked for row in rows for asked in row]


def measure(assistant: Assistant, side: str, clients: int, **settings: Any) -> Run:
    """Measures one side, with settings of `run_clients`; nothing is kept from earlier runs."""
    service = ModelService(assistant, "bench")
    ask = ask_together(service) if side == "together" else ask_one_at_a_time(assistant)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    asked = asyncio.run(run_clients(ask, clients, **settings))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    service.close()
    return Run(side, clients, wall_s, cpu_s, asked)


def table(runs: Sequence[Run]) -> str:
    """Formats medians over the rounds, with ranges of the ratios."""
    lines = [
        "| clients | | tokens/s | first words, s: median, longest | whole answer, s: median | "
        "times the tokens/s | of CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients in sorted({run.clients for run in runs}):
        by_side = {
            side: [run for run in runs if (run.side, run.clients) == (side, clients)]
            for side in SIDES
        }
        for side, mine in by_side.items():
            asked = [one for run in mine for one in run.asked]
            first = [one.first_s for one in asked]
            cells = [
                str(clients), side, f"{statistics.median(run.tokens_per_s for run in mine):.1f}",
                f"{statistics.median(first):.2f}, {max(first):.2f}",
                f"{statistics.median(one.whole_s for one in asked):.1f}",
            ]  # fmt: skip
            for rate in ("tokens_per_s", "tokens_per_cpu_s"):
                rates = [[getattr(run, rate) for run in runs] for runs in (mine, by_side[SIDES[1]])]
                cells.append(str(Ratio.of(*rates)) if side == "together" else "1")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--clients", default="1,4,20", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--turns", default=1, show_default=True, help="Questions of each client.")
@click.option(
    "--images", default=0, help="Number of images that clients share. [default: one each]"
)
@click.option(
    "--pause", default=0.0, show_default=True, help="Seconds before a question, on average."
)
@click.option("--tokens", default=96, show_default=True, help="Mean length of an answer.")
@click.option("--width", default=1024, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    clients: str,
    rounds: int,
    turns: int,
    images: int,
    pause: float,
    tokens: int,
    width: int,
    layers: int,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure both sides in turn and print the table."""
    words = 300 if quick else 32_000
    if quick:
        clients, rounds, turns, tokens, width, layers = "1,3", 1, 2, 8, 256, 2
    assistant = make_assistant(width, layers, words)
    run = functools.partial(
        measure, assistant, turns=turns, tokens=tokens, words=words, images=images, pause=pause
    )
    run("together", 1)
    runs: list[Run] = []
    for _ in range(rounds):
        for number in map(int, clients.split(",")):
            pair = [run(side, number) for side in SIDES]
            texts = [[asked.text for asked in one.asked] for one in pair]
            if texts[0] != texts[1]:
                raise click.ClickException(f"{number} clients: the answers differ")
            runs += pair
    click.echo(table(runs))
    click.echo(f"\n{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in runs]))


if __name__ == "__main__":
    main()
