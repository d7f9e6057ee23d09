"""The demo's describer: a small LLaVA that is trained here and that the agents load with `--local`.

It consists of the image encoder of the first CLIP and a Llama of a few layers. From the teaching
slides alone it learns three tasks: to describe a patch, to check a draft against a patch, and to
shorten a caption. In PathGen-1.6M (arXiv:2407.00203, section 3.2), each of these agents is a large
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pathcore.chat_backends import Request
from pathgen.agents.prompts import Prompt, load_prompt
from xtuner_add.demo.language_model import (
    END_TURN,
    IGNORED,
    collate,
    fit,
    llama_config,
    make_tokenizer,
)
from xtuner_add.demo.pathgen import wording

Task = Literal["name", "describe", "revise", "summarise"]
Lesson = tuple[Path, wording.Field]

TASKS: tuple[Task, ...] = ("describe", "revise", "summarise")
IMAGE = "<image>"

# Messages are texts, or lists of an image and a text.
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)

_TURNS: tuple[Task, ...] = ("describe", "revise", "name", "describe", "revise", "summarise")
_NUM_TEXTS = 1500  # for building the vocabulary


@dataclass(frozen=True)
class DescriberSizes:
    """Sizes and training of the describer."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    vocab_size: int = 2000  # more than there are words, so that each word is one token
    naming_steps: int = 240
    steps: int = 760
    batch_size: int = 16
    learning_rate: float = 3e-3


def prompt_file(task: Task) -> Path:
    """Returns the file with the prompt of a task, for `--prompt-file`."""
    return Path(str(files("xtuner_add.demo.pathgen") / "prompts" / f"{task}.txt"))


