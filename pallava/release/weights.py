"""Reads and writes weights tensor by tensor, so that memory does not grow with model size.

A safetensors file is eight bytes of header length, a JSON header and the raw tensors
(github.com/huggingface/safetensors, "Format"). Tensors are read with `pread` rather than mmap,
because mapped pages would count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pallava.folder_build import FileDigest
from pathcore.files import StrPath
from pathcore.weights import (
    CheckpointError,
    check_plain,
    read_shard_index,
    read_state_dict,
    recognise_container,
)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAPPED_BYTES = 256 << 20
"""Bytes read from a `.bin` file before it is mapped again, which releases the pages in memory."""

_WRITES_AHEAD = 8  # pieces that may wait for the disk

_FLUSH_BYTES = 64 << 20
"""Bytes written between two calls of fdatasync, so that closing the file does not wait long."""
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_numel(self) -> int:
        """Number of elements per index of the first dimension."""
        return math.prod(self.shape[1:])


class WeightFile(Protocol):
    """A file of named tensors."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads a copy of the rows `start:stop` of a tensor."""


class SafetensorsFile:
    """A `.safetensors` file.

    Raises:
        CheckpointError: If the file is damaged or contains an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        recognise_container(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the object
        try:
            # The library rejects damaged or malicious headers: overlapping or missing ranges,
            # trailing bytes, wrong dtypes. It is not used for reading, since it maps the file and
            # the pages would count as memory of the process.
            with safe_open(str(path), framework="pt") as checked:
                names = set(checked.keys())
            self.tensors, self._starts = self._read_header()
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            self._file.close()
            raise CheckpointError(f"{path}: no safetensors file: {error}") from error
        assert names == set(self.tensors)
        check_plain(self.tensors, path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `WeightFile.read`."""
        info = self.tensors[name]
        shape, offset = info.shape, self._starts[name]
        if shape:
            stop = shape[0] if stop is None else stop
            offset += start * info.row_numel * info.dtype.itemsize
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=info.dtype)
        if tensor.numel():
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            while view:
                count = os.preadv(self._file.fileno(), [view], offset)
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside {name}")
                view, offset = view[count:], offset + count
        return tensor

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        tensors, starts = {}, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name}: dtype {entry['dtype']} is not known here")
            tensors[name] = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            starts[name] = 8 + length + entry["data_offsets"][0]
        return tensors, starts


class TorchFile:
    """A memory-mapped `.bin` or `.pth` file, unpickled with tensors only.

    Raises:
        CheckpointError: If the file contains anything but named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        if recognise_container(path) == "deflated":
            # Such a file can only be read as a whole, and transformers cannot read it at all.
            raise CheckpointError(
                f"{path}: the tensors are compressed, as zip programs do and PyTorch never does; "
                "write the file again: torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
        self._mapped = read_state_dict(path, mmap=True)
        self._lock = Lock()  # several shards may be computed from one file concurrently
        self.tensors = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._mapped.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `WeightFile.read`."""
        with self._lock:
            if self._read_bytes > _MAPPED_BYTES:
                self._mapped, self._read_bytes = {}, 0  # drop the old map before opening a new one
                self._mapped = read_state_dict(self.path, mmap=True)
            tensor = self._mapped[name]
            tensor = (tensor[start:stop] if tensor.dim() else tensor).clone(
                memory_format=torch.contiguous_format
            )
            self._read_bytes += tensor.numel() * tensor.dtype.itemsize
            return tensor


