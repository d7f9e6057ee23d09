"""Image-caption sets that users assemble from several parts: PathCap, OpenPath, ARCH."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pallava.converters.conversion import Conversion, Record, Row
from pallava.records.containers import data_file, image_root, read_csv, read_records
from pallava.records.questions import RowError, as_mapping, text_field
from pallava.registry import CONVERTERS
from pathcore.files import StrPath
from pathcore.rows import BadRow

_IMAGE_FIELDS = ("image", "img", "image_path", "image_name", "file_name", "filename")
_CAPTION_FIELDS = ("caption", "text", "title")


@CONVERTERS.register("pathcap")
def pathcap(data_path: StrPath, image_folder: StrPath | None = None) -> Conversion:
    """Converts PathCap (arXiv:2305.15072) to pairs.

    Args:
        data_path: JSON, JSON lines or CSV file, or a folder with `captions.json` or `pathcap.json`:
            records with an image name (`image`, `img`, `image_path`, ...) and a `caption`, or an
            object `image name -> caption`.
        image_folder: Folder of the unpacked images. Searched beside the data by default.
    """
    data = data_file(data_path, ("captions.json", "pathcap.json", "PathCap.json", "captions.csv"))
    folder = image_root(image_folder, data, ("images", "PathCap", "pathcap"))
    return _pairs("pathcap", "PathCap", "CC BY-NC 2.0, gated", data, folder)


@CONVERTERS.register("openpath")
def openpath(data_path: StrPath, image_folder: StrPath | None = None) -> Conversion:
    """Converts OpenPath (doi:10.1038/s41591-023-02504-3) to pairs.

    It is published as ids of posts, whose texts and pictures each user collects.

    Args:
        data_path: CSV, JSON or JSON lines of the collected posts: a `caption` or `text`, and an
            image name or the id of the post (`tw_id`, `tweet_id`, `id`, or the end of `weblink`),
            after which its picture is named.
        image_folder: Folder of the pictures. Searched beside the data by default.
    """
    data = data_file(data_path, ("openpath.csv", "openpath.json", "openpath.jsonl"))
    folder = image_root(image_folder, data, ("images", "openpath"))
    return _pairs("openpath", "OpenPath", "terms of the platform", data, folder)


@CONVERTERS.register("arch")
def arch(
    data_path: StrPath, image_folder: StrPath | None = None, *, sets: str = "books_set,pubmed_set"
) -> Conversion:
    """Converts ARCH (arXiv:2103.05121) to pairs.

    Args:
        data_path: Folder with `books_set/` and `pubmed_set/`, or one of the two; each has
            `captions.json` and `images/`, whose files are named after the `uuid` of the caption.
        image_folder: Folder that holds the sets, if it is not `data_path`.
        sets: Comma-separated sets to read, of those that are there.

    Raises:
        FileNotFoundError: If no set is there.
    """
    root = Path(data_path)
    names = [name.strip() for name in sets.split(",") if name.strip()]
    if (root / "captions.json").is_file():
        root, names = root.parent, [root.name]
    files = {
        name: root / name / "captions.json"
        for name in names
        if (root / name / "captions.json").is_file()
    }
    if not files:
        raise FileNotFoundError(f"{root}: no captions.json in {', '.join(names)}")

    def records() -> Iterator[Record]:
        for name, file in files.items():
            yield from ((f"{name}/{where}", row) for where, row in read_records(file))

    def make(where: str, record: Any) -> list[Row]:
        row, name = as_mapping(record), where.split("/")[0]
        uuid = text_field(row, "uuid")
        about = {key: str(row[key]) for key in ("figure_id", "letter") if row.get(key)}
        pair = {"image": f"{name}/images/{uuid}", "caption": text_field(row, "caption")}
        return [{"id": f"arch-{uuid}", **pair, "subset": name, **about}]

    return Conversion(
        "pairs",
        "ARCH",
        "CC BY-NC-SA 4.0",
        records(),
        make,
        Path(image_folder) if image_folder else root,
        list(files.values()),
        {"sets": names},
    )


def _pairs(name: str, source: str, licence: str, data: Path, folder: Path) -> Conversion:
    def make(where: str, record: Any) -> list[Row]:
        is_caption = isinstance(record, str) and not isinstance(record, BadRow)
        row = {"image": where, "caption": record} if is_caption else record
        pair = {"image": _image(as_mapping(row)), "caption": text_field(row, *_CAPTION_FIELDS)}
        return [{"id": f"{name}-{where}", **pair}]

    records = read_csv(data) if data.suffix == ".csv" else read_records(data)
    return Conversion("pairs", source, licence, records, make, folder, [data], {})


def _image(row: Mapping[str, Any]) -> str:
    for name in _IMAGE_FIELDS:
        if isinstance(row.get(name), str) and row[name].strip():
            return str(row[name]).strip()
    for name in ("tw_id", "tweet_id", "id", "weblink"):
        if row.get(name):
            return PurePosixPath(str(row[name]).strip().rstrip("/").split("?")[0]).name
    raise RowError(f"{_IMAGE_FIELDS[0]}: expected an image name, found {sorted(row)[:8]}")
