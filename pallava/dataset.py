"""LLaVA conversations about images, for `xtuner train`. Published configs import this module.

Rows of `conversations.jsonl` (or `.json`) have the fields `id`, `image` (a file, a list of files,
or absent) and `conversations` `[{from: human|gpt, value}]` with `<image>` tokens. A row or image
that cannot be used is recorded in the run's skip log and skipped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pallava.anyres import TRAINING_TIES, AnyRes, GridTies, pad_to_square
from pallava.engine.conversations import (
    ConversationDataset,
    build,
    load_processed_text,
    process_text,
)
from pallava.feature_cache import CachedImage, FeatureCache
from pallava.image_index import index_images
from pathcore.files import StrPath
from pathcore.images import MAX_IMAGE_PIXELS, ImageError, load_image, path_inside

__all__ = ["LLaVADataset", "load_processed_text", "process_text"]


class LLaVADataset(ConversationDataset):
    """Tokenized conversations with their images as stacks of tiles.

    Args:
        image_folder: Folder that the image paths of the rows are relative to.
        image_processor: Hugging Face image processor or its config; provides size, mean and std.
        data_path: `.json` or `.jsonl` file of rows; requires `tokenizer`.
        tokenizer: Hugging Face tokenizer or its config.
        offline_processed_text_folder: Folder written by `datasets.save_to_disk` with `input_ids`,
            `labels` and `image`; replaces `data_path`. If `xtuner-add tokenise` wrote it,
            `tokenizer`, `dataset_map_fn`, `template_map_fn` and `max_length` must be those of the
            folder, or be left out.
        max_dataset_length: Number of rows to sample at random; all rows by default.
        dataset_map_fn: Maps a row to `{"conversation": [...]}`: XTuner's `llava_map_fn` (one image,
            moved to the front, as published) or `pallava.text.encoding.interleaved_map_fn` (the
            default).
        template_map_fn: Prompt template, as made by XTuner's `template_map_fn_factory`, or
            `tokenizer` for the tokenizer's own chat template, pinned to no thinking and one date.
        max_length: Maximum number of tokens, by default 2048; longer sequences are truncated.
        pad_image_to_square: Whether to pad with the mean colour before tiling; exported with the
            model.
        anyres_image: Whether to add sub-images; False yields the thumbnail alone. Exported with the
            model.
        grid_ties: See `pallava.anyres.choose_grid`; exported with the model.
        check_images: `header` opens every image once at the start, which finds missing files before
            the first step and lets batches be grouped by cost; `none` skips the check.
        max_pixels: Maximum number of pixels; larger images are skipped.
        skip_log: File that records skipped samples; beside the run's log by default.
        map_num_proc: Number of tokenization processes; chosen by the number of rows by default.
        contrast_answers: Whether the loss also contrasts different answers to one wording; see
            `pallava.modeling.contrast`.
        feature_cache: Folder in which the features of a frozen encoder are stored, so that each
            image is decoded and encoded once; see `pallava.feature_cache`.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If arguments conflict, or too many rows are unusable.
    """

    def __init__(
        self,
        image_folder: StrPath,
        image_processor: Any,
        data_path: StrPath | None = None,
        tokenizer: Any = None,
        offline_processed_text_folder: StrPath | None = None,
        max_dataset_length: int | None = None,
        dataset_map_fn: Any = None,
        template_map_fn: Any = None,
        max_length: int | None = None,
        pad_image_to_square: bool = False,
        anyres_image: bool = True,
        grid_ties: GridTies = TRAINING_TIES,
        check_images: Literal["header", "none"] = "header",
        max_pixels: int = MAX_IMAGE_PIXELS,
        skip_log: StrPath | None = None,
        map_num_proc: int | None = None,
        contrast_answers: bool = False,
        feature_cache: StrPath | None = None,
    ) -> None:
        self.image_folder = Path(image_folder)
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image_folder {self.image_folder}: no such folder")
        self.image_processor = build(image_processor)
        self.anyres = AnyRes.from_image_processor(
            self.image_processor,
            sub_images=anyres_image,
            ties=grid_ties,
            pad_to_square=pad_image_to_square,
        )
        self.pad_image_to_square = pad_image_to_square
        self.max_pixels = max_pixels
        self.feature_cache: FeatureCache | None = None
        if feature_cache is not None:
            self._refuse_changed_images()
            self.feature_cache = FeatureCache(feature_cache, self.anyres)
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
            contrast_answers=contrast_answers,
        )
        if check_images == "header":
            read_headers = partial(index_images, self.image_folder, max_pixels=max_pixels)
            self.skip_unreadable(read_headers, self.image_folder)

    def read_image(self, name: str) -> torch.Tensor | CachedImage:
        """Reads an image as a stack of tiles `(1 + num_sub_images, 3, S, S)`.

        With `feature_cache`, the result is a `CachedImage` of these tiles, or of their features if
        they are stored.

        Raises:
            ImageError: If the image cannot be read or is too large.
        """
        if self.feature_cache is None:
            return self.anyres(self.load_image(name))
        path = path_inside(self.image_folder, name)
        try:
            file = self.feature_cache.file_of(path)
            cached = self.feature_cache.read(file)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {error}") from error
        return cached or CachedImage(self.anyres(self.load_image(name)), str(file))

    def cached_images(self) -> list[tuple[str, int]]:
        """Returns every image once, with its number of tiles."""
        names = sorted({name for files in self._files_of_rows() for name in files})
        return [(name, 1 + self.count_sub_images(name)) for name in names]

    def _refuse_changed_images(self) -> None:
        for method in ("load_image", "read_image"):
            if getattr(type(self), method) is not getattr(LLaVADataset, method):
                raise ValueError(
                    f"{type(self).__name__} has its own {method}, which may change images from "
                    "epoch to epoch; feature_cache stores the features of unchanged ones"
                )

    def load_image(self, name: str) -> Any:
        """Decodes an image to RGB and pads it if `pad_image_to_square` is set.

        Raises:
            ImageError: If the image cannot be read or is too large.
        """
        image = load_image(path_inside(self.image_folder, name), max_pixels=self.max_pixels)
        if self.pad_image_to_square:
            image = pad_to_square(
                image, self.anyres.image_mean, max_pixels=self.max_pixels, name=name
            )
        return image

    def count_sub_images(self, name: str) -> int:
        """Returns the number of sub-images, from the image size that the header check read."""
        return self.anyres.num_sub_images(*self._index.size(name))
