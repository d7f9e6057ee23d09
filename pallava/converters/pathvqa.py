"""PathVQA (arXiv:2003.10286): open and yes/no questions about textbook figures.

Published as pickles `qas/{split}/{split}_qa.pkl` or `qas/{split}_vqa.pkl` with
`images/{split}/*.jpg`, and as parquet files `data/{split}-*.parquet` that contain the images.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pallava.converters.conversion import Conversion, Row, question_row
from pallava.records.containers import data_file, image_root, parquet_files
from pallava.records.readers import vqa_rows
from pallava.registry import CONVERTERS
from pathcore.files import StrPath

_SPLIT = re.compile(r"(?<![^\W_])(train|validation|val|test)(?![^\W_])")


@CONVERTERS.register("pathvqa")
def pathvqa(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    split: str = "",
) -> Conversion:
    """Converts PathVQA to conversations, one per question.

    Args:
        data_path: Data file in any format that `xtuner-add evaluate pathvqa` reads, folder of the
            archive with `qas/` and `images/`, or folder of parquet files.
        image_folder: Image folder. Defaults to that of the split in the archive. Not needed for
            parquet, whose images are written to `OUT/images`.
        split: `train`, `val` (in parquet: `validation`) or `test`. Defaults to the split that the
            name of a data file states, such as `test-00000-of-00003.parquet`, or else to `train`.

    Raises:
        ValueError: If the name of a data file states another split.
    """
    path = Path(data_path)
    split = _split(path, split)
    files, folder = _locate(path, Path(image_folder) if image_folder else None, split)
    records, make_question = vqa_rows(files[0] if folder else path, folder, split)

    def make(where: str, record: Any) -> list[Row]:
        row = question_row(make_question(where, record), folder)
        return [{"id": f"pathvqa-{split}-{where}", **row}]

    return Conversion(
        "conversations",
        "PathVQA",
        "MIT; images: their publishers",
        records,
        make,
        folder,
        files,
        {"split": split},
    )


def _split(path: Path, given: str) -> str:
    found = set(_SPLIT.findall(path.stem)) if path.is_file() else set()
    stated = found.pop() if len(found) == 1 else ""
    if given and stated and given[:3] != stated[:3]:  # val is validation
        raise ValueError(f"{path}: expected a file of split={given}, found one of {stated}")
    return given or stated or "train"


def _locate(path: Path, folder: Path | None, split: str) -> tuple[list[Path], Path | None]:
    """Returns the data files and, unless they are parquet, the image folder."""
    if path.suffix == ".parquet" or (path.is_dir() and not (path / "qas").is_dir()):
        return parquet_files(path, split), None
    if path.is_dir():
        names = (f"qas/{split}/{split}_qa.pkl", f"qas/{split}_vqa.pkl", f"qas/{split}_qa.pkl")
        return [data_file(path, names)], folder or path / "images" / split
    return [data_file(path, ())], folder or image_root(None, path, ("images",))
