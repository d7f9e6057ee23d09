"""Reads tile embeddings as published: a zip or folder of `.pt` files with one tensor each.

Entries of a zip are read in memory, so names in the archive never become paths. They are loaded
with torch's restricted unpickler.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathcore.files import StrPath
from pathcore.label_tables import is_missing

SPLITS = ("train", "val", "test")

ENTRY_LIMIT_BYTES = 16 << 20
"""Maximum size of an entry. An embedding takes kilobytes, but `torch.save` of a view also saves the
storage that it is a view of."""

_COLUMNS = ("input", "label", "split")
_NUM_PEEKED = 101
"""Number of embeddings that are read to find the usual width."""


class EntryError(ValueError):
    """Raised if an embedding cannot be used; the message is the `reason` in `skipped.jsonl`."""


class EmbeddingArchive:
    """Context manager for the `.pt` entries of a zip or folder.

    Args:
        path: The zip or folder.

    Attributes:
        entries: Paths of the entries by name without suffix; a name may occur in several folders.

    Raises:
        FileNotFoundError: If `path` does not exist.
        ValueError: If it is neither a zip nor a folder, or has no `.pt` files.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if self.path.is_dir():
            files = (p for p in sorted(self.path.rglob("*.pt")) if p.is_file())
            names = [file.relative_to(self.path).as_posix() for file in files]
        elif self.path.is_file():
            names = self._open_zip()
        else:
            raise FileNotFoundError(f"embeddings {self.path}: no such zip or folder")
        self.entries: dict[str, list[str]] = {}
        for name in names:
            if name.endswith(".pt"):
                self.entries.setdefault(PurePosixPath(name).stem, []).append(name)
        if not self.entries:
            raise ValueError(
                f"embeddings {self.path}: holds no .pt, only {names[:3]}; of a download that "
                "broke off only the last entry can be seen"
            )

    def __enter__(self) -> EmbeddingArchive:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def find(self, name: str, split: str) -> str:
        """Returns the entry for a row of the table.

        If several entries have the same name, the one in a folder named after the split is chosen.

        Raises:
            EntryError: If the entry does not exist, or the choice is ambiguous.
        """
        found = self.entries.get(PurePosixPath(name).name.removesuffix(".pt"), [])
        if len(found) > 1:
            found = [n for n in found if split in PurePosixPath(n).parts[:-1]]
        if len(found) != 1:
            raise EntryError("no embedding" if not found else f"{len(found)} embeddings")
        return found[0]

    def read(self, entry: str) -> Tensor:
        """Reads an embedding as float32 `(embed_dim,)`.

        Raises:
            EntryError: If the entry is damaged, too large, not a vector, or not finite.
        """
        value = load_tensors(self._bytes(entry))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise EntryError(f"expected a float tensor, found {type(value).__name__}")
        vector = value.squeeze().float()
        if vector.ndim != 1:
            raise EntryError(f"expected one vector, found shape {tuple(value.shape)}")
        if not torch.isfinite(vector).all():
            raise EntryError("infinities or NaN")
        return vector

    def table(self) -> bytes | None:
        """Returns the content of the csv in the zip or folder; None if there is not exactly one."""
        if self._zip is None:
            files = sorted(self.path.rglob("*.csv"))
            return files[0].read_bytes() if len(files) == 1 else None
        names = [name for name in self._zip.namelist() if name.endswith(".csv")]
        return self._zip.read(names[0]) if len(names) == 1 else None

    def _open_zip(self) -> list[str]:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"embeddings {self.path}: {error}; expected a zip or a folder of .pt. A download "
                "that broke off gives this too"
            ) from error
        return self._zip.namelist()

    def _bytes(self, entry: str) -> bytes:
        try:
            if self._zip is None:
                size = (self.path / entry).stat().st_size
            else:
                size = self._zip.getinfo(entry).file_size
            if size > ENTRY_LIMIT_BYTES:
                raise EntryError(f"{size} bytes; expected at most {ENTRY_LIMIT_BYTES}")
            return (self.path / entry).read_bytes() if self._zip is None else self._zip.read(entry)
        except EntryError:
            raise
        # zipfile has no common base class for damaged data, wrong checksums, passwords and unknown
        # compression methods.
        except Exception as error:
            raise EntryError(f"cannot be read: {error}") from error


