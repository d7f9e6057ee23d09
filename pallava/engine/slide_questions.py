"""Questions about whole slides, for `xtuner train`, with stored tile features as input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallava.engine.conversations import ConversationDataset
from pallava.engine.prompts import training_datasets
from pallava.evaluate_chat_hook import EvaluateChatHook
from pallava.slide_bags import (
    MAX_TILES,
    BagFolder,
    SlideBag,
    embedding_beside,
    read_bag,
    read_slide_embedding,
)
from pathcore.encoders.origin import TileOrigin
from pathcore.files import StrPath


class SlideQuestionDataset(ConversationDataset):
    """Tokenized conversations with the tile features of their slides.

    Rows of `conversations.jsonl` have the fields `id`, `slide` (a name, a list of names, or absent)
    and `conversations` with one `<image>` token per slide. The name `case1` refers to `case1.h5` in
    `features_folder`; names cannot point outside it. A row whose file cannot be used is recorded in
    the run's skip log and skipped.

    Args:
        features_folder: Folder of the slides' tile features; see `pallava.slide_bags`.
        in_features: Width of the features, which must match the model's encoder.
        slide_embedding_folder: Folder of the slide encoder's files, for a model that takes them.
        tile_size_level0: Tile side in level-0 pixels, for files that do not state it.
        max_tiles: Maximum number of tiles; larger slides are skipped.
        tile_encoder: As for `SlideTokenConfig`, as are the next two; features of another encoder or
            of other tiles are skipped.
        patch_px: Side of a tile in pixels.
        mpp: Micrometres per pixel of a tile.
        conversations: Arguments of `pallava.dataset.LLaVADataset`: `data_path`, `tokenizer`,
            `offline_processed_text_folder`, `max_dataset_length`, `dataset_map_fn`,
            `template_map_fn`, `max_length`, `skip_log`, `map_num_proc`, `contrast_answers`.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If too many rows are unusable.
    """

    def __init__(
        self,
        features_folder: StrPath,
        in_features: int | None = None,
        slide_embedding_folder: StrPath | None = None,
        tile_size_level0: int | None = None,
        max_tiles: int = MAX_TILES,
        tile_encoder: str = "",
        patch_px: int = 0,
        mpp: float = 0.0,
        **conversations: Any,
    ) -> None:
        self.bags = BagFolder(
            Path(features_folder),
            in_features,
            Path(slide_embedding_folder) if slide_embedding_folder else None,
            tile_size_level0,
            max_tiles,
            TileOrigin(tile_encoder, patch_px, mpp),
        )
        super().__init__(**conversations, image_field="slide")
        self.skip_unreadable(self.bags.index, self.bags.folder)

    def read_image(self, name: str) -> SlideBag:
        """Reads the tiles of a slide.

        Raises:
            SlideBagError: If they cannot be used.
        """
        return self.bags.read(name)

    def count_sub_images(self, name: str) -> int:
        """Returns the number of tiles, by which slides of similar size are batched together."""
        return self._index.num_tiles[name]


class EvaluateSlideHook(EvaluateChatHook):
    """Asks the model sample questions about slides during training and logs the answers.

    Args:
        tokenizer: Config of the tokenizer.
        evaluation_inputs: Questions to ask.
        evaluation_slides: One file of tile features for all questions, or one per question. If the
            training data set has slide embeddings, `SLIDE.embedding.h5` beside it is read too.
        in_features: Width of the features. Defaults to the training data set's, as does the next;
            `max_tiles` and the origin of the tiles are always the data set's.
        tile_size_level0: Tile side in level-0 pixels, for files that do not state it.
        kwargs: Arguments of XTuner's hook: `system`, `prompt_template`, `every_n_iters`, ...

    Raises:
        SlideBagError: If a file cannot be used; raised before training starts.
        ValueError: If the number of files does not match.
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
        stated = {"in_features": in_features, "tile_size_level0": tile_size_level0}
        self._stated = {name: value for name, value in stated.items() if value is not None}
        self._pictures = list(names)
        self.evaluation_images = self._prepared({})

    def _prepared(self, cfg: Mapping[str, Any]) -> list[SlideBag]:
        datasets = (data for _, data in training_datasets(cfg) if "features_folder" in data)
        dataset = next(datasets, {})
        names = ("in_features", "tile_size_level0", "max_tiles")
        origin = {name: dataset[name] for name in ("patch_px", "mpp") if name in dataset}
        options: dict[str, Any] = {
            **{name: dataset[name] for name in names if name in dataset},
            **self._stated,
            "origin": TileOrigin(dataset.get("tile_encoder", ""), **origin),
        }
        bags = [read_bag(name, **options) for name in self._pictures]
        if dataset.get("slide_embedding_folder") is None:
            return bags
        return [
            bag._replace(slide_embedding=read_slide_embedding(embedding_beside(name)))
            for bag, name in zip(bags, self._pictures, strict=True)
        ]
