"""Converts pairs to conversations: each caption answers a request to describe the image.

The request for a pair depends only on the seed and the pair's id, so neither the order of the pairs
nor the number of machines matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pallava.converters.conversion import Conversion, Row, conversation, convert
from pallava.records.containers import read_json_rows
from pallava.records.questions import RowError, as_mapping, text_field
from pallava.text.encoding import IMAGE_TOKEN
from pathcore.files import StrPath
from pathcore.images import image_size, path_inside
from pathcore.rows import MAX_SKIPPED_FRACTION

MAX_AREA_PX = 4096 * 4096
"""Maximum area of an image, as in the published script (dataformat.py of PA-LLaVA)."""

_PACKAGE = "pallava.converters.instructions"


def dataformat(
    pairs: StrPath,
    out: StrPath,
    *,
    image_folder: StrPath | None = None,
    seed: int = 0,
    instructions: Sequence[str] | None = None,
    image_position: Literal["front", "random"] = "front",
    max_area_px: int | None = MAX_AREA_PX,
    max_skipped_fraction: float = MAX_SKIPPED_FRACTION,
    part_rows: int = 10_000,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes `conversations.jsonl` from pairs; resumes after an interruption.

    Args:
        pairs: `pairs.jsonl`, or a JSON array of `{image, caption}`. A pair without `id` takes the
            name of its image, without suffix.
        out: Output folder.
        image_folder: Folder that image names are relative to. Defaults to the folder of `pairs`.
        seed: Seed that, together with a pair's id, selects its request.
        instructions: Requests to choose from. Defaults to our own list.
        image_position: `front`, or `random` to place the image before or after the request. The
            latter has an effect only with `interleaved_map_fn`, since XTuner's own function moves
            every image to the front.
        max_area_px: Maximum area of an image; larger images are skipped. None opens no image.
        max_skipped_fraction: Maximum fraction of unusable pairs; more raise an error.
        part_rows: Number of pairs between two points from which a job can resume.
        progress: Called with the number of pairs processed.

    Returns:
        The report; see `conversion.convert`.

    Raises:
        ValueError: If there are no pairs or instructions, or too many pairs cannot be used.
        FileNotFoundError: If a file or folder does not exist.
    """
    pairs = Path(pairs)
    folder = Path(image_folder) if image_folder else pairs.parent
    texts = list(instructions) if instructions is not None else load_instructions()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("instructions: expected a list of texts that are not empty")

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        image, caption = row.get("image"), text_field(row, "caption")
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            raise RowError(f"image: expected a file name, found {image!r:.80}")
        pair_id = str(row.get("id") or PurePosixPath(image).with_suffix(""))
        if max_area_px is not None:
            width_px, height_px = image_size(path_inside(folder, image))
            if width_px * height_px > max_area_px:
                return []
        turns = conversation(choose(texts, seed, pair_id), caption)
        if image_position == "random" and choose([False, True], seed, f"{pair_id} place"):
            request = turns[0]["value"].removeprefix(f"{IMAGE_TOKEN}\n")
            turns[0]["value"] = f"{request}\n{IMAGE_TOKEN}"
        about = {key: row[key] for key in row if key not in ("id", "image", "caption")}
        return [{"id": pair_id, "image": image, "conversations": turns, **about}]

    options = {
        "seed": seed,
        "instructions": texts,
        "image_position": image_position,
        "max_area_px": max_area_px,
    }
    conversion = Conversion(
        "conversations", pairs.name, "", read_json_rows(pairs), make, folder, [pairs], options
    )
    return convert(
        conversion,
        out,
        check_images=max_area_px is not None,
        max_skipped_fraction=max_skipped_fraction,
        part_rows=part_rows,
        progress=progress,
    )


def load_instructions(path: StrPath | None = None) -> list[str]:
    """Loads requests from a JSON list or a text file with one per line. Defaults to our own list.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has neither format or is empty.
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
        raise ValueError(f"{path}: expected a list of requests")
    return found


def choose(choices: Sequence[Any], seed: int, key: str) -> Any:
    """Chooses one item deterministically from seed and key, uniformly over many keys.

    Example:
        >>> choose(["a", "b", "c"], seed=0, key="x") == choose(["a", "b", "c"], seed=0, key="x")
        True
    """
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(errors="replace"), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]
