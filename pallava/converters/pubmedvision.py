"""PubMedVision (arXiv:2406.19280): figures of PubMed with captions rewritten by GPT-4V.

Published as `PubMedVision_Alignment_VQA.json`, an array of `{id, image: [names], conversations,
modality, body_part}` without `<image>` tokens, and archives that unpack to `images/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pallava.converters.conversion import Conversion, Row, chosen, conversation
from pallava.records.containers import data_file, image_root, read_json_rows
from pallava.records.questions import RowError, as_mapping
from pallava.registry import CONVERTERS
from pathcore.files import StrPath

DATA_NAMES = ("PubMedVision_Alignment_VQA.json",)


@CONVERTERS.register("pubmedvision-alignment")
def pubmedvision_alignment(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    to: Literal["pairs", "conversations"] = "pairs",
    several: Literal["each", "first", "skip"] = "each",
    modality: str = "",
) -> Conversion:
    """Converts the alignment part of PubMedVision.

    Args:
        data_path: JSON file, or its folder.
        image_folder: Folder that image names are relative to. Defaults to the folder of the file.
        to: `pairs` uses the answer as the caption; `conversations` keeps the question as well.
        several: How pairs treat a row with several images: the caption goes to `each` image or to
            the `first`, or `skip` drops the row.
        modality: Comma-separated modalities to keep, such as `Microscopy Images`; all by default.
    """
    if to not in ("pairs", "conversations") or several not in ("each", "first", "skip"):
        raise ValueError(
            "pubmedvision-alignment: expected to=pairs|conversations and several=each|first|skip, "
            f"got to={to} several={several}"
        )
    data = data_file(data_path, DATA_NAMES)
    kept = chosen(modality)

    def make(where: str, record: Any) -> list[Row]:
        row = as_mapping(record)
        if kept and str(row.get("modality")).lower() not in kept:
            return []
        names, (question, answer) = _names(row), _turns(row)
        about = {name: row[name] for name in ("modality", "body_part") if row.get(name)}
        row_id = str(row.get("id") or f"pubmedvision-{where}")
        if to == "conversations":
            image = names if len(names) > 1 else names[0]
            turns = conversation(question, answer, len(names))
            return [{"id": row_id, "image": image, "conversations": turns, **about}]
        if len(names) == 1:
            return [{"id": row_id, "image": names[0], "caption": answer, **about}]
        names = {"each": names, "first": names[:1], "skip": []}[several]
        return [
            {"id": f"{row_id}-{number}", "image": name, "caption": answer, **about}
            for number, name in enumerate(names, start=1)
        ]

    return Conversion(
        to,
        "PubMedVision-Alignment",
        "Apache-2.0",
        read_json_rows(data),
        make,
        image_root(image_folder, data),
        [data],
        {"several": several, "modality": sorted(kept)},
    )


def _names(row: Mapping[str, Any]) -> list[str]:
    value = row.get("image")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RowError(f"image: expected a file name or a list of them, found {value!r:.80}")
    return names


def _turns(row: Mapping[str, Any]) -> tuple[str, str]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError("conversations: expected a list of {from, value}")
    said = dict.fromkeys(("human", "gpt"), "")
    for turn in turns:
        role, value = str(turn.get("from")), turn.get("value")
        if role in said and isinstance(value, str) and not said[role]:
            said[role] = value.strip()
    if not all(said.values()):
        raise RowError("conversations: expected a question of 'human' and an answer of 'gpt'")
    return said["human"], said["gpt"]