def load_tensors(content: bytes, limit_bytes: int = ENTRY_LIMIT_BYTES) -> Any:
    """Loads the content of a file of tensors without executing code.

    Raises:
        EntryError: If it is not a file of tensors, contains other objects, or inflates to more than
            `limit_bytes`.
    """
    try:
        # torch.load inflates without a limit, so the declared sizes are checked first.
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as inner:
                size = sum(info.file_size for info in inner.infolist())
            if size > limit_bytes:
                raise EntryError(f"{size} bytes inflated; expected at most {limit_bytes}")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except EntryError:
        raise
    # Crafted or damaged bytes make the unpickler raise exceptions of any type.
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise EntryError(f"not a file of tensors: {type(error).__name__}: {first}") from error


@dataclass(frozen=True)
class EmbeddingSplit:
    """Embeddings of one split.

    Attributes:
        ids: Values of the column `input`.
        features: float32 `(num_tiles, embed_dim)`.
        labels: int64 `(num_tiles,)`, indices into `EmbeddingData.classes`.
    """

    ids: tuple[str, ...]
    features: Tensor
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddingData:
    """Labelled tile embeddings.

    Attributes:
        classes: Labels that occur; numbers are sorted as numbers, other labels alphabetically.
        splits: Embeddings of `train`, `val`, which may be empty, and `test`.
        skipped: `id`, `split` and `reason` of skipped rows.
        num_without_row: Number of embeddings that the table does not name.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, EmbeddingSplit]
    skipped: tuple[dict[str, str], ...]
    num_without_row: int


def read_embeddings(
    path: StrPath,
    table: StrPath | None = None,
    *,
    embed_dim: int | None = None,
    progress: bool = True,
) -> EmbeddingData:
    """Reads labelled tile embeddings into memory.

    Args:
        path: Zip or folder of `.pt` files.
        table: csv with columns `input` (name of a `.pt` file), `label`, and `split` (train, test
            and, optionally, val); by default the only csv in `path`.
        embed_dim: Width of the embeddings; by default the width that most of the first 101 have.
        progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If embeddings or table do not exist.
        ValueError: If the table lacks a column or gives an embedding two splits or labels, there
            are fewer than two classes, or a split has no usable embeddings; `val` may be absent
            from the table.
    """
    from tqdm import tqdm

    with EmbeddingArchive(path) as archive:
        rows = read_labels(archive.table() if table is None else table, archive.path)
        named = {PurePosixPath(row["input"]).name.removesuffix(".pt") for row in rows}
        good, skipped = sort_rows(rows, archive.find, table or archive.path)
        classes = class_names(row["label"] for row in good)
        if len(classes) < 2:
            raise ValueError(f"table {table}: expected at least two labels, found {list(classes)}")
        width = embed_dim or _usual_width(archive, good)
        number = {label: index for index, label in enumerate(classes)}
        splits = {}
        with tqdm(total=len(good), desc="embeddings", disable=not progress) as bar:
            for split in SPLITS:
                own = [row for row in good if row["split"] == split]
                splits[split] = _read_split(archive, own, width, number, skipped, bar)
        for split, found in splits.items():
            if not found.ids and (split != "val" or any(row["split"] == split for row in rows)):
                raise ValueError(
                    f"embeddings {path}: none of split {split} can be used; the table has "
                    f"{sum(row['split'] == split for row in rows)} rows of it, first fault: "
                    f"{next((s for s in skipped if s['split'] == split), None)}"
                )
        return EmbeddingData(classes, splits, tuple(skipped), len(set(archive.entries) - named))


def read_labels(table: StrPath | bytes | None, embeddings: StrPath) -> list[dict[str, str]]:
    """Reads the rows of a table of labels: `input`, `label` and `split`.

    Args:
        table: The csv, or its content; None if there is none.
        embeddings: Path of what the rows name, for error messages.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If it cannot be read or lacks a column.
    """
    import pandas as pd

    if table is None:
        raise FileNotFoundError(
            f"embeddings {embeddings}: hold no single csv with the labels; name one"
        )
    name = embeddings if isinstance(table, bytes) else table
    if not isinstance(table, bytes) and not Path(table).is_file():
        raise FileNotFoundError(f"table {table}: no such file")
    source: Any = io.BytesIO(table) if isinstance(table, bytes) else table
    try:
        frame = pd.read_csv(source, dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"table {name}: cannot be read: {error}") from error
    if absent := [column for column in _COLUMNS if column not in frame.columns]:
        raise ValueError(f"table {name}: no columns {absent}, only {list(frame.columns)}")
    return [
        {key: str(value).strip() for key, value in zip(_COLUMNS, values, strict=True)}
        for values in frame[list(_COLUMNS)].itertuples(index=False)
    ]


def sort_rows(
    rows: Sequence[dict[str, str]], find: Callable[[str, str], object], source: object
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Separates the rows that can be used from those that cannot, with the reason.

    Args:
        rows: See `read_labels`.
        find: Maps `input` and `split` to what the row names, such as a file, or raises ValueError
            or OSError; the row is kept then.
        source: Path of the table, for error messages.

    Raises:
        ValueError: If rows of two splits, or of two labels, name the same file.
    """
    good, skipped = [], []
    seen: dict[object, dict[str, str]] = {}
    for row in rows:
        reason = ""
        if is_missing(row["label"]):
            reason = "no label"
        elif row["split"] not in SPLITS:
            reason = f"split {row['split']!r}: expected {', '.join(SPLITS)}"
        elif (first := seen.setdefault(_named(row, find), row)) is not row:
            reason = "named twice"
            for key in ("split", "label"):
                if row[key] != first[key]:
                    raise ValueError(
                        f"table {source}: {key} of input {row['input']!r}: {row[key]!r} here, "
                        f"{first[key]!r} in the row of {first['input']!r}, which names the same "
                        "file; keep one of the rows"
                    )
        if reason:
            skipped.append({"id": row["input"], "split": row["split"], "reason": reason})
        else:
            good.append(row)
    return good, skipped