class WeightFolder:
    """Weights of a Hugging Face model or adapter folder, sharded or not.

    Args:
        folder: Folder of the weights.
        stem: File name stem, `model` or `adapter_model`.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no weights.
        CheckpointError: If an index contradicts its shards or points outside the folder.
    """

    def __init__(self, folder: StrPath, stem: str = "model") -> None:
        self.folder = Path(folder)
        self.files = [open_weight_file(path) for path in self._find(stem)]
        self.owner: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self.owner:
                    raise CheckpointError(f"{self.folder}: {name} is in two shards")
                self.owner[name] = file
        absent = sorted(self._indexed - set(self.owner))
        if absent:
            raise CheckpointError(f"{self.folder}: the shards lack {', '.join(absent[:10])}")

    def __contains__(self, name: object) -> bool:
        return name in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)

    def info(self, name: str) -> TensorInfo:
        """Returns dtype and shape of a tensor."""
        return self.owner[name].tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `WeightFile.read`."""
        return self.owner[name].read(name, start, stop)

    def _find(self, stem: str) -> list[Path]:
        self._indexed: set[str] = set()
        torch_stem = "pytorch_model" if stem == "model" else stem
        names = (f"{stem}.safetensors", f"{torch_stem}.bin")
        for name in names:
            # As in transformers, whose `save_pretrained` leaves the index of earlier shards behind.
            if (self.folder / name).is_file():
                return [self.folder / name]
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                files = read_shard_index(index)
                self._indexed = set(files)
                return sorted(set(files.values()))
        raise FileNotFoundError(
            f"{self.folder}: expected a folder with {' or '.join(names)}, or an index of shards"
        )


def open_weight_file(path: Path) -> WeightFile:
    """Opens a weight file according to its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def row_blocks(info: TensorInfo, max_numel: int) -> Iterable[tuple[int, int | None]]:
    """Splits a tensor into blocks of rows of about `max_numel` elements, at least one row each."""
    if not info.shape or math.prod(info.shape) <= max_numel:
        return [(0, None)]
    rows = max(1, max_numel // max(1, info.row_numel))
    return [(start, min(start + rows, info.shape[0])) for start in range(0, info.shape[0], rows)]


class SafetensorsWriter:
    """Writes a `.safetensors` file incrementally, as its tensors are computed.

    Separate threads write, hash and fsync while the next block is computed.

    Args:
        path: Output file.
        infos: All tensors of the file, in write order.
        digest: Updated with every byte of the file; complete once the file is closed.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> infos = [TensorInfo("weight", torch.float32, (2, 3))]
        >>> with SafetensorsWriter(path, infos) as writer:
        ...     writer.write("weight", torch.zeros(1, 3))
        ...     writer.write("weight", torch.ones(1, 3))
        >>> load_file(path)["weight"].sum()
        tensor(3.)
    """

    def __init__(
        self, path: Path, infos: Iterable[TensorInfo], digest: FileDigest | None = None
    ) -> None:
        self._remaining = deque((info.name, info.dtype, info.num_bytes) for info in infos)
        self._digest = digest or FileDigest()
        self._pending: deque[Future[None]] = deque()
        self._header = _header(infos)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._flushes: list[Future[None]] = []  # fsync reports a failure to one caller only
        self._written_bytes = 0
        self._threads = [ThreadPoolExecutor(1) for _ in range(3)]
        self._writer, self._hasher, self._flusher = self._threads

    def __enter__(self) -> SafetensorsWriter:
        self._put(memoryview(self._header))
        return self

    def __exit__(self, error_type: object, *error: object) -> None:
        try:
            self._skip_written()
            for step in (*self._pending, *self._flushes):
                step.result()
            if error_type is None and self._remaining:
                raise ValueError(f"{self._remaining[0][0]}: not all of it was written")
        finally:
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)
            self._file.close()

    def write(self, name: str, rows: Tensor) -> None:
        """Appends the next rows of a tensor, which must be on the CPU.

        Raises:
            ValueError: If another tensor, dtype or size is expected next.
        """
        self._skip_written()
        due, dtype, remaining = self._remaining[0] if self._remaining else ("nothing", None, 0)
        num_bytes = rows.numel() * rows.dtype.itemsize
        if name != due or rows.dtype != dtype or num_bytes > remaining:
            raise ValueError(
                f"{name}: {num_bytes} bytes of {rows.dtype} written, but {due} is due with "
                f"{remaining} bytes of {dtype}"
            )
        self._remaining[0] = (due, dtype, remaining - num_bytes)
        if num_bytes:
            self._put(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _skip_written(self) -> None:
        while self._remaining and not self._remaining[0][2]:
            self._remaining.popleft()

    def _put(self, data: memoryview) -> None:
        while len(self._pending) >= 2 * _WRITES_AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._hasher.submit(self._digest.update, data))
        self._pending.append(self._writer.submit(self._write, data))

    def _write(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data)
            data, written = data[count:], self._written_bytes + count
            if written // _FLUSH_BYTES > self._written_bytes // _FLUSH_BYTES:
                self._flushes.append(self._flusher.submit(os.fdatasync, self._file.fileno()))
            self._written_bytes = written


def write_index(path: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Writes the index that maps tensors to shards."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(infos: Iterable[TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        start, end = end, end + info.num_bytes
        header[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns tensor data to eight bytes
    return len(text).to_bytes(8, "little") + text
