"""PMC-OA (arXiv:2303.07240): sub-figures and captions of open-access articles.

Published as `pmc_oa.jsonl` (captions split among sub-figures) and `pmc_oa_beta.jsonl` (full
captions), with `{image, caption}` per line, and `images.zip`.
"""

from __future__ import annotations

import re
from typing import Any

from pallava.converters.conversion import Conversion, Row
from pallava.records.containers import data_file, image_root, read_json_rows
from pallava.records.questions import as_mapping, text_field
from pallava.registry import CONVERTERS
from pathcore.files import StrPath

DATA_NAMES = ("pmc_oa.jsonl", "pmc_oa_beta.jsonl")
IMAGE_FOLDERS = ("images", "caption_T060_filtered_top4_sep_v0_subfigures")
LICENCE = "per article: PubMed Central Open Access subset"

_PMCID = re.compile(r"PMC\d+")


@CONVERTERS.register("pmc-oa")
def pmc_oa(data_path: StrPath, image_folder: StrPath | None = None) -> Conversion:
    """Converts PMC-OA or PMC-OA-Beta to pairs, with the article id as `pmcid`.

    Args:
        data_path: JSON lines file, or its folder.
        image_folder: Folder of the unpacked images. Searched beside the data file by default.
    """
    data = data_file(data_path, DATA_NAMES)

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        image = text_field(row, "image")
        about = article(image, row.get("pmcid"))
        caption = text_field(row, "caption")
        return [{"id": f"pmc-oa-{where}", "image": image, "caption": caption, **about}]

    images = image_root(image_folder, data, IMAGE_FOLDERS)
    return Conversion("pairs", "PMC-OA", LICENCE, read_json_rows(data), make, images, [data], {})


def article(image: str, pmcid: object = None) -> dict[str, str]:
    """Returns the article of a figure as `{"pmcid": ...}`, from the record or the file name."""
    found = _PMCID.search(str(pmcid or "")) or _PMCID.search(image)
    return {"pmcid": found.group()} if found else {}
