"""Writes the manifest with which the GDC's data transfer tool downloads the slides of annotations.

PathGen's slides are from TCGA. The transfer tool downloads them by UUID, which annotations do not
contain: it is looked up in a manifest saved from the GDC portal, or requested from the GDC.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from pathcore.files import StrPath, write_text
from pathcore.rows import read_csv
from pathgen.annotations import read_annotations
from wsi.requests import PatchRequest

GDC_URL = "https://api.gdc.cancer.gov"
COLUMNS = ("id", "filename", "md5", "size", "state")
"""Columns of a manifest: https://docs.gdc.cancer.gov/Data_Transfer_Tool/Users_Guide/Preparing_for_Data_Download_and_Upload/"""

_BATCH = 200  # slides per query
_TIMEOUT_S = 60
_SUFFIX = ".svs"
_LISTING = "manifest of the GDC portal"


@dataclass(frozen=True)
class GdcFile:
    """One line of a manifest."""

    id: str
    filename: str
    md5: str
    size: str
    state: str


def needed_slides(annotations: StrPath) -> tuple[set[str], Counter[str]]:
    """Reads which slides a file of annotations asks for.

    Returns:
        The ids of the slides, and the number of invalid rows by reason.
    """
    slides, rejected = set(), Counter[str]()
    for row in read_annotations(annotations):
        if isinstance(row, PatchRequest):
            slides.add(row.slide_id)
        else:
            rejected[row.reason] += 1
    return slides, rejected


def read_listing(path: StrPath) -> Iterator[GdcFile]:
    """Reads a tab-separated manifest, as the GDC portal saves it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing.
    """
    for _, row in read_csv(path, columns=("id", "filename"), delimiter="\t", what=_LISTING):
        yield GdcFile(*(row.get(name) or "" for name in COLUMNS))


def ask_gdc(slide_ids: Iterable[str], *, url: str = GDC_URL) -> Iterator[GdcFile]:
    """Requests the entries of slides from the GDC, a few hundred at a time.

    Args:
        slide_ids: Ids as in annotations.
        url: Address of the GDC's API.

    Raises:
        ConnectionError: If the GDC does not answer, or the answer is invalid.
    """
    iterator = iter(sorted(slide_ids))
    while batch := list(islice(iterator, _BATCH)):
        names = [f"{slide_id}{_SUFFIX}" for slide_id in batch]
        query = {
            "filters": {"op": "in", "content": {"field": "file_name", "value": names}},
            "fields": "file_id,file_name,md5sum,file_size,state",
            "size": 2 * _BATCH,
        }
        request = urllib.request.Request(
            f"{url}/files",
            data=json.dumps(query).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                hits = json.load(reply)["data"]["hits"]
            for hit in hits:
                yield GdcFile(
                    id=str(hit["file_id"]),
                    filename=str(hit["file_name"]),
                    md5=str(hit["md5sum"]),
                    size=str(hit["file_size"]),
                    state=str(hit.get("state", "")),
                )
        except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConnectionError(f"{url}/files: no valid answer ({error!r})") from error


def write_manifest(path: StrPath, slide_ids: Iterable[str], files: Iterable[GdcFile]) -> list[str]:
    """Writes the manifest of slides.

    Args:
        path: The manifest.
        slide_ids: The slides that are needed.
        files: Files of the GDC, of other slides too.

    Returns:
        The ids of the slides that are not among the files, sorted.
    """
    wanted = set(slide_ids)
    found: Mapping[str, GdcFile] = {
        file.filename: file for file in files if file.filename.removesuffix(_SUFFIX) in wanted
    }
    lines = ["\t".join(COLUMNS)]
    for name in sorted(found):
        file = found[name]
        lines.append("\t".join(getattr(file, column) for column in COLUMNS))
    write_text(path, "\n".join(lines) + "\n")
    return sorted(wanted - {name.removesuffix(_SUFFIX) for name in found})
