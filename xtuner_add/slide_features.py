"""Computes the tile features of slides that a whole-slide model is asked about, once per slide."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pathcore.files import FolderInUseError, OutputExistsError, StrPath
from pathcore.jobs import MANIFEST_NAME, WRITTEN

if TYPE_CHECKING:
    from gigapath.embed.job import EmbeddingSettings
    from pallava.inference.assistant import Assistant
    from pallava.slide_bags import SlidePreparation

_DIGEST_CHARS = 16


def reads_slide_files(
    assistant: Assistant, folder: StrPath, *, device: str | None = None
) -> Assistant:
    """Lets a whole-slide model read slides as well as files of tile features.

    Args:
        assistant: Model; a model of images is returned unchanged.
        folder: Folder of the features; see `SlideEmbedder`.
        device: Device of the tile encoder; by default a GPU if there is one.

    Example::

        model = reads_slide_files(load_model("slide_model"), "features")
        model.answer("case1.svs", "Is there necrosis?")
    """
    if assistant.reads_slides:
        embed = SlideEmbedder(assistant.anyres, Path(folder), device)
        assistant.anyres = replace(assistant.anyres, embed=embed)
    return assistant


class SlideEmbedder:
    """Finds the tissue of a slide, cuts it into tiles and computes their features.

    `folder/SLIDE.h5` is used if it exists. Otherwise features are computed in a folder whose name
    is a digest of the slide (path, size, time) and of encoder and tiles, by the job of `xtuner-add
    embed`, so that a later question finds them and an interrupted computation continues.

    Args:
        preparation: Input preparation of the model, which names encoder and tiles.
        folder: Folder of the features.
        device: Device of the tile encoder.
    """

    def __init__(
        self, preparation: SlidePreparation, folder: Path, device: str | None = None
    ) -> None:
        self.preparation = preparation
        self.folder = folder
        self.device = device
        self._lock = threading.Lock()

    def __call__(self, slide: Path) -> Path:
        """Returns the features file of a slide.

        Raises:
            SlideBagError: If the slide does not exist or cannot be embedded, if the model does not
                name its tile encoder and tiles, or if the file is of another slide of this name.
        """
        from pallava.slide_bags import SUFFIX, SlideBagError

        own = self.folder / f"{slide.stem}{SUFFIX}"
        if own.is_file():
            if slide.is_file():
                _check_own(own, slide)
            return own
        if not slide.exists():
            raise SlideBagError(f"slide {slide}: no such file")
        self._check(slide)
        with self._lock:  # one slide at a time has the encoder
            return self._embed(slide)

    def _check(self, slide: Path) -> None:
        from pallava.slide_bags import SUFFIX, SlideBagError

        origin = self.preparation.origin
        if origin.unknown:
            missing = ", ".join(origin.unknown).replace("encoder", "tile_encoder")  # their keys
            raise SlideBagError(
                f"slide {slide}: the model does not name its {missing} (config.json of "
                f"its slide token encoder); compute {self.folder / (slide.stem + SUFFIX)} by "
                "`xtuner-add embed`"
            )
        if self.preparation.slide_embedding_features:
            raise SlideBagError(
                f"slide {slide}: the model also takes a slide embedding, which is not computed "
                f"here; pass its features file, with {slide.stem}.embedding{SUFFIX} beside it"
            )

    @cached_property
    def settings(self) -> EmbeddingSettings:
        """Settings of the embedding job; reads the encoder's weights for their digest."""
        from gigapath.embed.job import MIN_TISSUE, EmbeddingSettings
        from wsi.tiling import PatchSpec

        origin = self.preparation.origin
        spec = PatchSpec(origin.patch_px, origin.mpp, min_tissue=MIN_TISSUE)
        return EmbeddingSettings.for_encoder(origin.encoder, spec=spec, pictures=False)

    def _embed(self, slide: Path) -> Path:
        from gigapath.embed.job import Placement, embed_slides
        from pallava.slide_bags import SlideBagError

        slide = slide.resolve()
        try:
            out = self.folder / self._digest(slide)
            embed_slides(
                slide,
                out,
                self.settings,
                Placement(self.device),
                retry_skipped=True,
                progress=False,
            )
            row = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8").splitlines()[0])
        except (FileNotFoundError, FolderInUseError, OutputExistsError, ValueError) as error:
            raise SlideBagError(f"slide {slide}: cannot be embedded: {error}") from error
        if row["state"] != WRITTEN:
            raise SlideBagError(f"slide {slide}: {row['reason']}: {row['detail']}")
        return out / row["features"]

    def _digest(self, slide: Path) -> str:
        state = slide.stat()
        parts = [str(slide), state.st_size, state.st_mtime_ns, asdict(self.settings)]
        content = json.dumps(parts, default=str).encode()
        return f"{slide.stem}-{hashlib.sha256(content).hexdigest()[:_DIGEST_CHARS]}"


def _check_own(features: Path, slide: Path) -> None:
    """Checks that a features file is not of another slide with the same file name."""
    from pallava.slide_bags import SlideBagError
    from wsi.reader import Slide
    from wsi.store import check_slide_px, read_attributes, slide_px_of

    try:
        with Slide(slide) as opened:
            check_slide_px(opened, slide_px_of(read_attributes(features)), f"features {features}")
    except (OSError, KeyError, ValueError) as error:
        raise SlideBagError(f"slide {slide}: {error}") from error