def _named(row: Mapping[str, str], find: Callable[[str, str], object]) -> object:
    try:
        return find(row["input"], row["split"])
    except (ValueError, OSError):
        return row["input"], row["split"]


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Returns the different labels: numbers in their order, then the others alphabetically.

    Example:
        >>> class_names(["tumour", "10", "2.5", "-1", "2"])
        ('-1', '2', '2.5', '10', 'tumour')
    """

    def order(name: str) -> tuple[bool, float, str]:
        try:
            number = float(name)
        except ValueError:
            number = math.inf
        return (False, number, name) if math.isfinite(number) else (True, 0.0, name)

    return tuple(sorted(set(labels), key=order))


def _usual_width(archive: EmbeddingArchive, rows: Sequence[dict[str, str]]) -> int:
    def widths() -> Iterator[int]:
        for row in rows:
            try:
                yield len(archive.read(archive.find(row["input"], row["split"])))
            except EntryError:
                continue

    found = Counter(islice(widths(), _NUM_PEEKED)).most_common(1)
    if not found:
        raise ValueError(f"embeddings {archive.path}: none that the table names can be read")
    return found[0][0]


def _read_split(
    archive: EmbeddingArchive,
    rows: Sequence[dict[str, str]],
    width: int,
    number: Mapping[str, int],
    skipped: list[dict[str, str]],
    bar: Any,
) -> EmbeddingSplit:
    features = torch.empty(len(rows), width)
    ids: list[str] = []
    labels: list[int] = []
    for row in rows:
        bar.update()
        try:
            vector = archive.read(archive.find(row["input"], row["split"]))
            if len(vector) != width:
                raise EntryError(f"{len(vector)} values; expected {width}")
        except EntryError as error:
            skipped.append({"id": row["input"], "split": row["split"], "reason": str(error)})
            continue
        features[len(ids)] = vector
        ids.append(row["input"])
        labels.append(number[row["label"]])
    return EmbeddingSplit(tuple(ids), features[: len(ids)], np.array(labels, dtype=np.int64))
