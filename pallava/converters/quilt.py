"""Quilt-1M (arXiv:2306.11207): frames of teaching videos and other sources with their captions.

Published as `quilt_1M_lookup.csv` with `caption, image_path, subset, split, pathology, roi_text,
noisy_text, corrected_text, med_umls_ids, magnification, height, width`, and archives of images.
"""

from __future__ import annotations

from typing import Any

from pallava.converters.conversion import Conversion, Row, chosen
from pallava.records.containers import data_file, image_root, read_csv
from pallava.records.questions import as_mapping, text_field
from pallava.registry import CONVERTERS
from pathcore.files import StrPath

DATA_NAMES = ("quilt_1M_lookup.csv",)
IMAGE_FOLDERS = ("quilt_1m", "images")
PROVENANCE = ("subset", "split", "pathology", "magnification")


@CONVERTERS.register("quilt-1m")
def quilt_1m(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    subsets: str = "",
    split: str = "",
) -> Conversion:
    """Converts Quilt-1M to pairs.

    Args:
        data_path: CSV file, or its folder.
        image_folder: Folder of the unpacked images. Searched beside the CSV by default.
        subsets: Comma-separated subsets to keep: `quilt`, `openpath`, `pubmed`, `laion`; all by
            default.
        split: Split to keep, `train` or `val`; both by default.
    """
    data = data_file(data_path, DATA_NAMES)
    kept = {"subset": chosen(subsets), "split": chosen(split)}

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        if any(names and str(row.get(key)).lower() not in names for key, names in kept.items()):
            return []
        about = {name: row[name].strip() for name in PROVENANCE if (row.get(name) or "").strip()}
        return [
            {
                "id": f"quilt-1m-{where}",
                "image": text_field(row, "image_path"),
                "caption": text_field(row, "caption"),
                **about,
            }
        ]

    return Conversion(
        "pairs",
        "Quilt-1M",
        "research use, see the terms of its record at zenodo.org",
        read_csv(data),
        make,
        image_root(image_folder, data, IMAGE_FOLDERS),
        [data],
        {key: sorted(names) for key, names in kept.items()},
    )
