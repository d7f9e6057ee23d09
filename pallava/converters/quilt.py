"""Quilt-1M (arXiv:2306.11207) and Quilt-Instruct (arXiv:2312.04746): frames of teaching videos.

Quilt-Instruct is `quilt_instruct_107k.json` in LLaVA's schema; its images are those of Quilt-1M.
Quilt-1M, which has further sources, is published as `quilt_1M_lookup.csv` with `caption,
image_path, subset, split, pathology, roi_text, noisy_text, corrected_text, med_umls_ids,
magnification, height, width`, and archives of images.
"""

from __future__ import annotations

from typing import Any

from pallava.converters.conversion import Conversion, Row, chosen, llava_turns
from pallava.records.containers import data_file, image_root, read_csv, read_json_rows
from pallava.records.questions import as_mapping, text_field
from pallava.registry import CONVERTERS
from pallava.text.encoding import image_files
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


@CONVERTERS.register("quilt-instruct")
def quilt_instruct(data_path: StrPath, image_folder: StrPath | None = None) -> Conversion:
    """Converts Quilt-Instruct to conversations.

    Args:
        data_path: JSON file, or its folder.
        image_folder: Folder of Quilt-1M's images. Searched beside the data by default.
    """
    data = data_file(data_path, ("quilt_instruct_107k.json",))

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        images = image_files(row)
        named = {"image": images[0] if len(images) == 1 else images} if images else {}
        own = row.get("id")
        row_id = f"quilt-instruct-{where if own is None else own}"
        return [{"id": row_id, **named, "conversations": llava_turns(row, len(images))}]

    return Conversion(
        "conversations",
        "Quilt-Instruct",
        "CC BY-NC-ND 3.0, gated",
        read_json_rows(data),
        make,
        image_root(image_folder, data, ("quilt_instruct", *IMAGE_FOLDERS)),
        [data],
        {},
    )
