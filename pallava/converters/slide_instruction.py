"""SlideInstruction (SlideChat, arXiv:2410.11761): captions of and questions about whole slides.

Published as `SlideInstruct_train_stage1_caption.json` and `SlideInstruct_train_stage2_vqa.json` in
LLaVA's schema, where `image` is a list of one table of features, `["SLIDE.csv"]`, and the image
token is at the end of the question.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pallava.converters.conversion import Conversion, Row, llava_turns
from pallava.records.containers import data_file, image_root, read_json_rows
from pallava.records.questions import RowError, as_mapping
from pallava.registry import CONVERTERS
from pallava.text.encoding import image_files
from pathcore.files import StrPath

FILES = {
    "1": "SlideInstruct_train_stage1_caption.json",
    "2": "SlideInstruct_train_stage2_vqa.json",
}


@CONVERTERS.register("slide-instruction")
def slide_instruction(
    data_path: StrPath, image_folder: StrPath | None = None, *, stage: str = "2"
) -> Conversion:
    """Converts SlideInstruction to conversations about slides, as slide models are trained on.

    Args:
        data_path: JSON file, or the folder of both.
        image_folder: Folder of `SLIDE.h5` files of tile features. Defaults to `features/` beside
            the data. Rows whose slide has none are skipped, unless images are not checked.
        stage: `1` for captions, `2` for questions.

    Raises:
        ValueError: If the stage is neither.
    """
    if stage not in FILES:
        raise ValueError(f"slide-instruction: expected stage=1|2, found {stage}")
    data = data_file(data_path, (FILES[stage],))

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        names = image_files(row)
        if len(names) != 1:
            raise RowError(f"image: expected one slide, found {row.get('image')!r:.80}")
        path = PurePosixPath(names[0])
        slide = str(path.with_suffix("")) if path.suffix in (".csv", ".h5", ".svs") else names[0]
        row_id = str(row.get("id") or f"slide-instruction-{stage}-{where}")
        return [{"id": row_id, "slide": slide, "conversations": llava_turns(row, 1)}]

    return Conversion(
        "conversations",
        "SlideInstruction",
        "see its page at huggingface.co",
        read_json_rows(data),
        make,
        image_root(image_folder, data, ("features",)),
        [Path(data)],
        {"stage": stage},
        image_field="slide",
    )
