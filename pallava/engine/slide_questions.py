"""Questions about whole slides, for `xtuner train`: stored tile features instead of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallava.engine.conversations import ConversationDataset
from pallava.evaluate_chat_hook import EvaluateChatHook
from pallava.slide_bags import MAX_TILES, BagFolder, SlideBag, read_bag


class SlideQuestionDataset(ConversationDataset):
    """Tokenised conversations with the tile features of their slides.

    Rows of `conversations.jsonl`: `id`, `slide` (a name, or a list of names, or absent),
    `conversations` with an `<image>` mark for each slide. The name `case1` stands for the file
    `case1.h5` of `features_folder`; names never lead out of it. A row whose file cannot be used is
    written to the run's skip log and left out.

    Args:
        features_folder: Where the tile features of the slides lie; see `pallava.slide_bags`.
        in_features: Width of the features, that of the model's encoder.
        slide_embedding_folder: Where the slide encoder's files lie, for a model that takes them.
        tile_size_level0: Side of a tile in level-0 pixels, for files that do not state it.
        max_tiles: Larger slides are left out.
        conversations: As of `pallava.dataset.LLaVADataset`: `data_path`, `tokenizer`,
            `offline_processed_text_folder`, `max_dataset_length`, `dataset_map_fn`,
            `template_map_fn`, `max_length`, `skip_log`, `map_num_proc`.

    Raises:
        FileNotFoundError: A folder or file that is not there.
        ValueError: Too many unusable rows.
    """

    def __init__(
        self,
        features_folder: str | os.PathLike[str],
        in_features: int | None = None,
        slide_embedding_folder: str | os.PathLike[str] | None = None,
        tile_size_level0: int | None = None,
        max_tiles: int = MAX_TILES,
        **conversations: Any,
    ) -> None:
        embeddings = Path(slide_embedding_folder) if slide_embedding_folder else None
        self.bags = BagFolder(
            Path(features_folder), in_features, embeddings, tile_size_level0, max_tiles
        )
        super().__init__(**conversations, image_field="slide")
        self.leave_out_unreadable(self.bags.index, self.bags.folder)

    def read_image(self, name: str) -> SlideBag:
        """Reads the tiles of a slide.

        Raises:
            SlideBagError: They cannot be used.
        """
        return self.bags.read(name)

    def count_sub_images(self, name: str) -> int:
        """Tiles of a slide: slides of like size come into one batch."""
        return self._index.num_tiles[name]


class EvaluateSlideHook(EvaluateChatHook):
    """Asks the model about a few slides every now and then.

    Args:
        tokenizer: Config of the tokenizer.
        evaluation_inputs: Questions.
        evaluation_slides: One file of tile features for all questions, or one for each.
        in_features: Width of the features.
        tile_size_level0: As of `SlideQuestionDataset`.
        kwargs: As for XTuner's hook: `system`, `prompt_template`, `every_n_iters`, ...

    Raises:
        SlideBagError: A file that cannot be used, before hours are spent.
        ValueError: Not one file for each question.
    """

    def __init__(
        self,
        tokenizer: Any,
        evaluation_inputs: str | Sequence[str],
        evaluation_slides: str | Sequence[str],
        in_features: int | None = None,
        tile_size_level0: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer=tokenizer, evaluation_inputs=evaluation_inputs, **kwargs)
        names = [evaluation_slides] if isinstance(evaluation_slides, str) else evaluation_slides
        if len(names) == 1:
            names = list(names) * len(self.evaluation_inputs)
        if len(names) != len(self.evaluation_inputs):
            raise ValueError(
                f"EvaluateSlideHook: {len(names)} evaluation_slides for "
                f"{len(self.evaluation_inputs)} evaluation_inputs; give one slide, or one each"
            )
        self.evaluation_images = [
            read_bag(name, in_features=in_features, tile_size_level0=tile_size_level0)
            for name in names
        ]
