"""Processor of an exported PA-LLaVA: images and prompts to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from pallava.anyres import CLIP_MEAN, CLIP_STD, AnyRes, GridTies
from pallava.text.encoding import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, encode_prompt, literal
from pathcore.rgb import to_rgb


class PALLaVAProcessor(ProcessorMixin):
    """Splits images into thumbnail and sub-images and tokenizes prompts, as in training.

    Args:
        tokenizer: Tokenizer of the language model, with `image_token` in its vocabulary.
        tile_px: Side of a tile, equal to the encoder's image size.
        image_mean: Channel means in 0..1.
        image_std: Channel standard deviations in 0..1.
        sub_images: Whether the model uses sub-images.
        ties: See `pallava.anyres.choose_grid`.
        image_token: Token that marks the position of an image in a prompt.
        chat_template: Chat template; the tokenizer's by default.
        add_bos: Whether prompts get a BOS; False if the chat template writes it, or wants none.
        pad_to_square: Whether images are padded with the mean colour first.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    valid_kwargs = [
        *("chat_template", "tile_px", "image_mean", "image_std", "sub_images", "ties"),
        *("pad_to_square", "image_token", "add_bos"),
    ]

    def __init__(
        self,
        tokenizer: Any = None,
        tile_px: int = 224,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        sub_images: bool = True,
        ties: GridTies = "published",
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
        add_bos: bool = True,
        pad_to_square: bool = False,
        **kwargs: Any,
    ) -> None:
        del kwargs
        self.tile_px = tile_px
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.sub_images = sub_images
        self.ties = ties
        self.pad_to_square = pad_to_square
        self.image_token = image_token
        self.add_bos = add_bos
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(tokenizer, chat_template=template)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "num_tiles"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares a batch for `generate`.

        Args:
            images: Pillow image, or (nested) lists of them, in the order of their image tokens.
            text: Prompts with the chat template applied and one `<image>` token per image.
            kwargs: Arguments that Hugging Face's pipelines pass. They are ignored: padding is
                always on the left and there is exactly one BOS, as in training.

        Returns:
            `input_ids` and `attention_mask` `(B, length)` and, with images, `pixel_values`
            `(N, 3, S, S)` and `num_tiles` `(M,)`.

        Raises:
            ValueError: If `text` is None, or the numbers of images and image tokens differ.
        """
        del kwargs
        if text is None:
            raise ValueError("text: expected at least one prompt")
        texts = [text] if isinstance(text, str) else list(text)
        flat = _flatten(images)
        marks = sum(prompt.count(self.image_token) for prompt in texts)
        if marks != len(flat):
            raise ValueError(
                f"{len(flat)} image(s) but {marks} {self.image_token} mark(s) in the text"
            )
        data = self._encode(texts)
        if flat:
            tiles = AnyRes(
                self.tile_px,
                self.image_mean,
                self.image_std,
                self.sub_images,
                self.ties,
                self.pad_to_square,
            )
            stacks = [tiles(to_rgb(image)) for image in flat]
            data["pixel_values"] = torch.cat(stacks)
            data["num_tiles"] = torch.tensor([len(stack) for stack in stacks])
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Renders messages; special tokens that one of their texts spells are read as letters.

        Such a word is enclosed in U+FDD0 in the rendered text. See also `ProcessorMixin`.
        """
        return super().apply_chat_template(self._as_text(conversation), *args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """See the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """See the tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decodes generated ids, as Hugging Face's `image-text-to-text` pipeline expects."""
        kwargs.pop("clean_up_tokenization_spaces", None)
        return self.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )

    def _as_text(self, value: Any) -> Any:
        """Marks the texts of messages, or of several conversations."""
        if isinstance(value, list | tuple):
            return [self._as_text(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: literal(self.tokenizer, item)
            if key in ("content", "text") and isinstance(item, str)
            else self._as_text(item)
            for key, item in value.items()
        }

    def _encode(self, texts: list[str]) -> dict[str, Any]:
        tokenizer = self.tokenizer
        # Some chat templates of older folders already render a BOS.
        bos = (getattr(tokenizer, "bos_token", None) or "") if self.add_bos else ""
        image_id = tokenizer.convert_tokens_to_ids(self.image_token)
        rows = [
            [
                image_id if token == IMAGE_TOKEN_INDEX else token
                for token in encode_prompt(
                    tokenizer, prompt.removeprefix(bos), rendered=not self.add_bos
                )
            ]
            for prompt in texts
        ]
        pad = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _flatten(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, list | tuple):  # iterating over a str never reaches an image
        raise ValueError(
            f"images: expected PIL images or lists of them, found {type(images).__name__}; open "
            "files with PIL.Image.open first"
        )
    return [image for item in images for image in _flatten(item)]
