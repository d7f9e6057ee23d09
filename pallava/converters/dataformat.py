"""Pairs to conversations: each caption becomes the answer to a request to describe the image.

Which request a pair gets follows from the seed and the pair's id alone, so that neither the order
of the pairs nor the number of machines matters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pallava.converters.conversion import Conversion, Row, conversation, convert
from pallava.converters.sources import as_mapping, read_json_rows
from pallava.evaluation.questions import RowError, text_field
from pallava.image_index import path_inside
from pallava.rows import MAX_SKIPPED_SHARE
from pallava.text.encoding import IMAGE_TOKEN
from pathcore.images import image_size

MAX_AREA_PX = 4096 * 4096
"""Larger images are left out, as by the published script (dataformat.py of PA-LLaVA)."""

_PACKAGE = "pallava.converters.instructions"


def dataformat(
    pairs: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    instructions: Sequence[str] | None = None,
    image_place: Literal["front", "random"] = "front",
    max_area_px: int | None = MAX_AREA_PX,
    max_skipped_share: float = MAX_SKIPPED_SHARE,
    part_rows: int = 10_000,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `conversations.jsonl` from pairs; continues after a kill.

    Args:
        pairs: `pairs.jsonl`, or a JSON array of `{image, caption}`; without `id`, the image's name
            without its suffix is the id.
        out: Folder of the outputs.
        image_folder: What the images' names are relative to; by default the pairs' folder.
        seed: Decides, with a pair's id, which request it gets.
        instructions: The requests; by default our own list.
        image_place: `front`, or before or after the request by the seed (which matters only with
            `interleaved_map_fn`; XTuner's own function moves every image to the front).
        max_area_px: Leave larger images out; None opens no image.
        max_skipped_share: More unusable pairs than this share are an error.
        part_rows: Pairs between two points from which a later run continues.
        progress: Called with the numbers of pairs done.

    Returns:
        The report, as of `conversion.convert`.

    Raises:
        ValueError: No pairs, too many unusable, or no instructions.
        FileNotFoundError: No such file or folder.
    """
    pairs = Path(pairs)
    folder = Path(image_folder) if image_folder else pairs.parent
    texts = list(instructions) if instructions is not None else load_instructions()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("instructions: a list of texts that are not empty expected")

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        image, caption = row.get("image"), text_field(row, "caption")
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            raise RowError(f"image: a file name expected, got {image!r:.80}")
        pair_id = str(row.get("id") or PurePosixPath(image).with_suffix(""))
        if max_area_px is not None:
            width_px, height_px = image_size(path_inside(folder, image))
            if width_px * height_px > max_area_px:
                return []
        turns = conversation(choose(texts, seed, pair_id), caption)
        if image_place == "random" and choose([False, True], seed, f"{pair_id} place"):
            request = turns[0]["value"].removeprefix(f"{IMAGE_TOKEN}\n")
            turns[0]["value"] = f"{request}\n{IMAGE_TOKEN}"
        about = {key: row[key] for key in row if key not in ("id", "image", "caption")}
        return [{"id": pair_id, "image": image, "conversations": turns, **about}]

    options = {
        "seed": seed,
        "instructions": texts,
        "image_place": image_place,
        "max_area_px": max_area_px,
    }
    conversion = Conversion(
        "conversations", pairs.name, "", read_json_rows(pairs), make, folder, [pairs], options
    )
    return convert(
        conversion,
        out,
        check_images=max_area_px is not None,
        max_skipped_share=max_skipped_share,
        part_rows=part_rows,
        progress=progress,
    )


def load_instructions(path: str | os.PathLike[str] | None = None) -> list[str]:
    """Reads requests: a JSON list, or a text file with one a line; by default our own.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Neither form, or empty.
    """
    if path is None:
        text = (resources.files(_PACKAGE) / "describe.json").read_text(encoding="utf-8")
        return list(json.loads(text))
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        found: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(t, str) for t in found):
        raise ValueError(f"{path}: a list of requests expected")
    return found


def choose(choices: Sequence[Any], seed: int, key: str) -> Any:
    """Picks one of several, by seed and key alone; each equally often over many keys."""
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(errors="replace"), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]