def train_describer(
    clip: Path,
    lessons: Sequence[Lesson],
    folder: Path,
    sizes: DescriberSizes,
    seed: int,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Trains the describer and saves it to `folder` as a LLaVA of transformers.

    Args:
        clip: Folder of the first CLIP in the format of transformers.
        lessons: Patches with their content.
        folder: Folder for model and processor; checkpoints are written beside it.
        sizes: Sizes of the model and its training.
        seed: Seed of the weights, the wordings and the order of lessons.
        stopped: Called before every step; True ends the training.

    Returns:
        Loss by step, with the task.

    Raises:
        InterruptedError: If `stopped` returned True.
    """
    import torch

    torch.manual_seed(seed)
    model, processor = _make(clip, lessons, sizes, seed)
    teacher = _Teacher(lessons, processor, seed)

    def inputs(start: int) -> Iterator[dict[str, Any]]:
        for step in range(start + 1, sizes.steps + 1):
            yield teacher.batch(step, _task(step, sizes), sizes.batch_size)

    def log(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "task": _task(step, sizes), "loss": round(loss, 5)}

    checkpoint = folder.with_name(f"{folder.name}_checkpoint.pt")
    history = fit("describer", model, inputs, sizes, checkpoint, log, stopped)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return history


def _task(step: int, sizes: DescriberSizes) -> Task:
    """Returns the task of a step: first short captions, to align words with images, then all.

    LLaVA is also first trained on short captions (arXiv:2304.08485, section 4.2).
    """
    return "name" if step <= sizes.naming_steps else _TURNS[step % len(_TURNS)]


class _Teacher:
    """Builds batches of questions with answers; each step has its own random numbers."""

    def __init__(self, lessons: Sequence[Lesson], processor: Any, seed: int) -> None:
        from PIL import Image

        self._fields = [field for _, field in lessons]
        self._processor = processor
        self._seed = seed
        self._prompts = {task: load_prompt(prompt_file(task)) for task in TASKS}
        images = [Image.open(file).convert("RGB") for file, _ in lessons]
        self._pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        crop = processor.image_processor.crop_size["height"]
        self._num_tokens = (crop // processor.patch_size) ** 2 + 1

    def batch(self, step: int, task: Task, size: int) -> dict[str, Any]:
        """Returns the model inputs of one step; only the answers have labels."""
        import torch

        rng = np.random.default_rng([self._seed, 6, step])
        short = 2 if task == "name" else 1  # as many tokens in less than half the time
        picked = rng.integers(len(self._fields), size=short * size)
        chats = []
        end = "" if task == "name" else END_TURN  # a first sentence is not the end of an answer
        for index in picked:
            row, answer = _question(task, self._fields[index], rng)
            prompt = self._prompts["describe" if task == "name" else task].fill(row)
            chats.append((self._chat(task, prompt), f"{answer}{end}"))
        inputs = _encode(self._processor.tokenizer, chats)
        if task != "summarise":
            pixels = self._pixels[torch.from_numpy(picked)]
            inputs["pixel_values"] = _turned(pixels, rng)
        return inputs

    def _chat(self, task: Task, prompt: str) -> str:
        image = None if task == "summarise" else {"type": "image"}
        text: str = self._processor.apply_chat_template(
            Request("", prompt).messages(image), tokenize=False, add_generation_prompt=True
        )
        return text.replace(IMAGE, IMAGE * self._num_tokens)


def _question(
    task: Task, field: wording.Field, rng: np.random.Generator
) -> tuple[dict[str, str], str]:
    """Returns the row that the question is about, and the right reply."""
    if task == "name":
        return {}, wording.summary(field)
    if task == "describe":
        return {}, wording.paragraph(field, rng)
    if task == "revise":
        draft, reply = wording.revision(field, rng)
        return {"caption": draft}, reply
    form = int(rng.integers(wording.NUM_SUMMARIES))
    return {"caption": wording.paragraph(field, rng)}, wording.summary(field, form)


def _encode(tokenizer: Any, chats: Sequence[tuple[str, str]]) -> dict[str, Any]:
    rows = []
    for question, answer in chats:
        asked = tokenizer.encode(question, add_special_tokens=False)
        replied = tokenizer.encode(answer, add_special_tokens=False)
        rows.append((asked + replied, [False] * len(asked) + [True] * len(replied)))
    ids, answers, text = collate(rows, tokenizer.pad_token_id)
    labels = ids.masked_fill(~answers, IGNORED)
    return {"input_ids": ids, "attention_mask": text.long(), "labels": labels}


def _turned(pixels: Any, rng: np.random.Generator) -> Any:
    """Mirrors and rotates patches at random, since tissue has no orientation."""
    import torch

    turned = [
        torch.rot90(image, int(rng.integers(4)), (1, 2)) if rng.random() < 0.5
        else torch.rot90(image.flip(2), int(rng.integers(4)), (1, 2))
        for image in pixels
    ]  # fmt: skip
    return torch.stack(turned)


def _make(clip: Path, lessons: Sequence[Lesson], sizes: DescriberSizes, seed: int) -> Any:
    """Returns an untrained LLaVA with the CLIP's image encoder, and its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    eyes = CLIPModel.from_pretrained(clip)
    tokenizer = make_tokenizer(_texts(lessons, seed), sizes.vocab_size)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlavaConfig(
        eyes.config.vision_config,
        llama_config(tokenizer, sizes),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        # Includes the class token of the last layer, which the contrastive loss has trained.
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    tower = model.vision_tower if hasattr(model, "vision_tower") else model.model.vision_tower
    tower.vision_model.load_state_dict(eyes.vision_model.state_dict())
    processor = LlavaProcessor(
        CLIPImageProcessor.from_pretrained(clip),
        tokenizer,
        patch_size=eyes.config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def _texts(lessons: Sequence[Lesson], seed: int) -> list[str]:
    """Returns the texts from which the vocabulary is built: questions and replies of every task."""
    rng = np.random.default_rng([seed, 5])
    prompts: dict[Task, Prompt] = {task: load_prompt(prompt_file(task)) for task in TASKS}
    texts = []
    for number in range(_NUM_TEXTS):
        task = TASKS[number % len(TASKS)]
        row, answer = _question(task, lessons[int(rng.integers(len(lessons)))][1], rng)
        texts += [prompts[task].fill(row), answer]
    return texts
