"""A small Llama with Llama 3's chat format, trained from scratch.

It reads short pathology reports and answers questions about them. It sees only text, like a large
language model before images reach it through the connector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathcore.files import atomic_file

Turns = Sequence[tuple[str, str]]

BEGIN, HEADER, END_HEADER, END_TURN = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""Llama 3's special tokens (github.com/meta-llama/llama3, MODEL_CARD and tokenizer)."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

IGNORED = -100
_KEPT_BACK = 256  # held-out texts for the progress
_LOG_EVERY, _SAVE_EVERY = 20, 100


@dataclass(frozen=True)
class LanguageModelSizes:
    """Sizes and training of the language model."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 384
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Trains byte-level BPE on the texts, with Llama 3's special tokens and chat template.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A word with its leading space, or a run of other characters, so that words stay whole.
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, HEADER, END_HEADER, END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_TURN,
        pad_token=END_TURN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_chat(tokenizer: Any, turns: Turns) -> tuple[list[int], list[bool]]:
    """Encodes a chat in Llama 3's format.

    Returns:
        Token ids, and for each whether it belongs to an answer, including its end token.
    """
    ids, is_answer = [tokenizer.bos_token_id], [False]
    for user, assistant in turns:
        question = tokenizer.encode(
            f"{HEADER}user{END_HEADER}\n\n{user}{END_TURN}{HEADER}assistant{END_HEADER}\n\n",
            add_special_tokens=False,
        )
        answer = tokenizer.encode(f"{assistant}{END_TURN}", add_special_tokens=False)
        ids += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    return ids, is_answer


def train(
    corpus: Sequence[Turns],
    folder: Path,
    sizes: LanguageModelSizes,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Trains tokenizer and model on the corpus and saves both to `folder`, Hugging Face style.

    Args:
        corpus: Texts, each a list of turns `(user, assistant)`.
        folder: Folder for model and tokenizer; also holds checkpoints until training is complete.
        sizes: Sizes of the model and its training.
        seed: Seed of the weights and of the order of texts.
        stopped: Called before every step; True ends the training.

    Returns:
        Loss and accuracy of answer tokens on held-out texts, by step.

    Raises:
        InterruptedError: If `stopped` returned True.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    texts = ["\n".join(map("\n".join, turns)) for turns in corpus]
    tokenizer = make_tokenizer(texts, sizes.vocab_size)
    pad = tokenizer.pad_token_id
    model = LlamaForCausalLM(llama_config(tokenizer, sizes))
    encoded = [encode_chat(tokenizer, turns) for turns in corpus]
    kept_back, encoded = encoded[:_KEPT_BACK], encoded[_KEPT_BACK:]

    def inputs(start: int) -> Iterator[dict[str, Any]]:
        batches = _batches(encoded, sizes.batch_size, np.random.default_rng([seed, 3]))
        for batch in islice(batches, start, None):
            ids, _, is_text = collate(batch, pad)
            yield {"input_ids": ids, "labels": ids.masked_fill(~is_text, IGNORED)}

    def log(step: int, loss: float) -> dict[str, Any] | None:
        if step % _LOG_EVERY and step != sizes.steps:
            return None
        row = {"step": step, "loss": loss}
        if step % _SAVE_EVERY == 0 or step == sizes.steps:
            row["answer_accuracy"] = _answer_accuracy(model, kept_back, pad)
        return row

    checkpoint = folder / "checkpoint.pt"
    history = fit("language model", model, inputs, sizes, checkpoint, log, stopped)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return history


def llama_config(tokenizer: Any, sizes: Any) -> Any:
    """Returns the config of a small Llama for a tokenizer; `sizes` has its widths and depth."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=512,
        initializer_range=sizes.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def fit(
    title: str,
    model: Any,
    inputs: Callable[[int], Iterator[dict[str, Any]]],
    sizes: Any,
    checkpoint: Path,
    log: Callable[[int, float], dict[str, Any] | None],
    stopped: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Trains a model; a stopped run resumes from its checkpoint and gives the same result.

    Args:
        title: Title of the progress bar.
        model: Model of transformers.
        inputs: Returns the inputs of the steps after the given number of steps.
        sizes: `steps` and `learning_rate`.
        checkpoint: File that is written periodically.
        log: Returns the row of the history for a step, counted from 1, and its loss; or None.
        stopped: Called before every step; True ends the training.

    Raises:
        InterruptedError: If `stopped` returned True.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, sizes.learning_rate, total_steps=sizes.steps, pct_start=0.1
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history: list[dict[str, Any]] = []
    if checkpoint.is_file():
        states = torch.load(checkpoint, weights_only=True)
        history = states["history"]
        for name, part in parts.items():
            part.load_state_dict(states[name])
    done = int(history[-1]["step"]) if history else 0
    batches = inputs(done)
    model.train()
    for step in tqdm(range(done + 1, sizes.steps + 1), title, leave=False):
        if stopped():
            raise InterruptedError(f"{title}: stopped before step {step}")
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if row := log(step, loss.item()):
            history.append(row)
        if step % _SAVE_EVERY == 0 and step < sizes.steps:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in parts.items()}
            with atomic_file(checkpoint) as partial:
                torch.save(states | {"history": history}, partial)
    return history


def collate(batch: Sequence[tuple[list[int], list[bool]]], pad: int) -> tuple[Any, Any, Any]:
    """Pads chats to one length.

    Args:
        batch: Ids of each chat, and whether each belongs to an answer.
        pad: Id of the padding.

    Returns:
        Ids, mask of the answers and mask of the text, each `(B, L)`.
    """
    import torch

    shape = (len(batch), max(len(ids) for ids, _ in batch))
    inputs = torch.full(shape, pad)
    answers, text = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, (ids, is_answer) in enumerate(batch):
        inputs[row, : len(ids)] = torch.tensor(ids)
        answers[row, : len(ids)] = torch.tensor(is_answer)
        text[row, : len(ids)] = True
    return inputs, answers, text


def _batches(encoded: list[Any], size: int, rng: np.random.Generator) -> Iterator[list[Any]]:
    while True:
        order = rng.permutation(len(encoded))
        for start in range(0, len(order) - size + 1, size):
            yield [encoded[index] for index in order[start : start + size]]


def _answer_accuracy(model: Any, encoded: list[Any], pad: int) -> float:
    import torch

    inputs, answers, _ = collate(encoded, pad)
    with torch.no_grad():
        predicted = model(input_ids=inputs).logits[:, :-1].argmax(dim=-1)
    right = predicted == inputs[:, 1:]
    return float(right[answers[:, 1:]].float().mean())
