"""Image-caption pairs as WebDataset shards, which open_clip's trainer reads.

Pairs of `pairs.jsonl` are shuffled over the whole file, since neighbouring rows come from one slide
and would be each other's negatives, and distributed evenly. Each image is decoded once, so that a
bad one is recorded before training rather than during it. Shards appear whole or not at all, and a
killed run continues after the last one. Existing shards are read in place.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pathcore.files import StrPath, atomic_file, folder_lock, write_json
from pathcore.images import is_plain, path_inside
from pathcore.pool import Engine, run_tasks
from pathcore.rgb import to_rgb
from pathcore.rows import BadRow, line_offsets, parse_line

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
"""Suffixes that open_clip's pipeline reads as images in a shard."""

INDEX_NAME = "shards.index.json"
PAIRS_PER_SHARD = 2000

_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_UNUSABLE = ("{", "}", "::")


@dataclass(frozen=True)
class ShardSet:
    """Shards to train on.

    Attributes:
        paths: Paths of the shards.
        num_pairs: Number of pairs in each shard.
        skipped: `id` or `shard`, and `reason`, of everything that was skipped.
    """

    paths: tuple[Path, ...]
    num_pairs: tuple[int, ...]
    skipped: tuple[dict[str, Any], ...] = ()

    @property
    def total(self) -> int:
        """Number of pairs in all shards."""
        return sum(self.num_pairs)

    @property
    def urls(self) -> str:
        """Shards as one argument of open_clip's trainer."""
        bad = next((path for path in self.paths if any(m in str(path) for m in _UNUSABLE)), None)
        if bad is not None:
            raise ValueError(
                f"shard {bad}: open_clip reads braces and '::' in paths as lists; rename the folder"
            )
        return "::".join(str(path.absolute()) for path in self.paths)

    def check(self, batch_size: int, num_readers: int) -> None:
        """Checks that every reading process of every rank can fill a batch.

        Shards go to ranks and data workers in turn. A worker whose shards hold less than a batch
        yields nothing, and with several ranks the others then wait for it forever.

        Args:
            batch_size: Batch size per process.
            num_readers: Number of processes times data workers per process.

        Raises:
            ValueError: If there are too few shards, or too few pairs in them.
        """
        if len(self.paths) < num_readers:
            raise ValueError(
                f"{len(self.paths)} shards for {num_readers} readers (processes x workers): each "
                "needs one at least; lower `workers`, or train from pairs.jsonl, which is cut as "
                "needed"
            )
        fewest = sum(sorted(self.num_pairs)[: len(self.paths) // num_readers])
        if fewest < batch_size:
            raise ValueError(
                f"a batch of {batch_size} pairs, but a reader may get shards of {fewest} pairs "
                f"only ({self.total} pairs, {num_readers} readers): lower `batch_size` or `workers`"
            )


def prepare_shards(
    data: StrPath,
    work_dir: StrPath,
    *,
    image_folder: StrPath | None = None,
    num_readers: int = 1,
    num_processes: int = 1,
    seed: int = 0,
) -> ShardSet:
    """Finds existing shards, or makes them from `pairs.jsonl`.

    Args:
        data: A folder of `.tar` shards (or with a subfolder `shards/`), or a `.jsonl` file.
        work_dir: Folder for the index and for new shards.
        image_folder: Folder of the images of a `.jsonl` file; by default the folder of that file.
        num_readers: Minimum number of shards to make.
        num_processes: Number of processes that make shards.
        seed: Seed of the order of pairs.

    Raises:
        FileNotFoundError: If `data` does not exist, or holds no shards.
        ValueError: If no pair can be used, or another run is writing to `work_dir`.
    """
    data, work_dir = Path(data), Path(work_dir)
    if data.is_dir():
        work_dir.mkdir(parents=True, exist_ok=True)
        return index_shards(data, work_dir / INDEX_NAME)
    if not data.is_file():
        raise FileNotFoundError(f"{data}: neither pairs in JSON lines nor a folder of shards")
    folder = Path(image_folder) if image_folder is not None else data.parent
    work_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(work_dir / ".lock"):
        return _pack(data.absolute(), folder.absolute(), work_dir, num_readers, num_processes, seed)


def find_shards(folder: Path) -> list[Path]:
    """Returns the shards in a folder or in its subfolder `shards/`, sorted."""
    return sorted(folder.glob("*.tar")) or sorted((folder / "shards").glob("*.tar"))


def index_shards(folder: Path, index_file: Path) -> ShardSet:
    """Counts the pairs in each shard of a folder; shards in the index are not read again.

    Raises:
        FileNotFoundError: If there are no shards.
        ValueError: If the trainer would find no pair.
    """
    paths = find_shards(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: holds no .tar shards, nor does a folder shards in it")
    known = json.loads(index_file.read_text(encoding="utf-8")) if index_file.is_file() else {}
    rows: dict[str, dict[str, Any]] = {}
    for path in tqdm(paths, desc="Counting pairs", unit="shard", disable=len(paths) < 20):
        status = path.stat()
        identity = [status.st_size, status.st_mtime_ns]
        row = known.get(str(path.absolute()))
        if row is None or row["identity"] != identity or "num_lost" not in row:
            row = {"identity": identity, **_count(path)}
        rows[str(path.absolute())] = row
    write_json(index_file, rows)
    skipped = [{"shard": n, "reason": r["error"]} for n, r in rows.items() if "error" in r]
    good = {name: row["num_pairs"] for name, row in rows.items() if row["num_pairs"]}
    if not good:
        raise ValueError(f"{folder}: no shard with pairs of image and .txt: {skipped[:1]}")
    return ShardSet(tuple(map(Path, good)), tuple(good.values()), tuple(skipped))


def _count(path: Path) -> dict[str, Any]:
    """Counts the pairs of a shard that the trainer finds: it joins neighbouring files only."""
    from open_clip_train.data import filter_no_caption_or_no_image, group_by_keys_nothrow

    found, num_pairs = set(), 0
    suffixes: dict[str, dict[str, None]] = {}  # of all files of a name, neighbours or not
    try:
        with tarfile.open(path) as tar:
            files = ({"fname": m.name, "data": b"", "__url__": ""} for m in tar if m.isreg())
            for sample in group_by_keys_nothrow(files):
                suffixes.setdefault(sample["__key__"], {}).update(dict.fromkeys(sample))
                if filter_no_caption_or_no_image(sample):
                    found.add(sample["__key__"])
                    num_pairs += 1
    except (tarfile.TarError, OSError) as error:
        return {"num_pairs": 0, "num_lost": 0, "error": f"cannot be read to its end: {error}"}
    lost = [k for k, s in suffixes.items() if k not in found and filter_no_caption_or_no_image(s)]
    row: dict[str, Any] = {"num_pairs": num_pairs, "num_lost": len(lost)}
    if lost:
        row["error"] = (
            f"pairs lost: {len(lost)}, first {lost[0]}: image and .txt are not neighbours in the "
            "archive; pack it with its files sorted by name: tar --sort=name"
        )
    elif not num_pairs:
        row["error"] = "holds no image with .txt"
    return row


def _pack(
    data: Path, images: Path, work_dir: Path, num_readers: int, num_processes: int, seed: int
) -> ShardSet:
    offsets = np.fromiter((offset for offset, _ in line_offsets(data)), dtype=np.int64)
    if not len(offsets):
        raise ValueError(f"{data}: holds no pairs")
    per_reader = -(-len(offsets) // (PAIRS_PER_SHARD * num_readers))
    num_shards = min(len(offsets), num_readers * max(1, per_reader))
    status = data.stat()
    inputs = {
        "pairs": str(data),
        "identity": [status.st_size, status.st_mtime_ns],
        "images": str(images),
        "num_shards": num_shards,
        "seed": seed,
    }
    shards = work_dir / "shards"
    inputs_file = work_dir / "shards.inputs.json"
    if not inputs_file.is_file() or json.loads(inputs_file.read_text("utf-8")) != inputs:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir()
        write_json(inputs_file, inputs)
    order = np.random.default_rng(seed).permutation(len(offsets))
    parts = [np.sort(order[number::num_shards]) for number in range(num_shards)]
    todo = [n for n in range(num_shards) if not (shards / f"{n:06d}.json").is_file()]
    write = functools.partial(_write_shard, data, images, shards)
    tasks = [(number, _mixed(offsets[parts[number]], seed + number)) for number in todo]
    engine: Engine = "process" if num_processes > 1 and len(tasks) > 1 else "inline"
    done = run_tasks(write, tasks, workers=num_processes, engine=engine)
    for _ in tqdm(done, total=len(tasks), desc="Writing shards", unit="shard"):
        pass
    return _packed(data, shards, num_shards)


def _packed(data: Path, shards: Path, num_shards: int) -> ShardSet:
    paths, counts, skipped = [], [], []
    for number in range(num_shards):
        record = json.loads((shards / f"{number:06d}.json").read_text(encoding="utf-8"))
        skipped += record["skipped"]
        if record["num_pairs"]:
            paths.append(shards / f"{number:06d}.tar")
            counts.append(record["num_pairs"])
    if not paths:
        raise ValueError(f"{data}: no pair can be used; the first: {skipped[0]['reason']}")
    skipped.sort(key=lambda row: row["line"])
    return ShardSet(tuple(paths), tuple(counts), tuple(skipped))


def _mixed(offsets: np.ndarray, seed: int) -> list[int]:
    return [int(offset) for offset in np.random.default_rng(seed).permutation(offsets)]


def _write_shard(data: Path, images: Path, shards: Path, task: tuple[int, list[int]]) -> None:
    number, offsets = task
    skipped, num_pairs = [], 0
    with (
        atomic_file(shards / f"{number:06d}.tar") as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
        data.open("rb") as lines,
    ):
        for offset in offsets:
            lines.seek(offset)
            row = parse_line(lines.readline(), strict=True)
            try:
                suffix, image, caption = _read_pair(row, images)
            except (ValueError, OSError) as error:
                found = row.get("id") if isinstance(row, dict) else None
                skipped.append({"line": offset, "id": found, "reason": str(error)})
                continue
            # Keys are numbers, because WebDataset cuts at dots and slide ids contain some.
            key = f"{number:06d}{num_pairs:06d}"
            about = {name: row[name] for name in row if name != "caption"}
            _add_member(tar, f"{key}.{suffix}", image)
            _add_member(tar, f"{key}.txt", caption.encode())
            _add_member(tar, f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
            num_pairs += 1
    write_json(shards / f"{number:06d}.json", {"num_pairs": num_pairs, "skipped": skipped})


def _read_pair(row: Any, images: Path) -> tuple[str, bytes, str]:
    """Returns suffix and bytes of the image, which is fully decoded as a check, and the caption.

    The trainer converts with Pillow alone, which makes 16-bit images white and transparent pixels
    any colour: what is not plain 8-bit is converted here, as `pathcore.images` does.
    """
    if isinstance(row, BadRow):
        raise ValueError(row)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    caption = row.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"caption: expected text, found {caption!r:.80}")
    path = path_inside(images, row.get("image"))
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.format in _FORMATS and is_plain(image):
                return _FORMATS[image.format], content, caption
            lossless = io.BytesIO()
            to_rgb(image, name=f"image {path}").save(lossless, "PNG")
            return "png", lossless.getvalue(), caption
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path}: cannot be decoded: {error}") from error


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(
        name
    )  # constant time, owner and permissions: equal pairs give equal shards
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
