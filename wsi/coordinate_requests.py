"""A folder of coordinate files as patches to extract."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pathcore.files import UnsafeNameError, check_name
from wsi.request_table import PatchRequest, RejectedRow
from wsi.store import read_coordinates

_NAME_ROOM_BYTES = len("_-2147483648_-2147483648.webp")


def read_coordinate_folder(
    folder: str | os.PathLike[str],
) -> Iterator[PatchRequest | RejectedRow]:
    """Reads the coordinates of all slides, written here, by TRIDENT or by CLAM.

    Args:
        folder: Holds one `.h5` file per slide.

    Yields:
        A patch per coordinate; a file that cannot be used counts as one bad row.

    Raises:
        FileNotFoundError: No such folder, or no `.h5` file in it.
    """
    paths = sorted(Path(folder).glob("*.h5"))
    if not paths:
        raise FileNotFoundError(f"coordinates {folder}: no folder with .h5 files")
    number = 0
    for path in paths:
        try:
            found = read_coordinates(path)
            slide_id = check_name(found.name, room_bytes=_NAME_ROOM_BYTES)
        except (ValueError, UnsafeNameError) as error:
            number += 1
            yield RejectedRow(number, "bad coordinates file", str(error))
            continue
        for x, y in found.coords.tolist():
            number += 1
            yield PatchRequest(number, slide_id, x, y, found.size_level0, found.patch_px)
