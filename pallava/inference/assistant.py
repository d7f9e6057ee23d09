"""A loaded PA-LLaVA that answers questions about images, one at a time or in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pallava.anyres import AnyRes
from pallava.inference.decoding import Decoding
from pallava.inference.grouped_attention import share_keys_and_values
from pallava.modeling.llava import PALLaVA
from pallava.records.questions import SlideFeatures
from pallava.slide_bags import SlideBag, SlidePreparation
from pallava.text.chat_template import render_chat, template_of_tokenizer
from pallava.text.encoding import IMAGE_TOKEN, Bos, encode_prompt, literal
from pallava.text.templates import TOKENIZER_TEMPLATE, PromptTemplate, find_template
from pallava.text.turns import Turn, encode_turns
from pathcore.files import StrPath
from pathcore.images import load_image, to_rgb

MAX_NEW_TOKENS = 1200
"""Default limit on generated tokens; the published evaluation tools use the same."""

# Llama-3-Instruct ends a turn with this token, although its tokenizer names <|end_of_text|> as EOS.
_END_OF_TURN = "<|eot_id|>"

ImageLike = Image.Image | StrPath | SlideBag | None


class Assistant:
    """PA-LLaVA with its tokenizer and image preprocessing; created by `pallava.load_model`.

    Batches are padded on the left, and each question gets the answer that it would get alone, up to
    rounding in half precision.

    Args:
        model: Encoder, connector and language model: a module with `MultimodalMixin`'s attributes.
        tokenizer: Tokenizer of the language model.
        anyres: Image preprocessing; `SlidePreparation` for a whole-slide model, whose inputs are
            files of tile features.
        prompt_template: Prompt template or its name; `tokenizer` selects the tokenizer's own.
        bos: `single`, as in training, or `double`, as in the published evaluation tools.
        fingerprint: Hash that identifies the weights, used as a key by answer caches.
        decoding: How answers are decoded; greedy by default.

    Attributes:
        prompt_template: Name of the template; `unnamed` if XTuner has no name for it.
        stop_ids: Token ids that end an answer.
        stop_strings: Stop words that are not single tokens of the vocabulary.
    """

    def __init__(
        self,
        model: PALLaVA | Any,
        tokenizer: Any,
        anyres: AnyRes | SlidePreparation,
        prompt_template: str | PromptTemplate = "llama3_chat",
        bos: Bos = "single",
        fingerprint: str = "",
        decoding: Decoding | None = None,
    ) -> None:
        self.model = model.eval()
        share_keys_and_values(model.llm)
        self.tokenizer = tokenizer
        self.anyres: Any = anyres
        self.bos = bos
        self.fingerprint = fingerprint
        self.decoding = decoding or Decoding()
        if isinstance(prompt_template, PromptTemplate):
            template = prompt_template
        elif prompt_template == TOKENIZER_TEMPLATE:
            template = template_of_tokenizer(tokenizer)
        else:
            template = find_template(prompt_template)
        self.prompt_template = (
            prompt_template if isinstance(prompt_template, str) else prompt_template.name
        )
        self._template = template
        self.stop_ids, self.stop_strings = self._find_stops(template)

    @property
    def device(self) -> torch.device:
        """Device on which the language model expects its inputs."""
        return self.model.llm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model's weights."""
        return self.model.llm.get_input_embeddings().weight.dtype

    def answer(
        self, image: ImageLike, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> str:
        """Answers one question about one image.

        Args:
            image: Pillow image or path of an image file; None for a text-only question.
            question: Question text, without the prompt template.
            max_new_tokens: Maximum length of the answer in tokens.

        Raises:
            ImageError: If the image file cannot be read.

        Example::

            model = load_model("Meta-Llama-3-8B-Instruct", "pallava_hf", "plip")
            model.answer("biopsy.png", "Is there necrosis?")
        """
        return self.answer_batch([image], [question], max_new_tokens=max_new_tokens)[0]

    def answer_batch(
        self,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """Answers several questions in one batch, each about its own image.

        Args:
            images: One image per question; None for a text-only question.
            questions: Question texts, without the prompt template.
            max_new_tokens: Maximum length of each answer in tokens.

        Raises:
            ImageError: If an image file cannot be read.
            ValueError: If `images` and `questions` differ in length or are empty.

        Example::

            model = load_model("Meta-Llama-3-8B-Instruct", "pallava_hf", "plip")
            model.answer_batch(["a.png", "b.png"], ["Is there necrosis?", "Which organ is this?"])
        """
        if len(images) != len(questions) or not questions:
            raise ValueError(
                f"expected as many images as questions, at least one; got {len(images)} and "
                f"{len(questions)}; pass None for a question without an image"
            )
        pixels = [None if image is None else self.pixel_values(image) for image in images]
        return self.answer_prepared(questions, pixels, max_new_tokens=max_new_tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that, with prompt and image, determine an answer."""
        preprocessing = {} if self.reads_slides else {"preprocessing": asdict(self.anyres)}
        return {
            "prompt_template": self.prompt_template,
            "template": self._template.fields(),  # many are `unnamed`
            "bos": self.bos,
            "visual_select_layer": self.model.visual_select_layer,
            **preprocessing,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": self.fingerprint,
            **self.decoding.settings,
        }

    @property
    def batch_matters(self) -> bool:
        """Whether an answer can depend on the rest of its batch, as it can in half precision."""
        return True

    @property
    def reads_slides(self) -> bool:
        """Whether the model takes tile features of whole slides instead of images."""
        return isinstance(self.anyres, SlidePreparation)

    def prepare(self, image: Any) -> Any:
        """Loads and preprocesses an image source of `pallava.records.questions`."""
        return self.pixel_values(image.path if isinstance(image, SlideFeatures) else image.load())

    def answer_prepared(
        self,
        questions: Sequence[str],
        images: Sequence[Any],
        *,
        max_new_tokens: int,
        keys: Sequence[str] = (),
    ) -> list[str]:
        """Answers a batch of questions about images that `prepare` loaded; None for no image."""
        del keys  # nothing is cached
        prompts = [
            self.encode(question, has_image=image is not None)
            for question, image in zip(questions, images, strict=True)
        ]
        return self.answer_encoded(prompts, images, max_new_tokens=max_new_tokens)

    def answer_encoded(
        self,
        prompts: Sequence[Sequence[int]],
        pixel_values: Sequence[Tensor | SlideBag | None],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """Answers a batch of prompts already prepared by `encode` and `pixel_values`."""
        longest = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt)
            input_ids[row, start:] = torch.tensor(prompt, dtype=torch.long)
            mask[row, start:] = True
        stacks = [stack.to(self.device) for stack in pixel_values if stack is not None]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=not self.decoding.is_greedy):
            if not self.decoding.is_greedy:
                torch.manual_seed(self.decoding.seed)
            new_ids = self.model.generate_answer(
                input_ids.to(self.device),
                stacks or None,
                mask.to(self.device),
                **self.generation_kwargs(max_new_tokens),
            )
        return [self.decode(row) for row in new_ids.tolist()]

    def prompt(self, question: str, *, has_image: bool) -> str:
        """Renders a question with the prompt template.

        The image token is prepended unless the question already contains it.

        Raises:
            ValueError: If the question contains more image tokens than there are images.
        """
        marks = question.count(IMAGE_TOKEN)
        if marks > has_image:
            raise ValueError(
                f"the question holds {marks} {IMAGE_TOKEN} mark(s) for {int(has_image)} image(s)"
            )
        text = f"{IMAGE_TOKEN}\n{question}" if has_image and not marks else question
        if self._template.chat_template is None:
            return self._template.render(text)
        return render_chat(self.tokenizer, self._template, [{"role": "user", "content": text}])

    def encode(self, question: str, *, has_image: bool) -> list[int]:
        """Tokenizes a question in its prompt template.

        Raises:
            ValueError: If the question contains a token that the language model does not embed, or
                more image tokens than there are images.
        """
        ids = encode_prompt(
            self.tokenizer,
            self.prompt(literal(self.tokenizer, question), has_image=has_image),
            self.bos,
            rendered=self._template.chat_template is not None,
        )
        return self._checked(ids)

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Tokenizes a conversation up to its next answer; see `pallava.text.turns`.

        Raises:
            ValueError: If a text contains a token that the language model does not embed, or the
                turns do not form a conversation.
        """
        return self._checked(encode_turns(self.tokenizer, self._template, turns, self.bos))

    def _checked(self, ids: list[int]) -> list[int]:
        """Refuses tokens added to the tokenizer only, which on a GPU would end the process."""
        count = self.model.llm.get_input_embeddings().num_embeddings
        if (largest := max(ids, default=0)) >= count:
            raise ValueError(
                f"the text contains {self.tokenizer.convert_ids_to_tokens(largest)!r}, token "
                f"{largest} of the tokenizer, but the language model has {count} embeddings; leave "
                "it out of the text, or resize the model's embeddings"
            )
        return ids

    def pixel_values(self, image: Image.Image | StrPath | Tensor | SlideBag) -> Any:
        """Preprocesses an image to `(1 + num_sub_images, 3, S, S)`, the thumbnail first.

        A whole-slide model reads a file of tile features instead and returns a `SlideBag`. Tensors
        and bags are returned unchanged.
        """
        if isinstance(image, Tensor | SlideBag):
            return image
        if isinstance(self.anyres, SlidePreparation):
            return self.anyres(image)
        decoded = to_rgb(image) if isinstance(image, Image.Image) else load_image(image)
        return self.anyres(decoded)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes generated ids up to the first stop token or stop word."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text = str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
        for word in self.stop_strings:
            text = text.split(word, 1)[0]
        return text.strip()

    def has_stop_string(self, ids: Sequence[int]) -> bool:
        """Returns whether the generated text contains a stop word that is not a single token."""
        if not self.stop_strings:
            return False
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return any(word in text for word in self.stop_strings)

    def generation_kwargs(self, max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
        """Returns keyword arguments for `generate`: decoding and the stop conditions."""
        pad = self.tokenizer.pad_token_id
        kwargs: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            **self.decoding.generation_kwargs(),
            "use_cache": True,
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": min(self.stop_ids) if pad is None else pad,
        }
        if self.stop_strings:
            kwargs |= {"stop_strings": list(self.stop_strings), "tokenizer": self.tokenizer}
        return kwargs

    def _find_stops(self, template: PromptTemplate) -> tuple[set[int], tuple[str, ...]]:
        config = getattr(self.model.llm, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ids = set(ends if isinstance(ends, list | tuple) else [ends])
        ids.add(self.tokenizer.eos_token_id)
        ids.discard(None)
        strings = []
        vocabulary = self.tokenizer.get_vocab()
        for word in dict.fromkeys((_END_OF_TURN, *template.stop_words)):
            if word in vocabulary:
                ids.add(vocabulary[word])
            elif word != _END_OF_TURN or word in template.stop_words:
                strings.append(word)
        if not ids:
            raise ValueError("the tokenizer names no end of sequence (eos_token)")
        return ids, tuple(strings)
