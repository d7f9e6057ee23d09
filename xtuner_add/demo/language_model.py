"""The demo's language model: a small Llama with Llama 3's chat format, trained here from scratch.

It reads short pathology reports and answers questions about them, in text alone: what a large
language model brings along. Images come later, through the connector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

_IGNORED = -100
_KEPT_BACK = 256  # texts that measure the progress
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
    """Byte-level BPE on the texts, with Llama 3's special tokens and chat template.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A word with the blank before it, or a run of anything else: words stay whole.
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
        Ids, and for each whether it belongs to an answer, its end included.
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
) -> list[dict[str, float]]:
    """Trains tokenizer and model on the corpus and saves both to `folder`, Hugging Face style.

    A run that was stopped continues from its last checkpoint, to the same result.

    Args:
        corpus: Texts, each a list of turns `(user, assistant)`.
        folder: Receives model, tokenizer and checkpoints.
        sizes: Of the model and its training.
        seed: Of weights and order.
        stopped: Asked before every step; True ends the training.

    Returns:
        Loss and share of right answer tokens on texts that were kept back, by step.

    Raises:
        InterruptedError: `stopped` said so.
    """
    import torch

    torch.manual_seed(seed)
    texts = ["\n".join(map("\n".join, turns)) for turns in corpus]
    tokenizer = make_tokenizer(texts, sizes.vocab_size)
    model = _make_model(tokenizer, sizes)
    encoded = [encode_chat(tokenizer, turns) for turns in corpus]
    kept_back, encoded = encoded[:_KEPT_BACK], encoded[_KEPT_BACK:]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, sizes.learning_rate, total_steps=sizes.steps, pct_start=0.1
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = folder / "checkpoint.pt"
    history = restore_parts(checkpoint, parts)
    done = int(history[-1]["step"]) if history else 0
    batches = _batches(encoded, sizes.batch_size, np.random.default_rng([seed, 3]))
    progress = tqdm(range(1, sizes.steps + 1), "language model", leave=False)
    for step in progress:
        batch = next(batches)
        if step <= done:
            continue
        if stopped():
            raise InterruptedError(f"language model: stopped before step {step}")
        inputs, labels, _ = _collate(batch, tokenizer.pad_token_id)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _LOG_EVERY == 0 or step == sizes.steps:
            row = {"step": step, "loss": loss.item()}
            if step % _SAVE_EVERY == 0 or step == sizes.steps:
                row["answer_accuracy"] = _answer_accuracy(model, kept_back, tokenizer.pad_token_id)
            history.append(row)
            progress.set_postfix(row)
            if step % _SAVE_EVERY == 0:
                save_parts(checkpoint, parts, history)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return history


def _make_model(tokenizer: Any, sizes: LanguageModelSizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def save_parts(file: Path, parts: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes the states of model, optimizer and schedule, whole or not at all."""
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    with atomic_file(file) as partial:
        torch.save(states | {"history": history}, partial)


def restore_parts(file: Path, parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Puts the states of a checkpoint back, if there is one; returns the history so far."""
    if not file.is_file():
        return []
    import torch

    states = torch.load(file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return states["history"]


def _batches(encoded: list[Any], size: int, rng: np.random.Generator) -> Iterator[list[Any]]:
    while True:
        order = rng.permutation(len(encoded))
        for start in range(0, len(order) - size + 1, size):
            yield [encoded[index] for index in order[start : start + size]]


def _collate(batch: list[tuple[list[int], list[bool]]], pad: int) -> tuple[Any, Any, Any]:
    import torch

    length = max(len(ids) for ids, _ in batch)
    inputs = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), _IGNORED)
    answers = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (ids, is_answer) in enumerate(batch):
        inputs[row, : len(ids)] = labels[row, : len(ids)] = torch.tensor(ids)
        answers[row, : len(ids)] = torch.tensor(is_answer)
    return inputs, labels, answers


def _answer_accuracy(model: Any, encoded: list[Any], pad: int) -> float:
    import torch

    inputs, _, answers = _collate(encoded, pad)
    with torch.no_grad():
        predicted = model(input_ids=inputs).logits[:, :-1].argmax(dim=-1)
    right = predicted == inputs[:, 1:]
    return float(right[answers[:, 1:]].float().mean())
