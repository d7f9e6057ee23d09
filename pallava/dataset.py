"""LLaVA conversations about images, for `xtuner train`. The import path is public.

Rows of `conversations.jsonl` (or `.json`): `id`, `image` (a file, a list of files, or absent),
`conversations` `[{from: human|gpt, value}]` with `<image>` marks. A row or image that cannot be
used is written to the run's skip log and left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pallava.anyres import AnyRes, GridTies
from pallava.engine.conversations import (
    ConversationDataset,
    build,
    load_processed_text,
    process_text,
)
from pallava.image_index import index_images, path_inside
from pathcore.images import MAX_IMAGE_PIXELS, ImageError, load_image

__all__ = ["LLaVADataset", "load_processed_text", "process_text"]


class LLaVADataset(ConversationDataset):
    """Tokenised conversations with their images as stacks of tiles.

    Args:
        image_folder: Where the rows' image files lie.
        image_processor: A Hugging Face image processor or its config: size, mean and std.
        data_path: `.json` or `.jsonl` of rows; needs `tokenizer`.
        tokenizer: A Hugging Face tokenizer or its config.
        offline_processed_text_folder: A folder written by `datasets.save_to_disk` with
            `input_ids`, `labels` and `image`; used instead of `data_path`.
        max_dataset_length: Take this many rows at random.
        dataset_map_fn: Row -> `{"conversation": [...]}`; XTuner's `llava_map_fn` (one image, moved
            to the front, as published) or `pallava.text.encoding.interleaved_map_fn` (the default).
        template_map_fn: The prompt template, XTuner's `template_map_fn_factory`.
        max_length: Longer token sequences are cut.
        pad_image_to_square: Pad with the mean colour before tiling.
        anyres_image: False gives the thumbnail alone.
        grid_ties: See `pallava.anyres.choose_grid`.
        check_images: `header` opens every image once at the start, so that missing files show
            before the first step and batches can be grouped by cost; `none` trusts them.
        max_pixels: Larger images are left out.
        skip_log: Where left-out samples are recorded; by default beside the run's log.
        map_num_proc: Processes that tokenise; by default chosen by the number of rows.

    Raises:
        FileNotFoundError: A folder or file that is not there.
        ValueError: Arguments that do not go together, or too many unusable rows.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str],
        image_processor: Any,
        data_path: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        offline_processed_text_folder: str | os.PathLike[str] | None = None,
        max_dataset_length: int | None = None,
        dataset_map_fn: Any = None,
        template_map_fn: Any = None,
        max_length: int = 2048,
        pad_image_to_square: bool = False,
        anyres_image: bool = True,
        grid_ties: GridTies = "published",
        check_images: Literal["header", "none"] = "header",
        max_pixels: int = MAX_IMAGE_PIXELS,
        skip_log: str | os.PathLike[str] | None = None,
        map_num_proc: int | None = None,
    ) -> None:
        self.image_folder = Path(image_folder)
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image_folder {self.image_folder}: no such folder")
        self.image_processor = build(image_processor)
        self.anyres = AnyRes.from_image_processor(
            self.image_processor, sub_images=anyres_image, ties=grid_ties
        )
        self.pad_image_to_square = pad_image_to_square
        self.max_pixels = max_pixels
        super().__init__(
            data_path,
            tokenizer,
            offline_processed_text_folder,
            max_dataset_length,
            dataset_map_fn,
            template_map_fn,
            max_length,
            skip_log,
            map_num_proc,
        )
        if check_images == "header":
            read_headers = partial(index_images, self.image_folder, max_pixels=max_pixels)
            self.leave_out_unreadable(read_headers, self.image_folder)

    def read_image(self, name: str) -> torch.Tensor:
        """Reads an image as a stack of tiles `(1 + num_sub_images, 3, S, S)`.

        Raises:
            ImageError: It cannot be read, or is too large.
        """
        return self.anyres(self.load_image(name))

    def load_image(self, name: str) -> Any:
        """Decodes an image to RGB, and pads it if that was asked for.

        Raises:
            ImageError: It cannot be read, or is too large.
        """
        image = load_image(path_inside(self.image_folder, name), max_pixels=self.max_pixels)
        if self.pad_image_to_square:
            if max(image.size) ** 2 > self.max_pixels:
                raise ImageError(
                    f"{name}: {image.width} x {image.height} px, padded to a square, are more than "
                    f"the {self.max_pixels:,} pixels allowed"
                )
            image = _pad_to_square(image, self.anyres.image_mean)
        return image

    def count_sub_images(self, name: str) -> int:
        """Sub-images of an image whose header was read."""
        return self.anyres.num_sub_images(*self._padded(self._index.size(name)))

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        return (max(size), max(size)) if self.pad_image_to_square else size


def _pad_to_square(image: Any, mean: Sequence[float]) -> Any:
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
