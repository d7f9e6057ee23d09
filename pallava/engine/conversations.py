"""Tokenized conversations about images of any kind: shared code of this package's datasets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine import print_log
from mmengine.config import Config, ConfigDict
from mmengine.dist import broadcast_object_list, get_rank
from torch.utils.data import Dataset
from xtuner.registry import BUILDER

from pallava.engine.skipping import default_skip_log
from pallava.skipping import SkipLog
from pallava.text.chat_template import render_pieces, template_of_tokenizer
from pallava.text.contrasts import answer_marks, spread_marks
from pallava.text.encoding import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    Tokenizer,
    check_row,
    encode_conversation,
    image_files,
    interleaved_map_fn,
    mark_literal,
    special_tokens,
)
from pallava.text.templates import TOKENIZER_TEMPLATE
from pathcore.files import StrPath
from pathcore.images import ImageError
from pathcore.rows import check_fraction, read_rows

_ROWS_PER_PROCESS = 2000
_ROWS_PER_TABLE = 10_000
_REPLACEMENTS = 16  # rows tried instead of one whose image is unreadable
_SILENT_BELOW = 5000  # rows; fewer are tokenized in a moment

DEFAULT_MAX_LENGTH = 2048
"""Maximum number of tokens of a data set that states none."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """Base class for conversations; subclasses implement `read_image` and `count_sub_images`.

    Args:
        data_path: `.json` or `.jsonl` file of rows; requires `tokenizer`.
        tokenizer: Hugging Face tokenizer or its config.
        offline_processed_text_folder: Folder of tokenized rows; replaces `data_path`. Arguments
            that shape tokens must be those of the folder, or be left out.
        max_dataset_length: Number of rows to sample at random; all rows by default.
        dataset_map_fn: Maps a row to `{"conversation": [...]}`.
        template_map_fn: Prompt template, as made by XTuner's `template_map_fn_factory`, or
            `tokenizer` for the tokenizer's own chat template.
        max_length: Maximum number of tokens, by default 2048; longer sequences are truncated.
        skip_log: File that records skipped samples.
        map_num_proc: Number of tokenization processes; chosen by the number of rows by default.
        image_field: Field of the rows that names their images.
        contrast_answers: Whether the loss also contrasts different answers to one wording; see
            `pallava.modeling.contrast`.
    """

    def __init__(
        self,
        data_path: StrPath | None = None,
        tokenizer: Any = None,
        offline_processed_text_folder: StrPath | None = None,
        max_dataset_length: int | None = None,
        dataset_map_fn: Any = None,
        template_map_fn: Any = None,
        max_length: int | None = None,
        skip_log: StrPath | None = None,
        map_num_proc: int | None = None,
        image_field: str = "image",
        contrast_answers: bool = False,
    ) -> None:
        super().__init__()
        self.skip_log = SkipLog(skip_log) if skip_log else default_skip_log()
        self._index: Any = None
        self._undecodable: set[str] = set()
        self._next_check = 1
        if offline_processed_text_folder is not None:
            if data_path is not None:
                print_log(
                    f"data_path {data_path} is not read: offline_processed_text_folder "
                    f"{offline_processed_text_folder} is given too",
                    logger="current",
                    level=logging.WARNING,
                )
            from pallava.engine.tokenised import check_tokens

            data = load_processed_text(offline_processed_text_folder, contrast_answers)
            check_tokens(
                offline_processed_text_folder,
                tokenizer=build(tokenizer),
                dataset_map_fn=dataset_map_fn,
                template_map_fn=template_map_fn,
                max_length=max_length,
            )
            self.text_data = _sample(data, max_dataset_length)
            self._num_skipped_at_start = len(self.skip_log.read())
            return
        if data_path is None or tokenizer is None:
            raise ValueError(
                f"{type(self).__name__}: expected offline_processed_text_folder, or "
                "data_path and tokenizer"
            )
        self.text_data = process_text(
            data_path,
            tokenizer=build(tokenizer),
            dataset_map_fn=dataset_map_fn,
            template_map_fn=template_map_fn,
            max_length=max_length or DEFAULT_MAX_LENGTH,
            max_dataset_length=max_dataset_length,
            num_proc=map_num_proc,
            skip_log=self.skip_log,
            image_field=image_field,
            contrast_answers=contrast_answers,
        )
        self._num_skipped_at_start = len(self.skip_log.read())

    def __len__(self) -> int:
        """Returns the number of usable rows."""
        return len(self.text_data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `input_ids`, `labels` and `pixel_values`, one stack of tiles per image.

        With `contrast_answers`, also `label_marks`; see `pallava.text.contrasts`.

        If an image cannot be decoded, it is recorded in the skip log and the next row is returned
        instead.

        Raises:
            ImageError: If many consecutive rows are unreadable, which indicates a storage failure.
            IndexError: If the index is out of range.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        error: ImageError | None = None
        for step in range(min(_REPLACEMENTS, len(self))):
            row = self.text_data[(index + step) % len(self)]
            try:
                images = [self.read_image(name) for name in _used_files(row)]
            except ImageError as found:
                error = found
                self._record(row, str(found))
                self._undecodable.add(f"{row.get('id', '')} {row.get('image')}")
                continue
            if error is not None:
                self._check_undecodable(error)
            texts = ("input_ids", "labels", "label_marks")
            return {name: row[name] for name in texts if name in row} | {"pixel_values": images}
        raise ImageError(f"{_REPLACEMENTS} rows one after the other are unreadable; last: {error}")

    def _check_undecodable(self, error: ImageError) -> None:
        """Enforces the limit of a tenth on images that have a valid header but cannot be decoded.

        Data loader workers and ranks each see only some of the rows; their common skip log gives
        the total number of failures. It is read whenever the number of own failures has doubled,
        since reading it every time would take quadratic time.
        """
        number = len(self._undecodable)
        if number < self._next_check:
            return
        self._next_check = 2 * number
        bad = max(number, len(self.skip_log.read()) - self._num_skipped_at_start)
        check_fraction(bad, len(self), "images that cannot be decoded", {"": str(error)})

    @property
    def modality_length(self) -> list[int]:
        """Text length per row, negative for rows without an image, as XTuner expects."""
        return [
            length if num_images else -length
            for length, num_images in _values(self.text_data, "length", "num_images")
        ]

    @property
    def knows_sub_images(self) -> bool:
        """Whether headers were read, so that `num_sub_images` costs nothing."""
        return self._index is not None

    @property
    def num_sub_images(self) -> list[int]:
        """Number of sub-images per row, for `SubImageGroupedSampler`.

        Raises:
            ValueError: If the headers were not read, so that image sizes are unknown.
        """
        if not self.knows_sub_images:
            raise ValueError("grouping by sub-images needs check_images='header'")
        return [
            sum(self.count_sub_images(name) for name in names) for names in self._files_of_rows()
        ]

    def read_image(self, name: str) -> Any:
        """Reads an image by the name that a row contains, and returns it as model input.

        Raises:
            ImageError: If the image cannot be used.
        """
        raise NotImplementedError

    def count_sub_images(self, name: str) -> int:
        """Returns the number of sub-images of an image whose header was read."""
        raise NotImplementedError

    def skip_unreadable(self, read_headers: Callable[[list[str]], Any], folder: Path) -> None:
        """Reads the headers of all images once, and records and skips rows with unusable ones.

        Args:
            read_headers: Maps names to an index with `errors` by name; called on rank 0 only.
            folder: Image folder, for the error message.

        Raises:
            ValueError: If too many rows cannot be used.
        """
        names = sorted({name for files in self._files_of_rows() for name in files})
        self._index = _on_first_rank(read_headers, names)
        bad = self._index.errors
        if not bad:
            return
        keep, total = [], len(self.text_data)
        for index, files in enumerate(self._files_of_rows()):
            faults = [bad[name] for name in files if name in bad]
            if faults:
                self._record(self.text_data[index], faults[0])
            else:
                keep.append(index)
        check_fraction(total - len(keep), total, f"images in {folder}", bad)
        # These have been checked; later records are decoding failures.
        self._num_skipped_at_start = len(self.skip_log.read())
        self.text_data = self.text_data.select(keep)

    def _files_of_rows(self) -> Iterator[list[str]]:
        if "image" not in self.text_data.column_names:
            yield from ([] for _ in range(len(self.text_data)))
            return
        for value, count in _values(self.text_data, "image", "num_images"):
            yield image_files({"image": value})[:count]

    def _record(self, row: Mapping[str, Any], reason: str) -> None:
        files = image_files(row)
        self.skip_log.record(row.get("id", ""), files[0] if files else "", reason)
        print_log(f"sample skipped: {reason}", logger="current", level=logging.WARNING)


class TokenizerTemplate:
    """Maps question-answer pairs to the text of the tokenizer's own chat template.

    A config names it as `template_map_fn="tokenizer"`.

    Args:
        tokenizer: Fast Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: If the tokenizer is not a fast one, or carries no chat template that ends
            answers with a token.

    Attributes:
        template: The template, without thinking and with a fixed date; see `pinned`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = template_of_tokenizer(tokenizer)
        if self.template.chat_template is not None and not self.template.stop_words:
            raise ValueError(
                f"{type(tokenizer).__name__}: its chat template does not end answers with a token "
                "of the vocabulary, so that the model would not learn to stop; name a prompt "
                "template, such as PROMPT_TEMPLATE.llama3_chat"
            )
        if self.template.chat_template is not None and not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__}: a chat template needs a fast tokenizer, which knows "
                "the characters of each token; install `tokenizers` and leave out use_fast=False"
            )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row's `conversation` as rendered text, in pairs of prompt and answer."""
        pairs = row["conversation"]
        if not pairs:
            return {"conversation": []}
        if self.template.chat_template is None:
            from xtuner.dataset.map_fns import template_map_fn

            return dict(template_map_fn(dict(row), template=ConfigDict(self.template.fields())))
        messages = [
            {"role": role, "content": pair[key]}
            for pair in pairs
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
        try:
            *pieces, rest = render_pieces(self.tokenizer, self.template, messages)
        except ValueError:  # such as an answer with </think>, which Qwen3's template cuts
            return {"conversation": []}
        rendered = [
            {
                "input": prompt,
                "output": answer,
                "output_with_loss": pair.get("output_with_loss", True),
                "sep": "",
                "rendered": True,
            }
            for pair, prompt, answer in zip(pairs, pieces[::2], pieces[1::2], strict=True)
        ]
        rendered[-1]["sep"] = rest
        return {"conversation": rendered}


def load_processed_text(folder: StrPath, contrast_answers: bool = False) -> Any:
    """Opens a folder of tokenized rows written by `datasets.save_to_disk`.

    Args:
        folder: The folder.
        contrast_answers: Whether to read the marks of labels, which are dropped otherwise.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it lacks `input_ids`, `labels`, or the marks that are asked for.
    """
    from datasets import load_from_disk

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"offline_processed_text_folder {folder}: no such folder")
    data = load_from_disk(str(folder))
    absent = {"input_ids", "labels"} - set(data.column_names)
    if absent:
        raise ValueError(
            f"offline_processed_text_folder {folder}: columns {sorted(absent)} are missing, found "
            f"{data.column_names}"
        )
    if contrast_answers and "label_marks" not in data.column_names:
        raise ValueError(
            f"offline_processed_text_folder {folder}: contrast_answers needs the column "
            f"label_marks, found {data.column_names}; tokenise the data again by "
            "`xtuner-add tokenise --config` with a config that sets contrast_answers=True"
        )
    if not contrast_answers and "label_marks" in data.column_names:
        data = data.remove_columns("label_marks")
    if {"length", "num_images"} <= set(data.column_names):  # `xtuner-add tokenise` wrote it
        return data
    return data.map(_counts)


def process_text(
    data_path: StrPath,
    *,
    tokenizer: Tokenizer,
    dataset_map_fn: Any,
    template_map_fn: Any,
    max_length: int,
    max_dataset_length: int | None,
    num_proc: int | None,
    skip_log: SkipLog,
    image_field: str = "image",
    contrast_answers: bool = False,
) -> Any:
    """Reads, checks, templates and tokenizes rows; unusable ones are recorded in the skip log.

    Args:
        data_path: `.json` or `.jsonl` file of rows.
        tokenizer: Hugging Face tokenizer.
        dataset_map_fn: Maps a row to `{"conversation": [...]}`.
        template_map_fn: Prompt template, as made by XTuner's `template_map_fn_factory`.
        max_length: Maximum number of tokens; longer sequences are truncated.
        max_dataset_length: Number of rows to sample at random; None for all.
        num_proc: Number of processes; None chooses by the number of rows.
        skip_log: Log of skipped rows.
        image_field: Field of the rows that names their images.
        contrast_answers: Whether to add `label_marks`, see `pallava.text.contrasts`.

    Returns:
        A `datasets.Dataset` with `id`, `image`, `input_ids`, `labels`, `length` and `num_images`.
    """
    from datasets import disable_progress_bars

    encode = _RowEncoder(
        map_function(dataset_map_fn or interleaved_map_fn),
        TokenizerTemplate(tokenizer)
        if template_map_fn == TOKENIZER_TEMPLATE
        else build(template_map_fn),
        tokenizer,
        max_length,
    )
    data, total = _read_table(data_path, skip_log, image_field)
    if num_proc is None:
        num_proc = min(32, os.cpu_count() or 1, len(data) // _ROWS_PER_PROCESS)
    if total < _SILENT_BELOW:
        disable_progress_bars()
    data = _sample(data, max_dataset_length)
    if contrast_answers:
        data = data.add_column("marks", _marks(map(encode.pairs, data), data_path))
    data = data.map(
        encode,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=[name for name in data.column_names if name not in ("id", "image")],
    )
    return _skip_unusable(data, skip_log, max_length, str(data_path))


def _sample(data: Any, number: int | None) -> Any:
    """Returns that many rows, chosen at random; all if there are no more or `number` is None."""
    if number is None or number >= len(data):
        return data
    return data.shuffle(seed=0).select(range(number))


def map_function(function: Any) -> Callable[[Any], Mapping[str, Any]]:
    """Returns a map function that a config gives as such, or by XTuner's name of it."""
    if isinstance(function, str):
        from xtuner.dataset.huggingface import get_object_from_string
        from xtuner.registry import MAP_FUNC

        found = MAP_FUNC.get(function) or get_object_from_string(function)
        if found is None:
            raise ValueError(
                f"dataset_map_fn {function!r}: neither a name in XTuner's MAP_FUNC nor the import "
                "path of a function"
            )
        function = found
    return function  # type: ignore[no-any-return]


def _read_table(data_path: StrPath, skip_log: SkipLog, image_field: str) -> tuple[Any, int]:
    """Reads the rows that are sound, and records the others.

    Returns:
        A `datasets.Dataset` with `id`, `image` and `conversations`, and the number of rows read.
    """
    from datasets import Dataset as HFDataset
    from datasets import Features, Sequence, Value, concatenate_datasets

    turn = {"from": Value("string"), "value": Value("string")}
    features = Features(
        {"id": Value("string"), "image": Sequence(Value("string")), "conversations": [turn]}
    )
    tables, rows, faults, names, total = [], [], {}, set(), 0

    def store() -> None:
        # Python's objects take several times the memory of a table.
        tables.append(HFDataset.from_list(rows, features=features))
        rows.clear()

    for number, row in read_rows(data_path, what="data_path"):
        total += 1
        is_row = isinstance(row, Mapping)
        fault = check_row(row, image_field) if is_row else f"no object: {row!s:.80}"
        name = str(row.get("id", number)) if is_row else str(number)
        if name in (faults if fault else names):  # the log holds an id once; every lost row counts
            name = f"{name} (row {number})"
        if fault is None:
            files = image_files(row, image_field)
            turns = [
                {"from": t["from"], "value": t.get("value") or ""} for t in row["conversations"]
            ]
            names.add(name)
            rows.append({"id": name, "image": files or None, "conversations": turns})
            if len(rows) == _ROWS_PER_TABLE:
                store()
            continue
        faults[name] = f"{data_path}, row {number}: {fault}"
        skip_log.record(name, str(data_path), faults[name])
    check_fraction(len(faults), total, str(data_path), faults)
    if rows:
        store()
    if not tables:
        raise ValueError(f"data_path {data_path}: no rows")
    return concatenate_datasets(tables), total


def _marks(conversations: Iterable[Any], data_path: StrPath) -> list[list[int]]:
    marks = answer_marks(list(conversations))
    marked, total = sum(mark != 0 for row in marks for mark in row), sum(map(len, marks))
    message = f"contrast_answers: {marked} of {total} answers in {data_path} can be contrasted"
    if not marked:
        message += ": no wording is asked often enough with few enough different answers"
    print_log(message, logger="current", level=logging.INFO if marked else logging.WARNING)
    return marks


@dataclass(frozen=True)
class _RowEncoder:
    """Maps a row to tokens and counts, in one pass over the rows."""

    dataset_map_fn: Callable[[Any], Mapping[str, Any]]
    template_map_fn: Callable[[Any], Mapping[str, Any]] | None
    tokenizer: Tokenizer
    max_length: int

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer)

    def pairs(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the row's pairs of question and answer, before the template."""
        return self.dataset_map_fn(dict(row))["conversation"]  # type: ignore[no-any-return]

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `input_ids`, `labels` and, with `marks` in the row, `label_marks`."""
        pairs = [
            {**pair, **{k: mark_literal(self._special, pair[k]) for k in ("input", "output")}}
            for pair in self.pairs(row)
        ]
        if self.template_map_fn is not None:
            pairs = self.template_map_fn({**row, "conversation": pairs})["conversation"]
        encoded: dict[str, Any] = encode_conversation(self.tokenizer, pairs, self.max_length)
        if "marks" in row:
            learned = [
                mark
                for mark, pair in zip(row["marks"], pairs, strict=False)
                if pair.get("output_with_loss", True)
            ]
            encoded["label_marks"] = spread_marks(encoded["labels"], learned)
        return {
            "num_pairs": len(pairs),
            "num_marks": sum(pair["input"].count(IMAGE_TOKEN) for pair in pairs),
            **encoded,
            **_counts(encoded),
        }


def _counts(row: Mapping[str, Any]) -> dict[str, int]:
    ids = row["input_ids"]
    return {
        "length": len(ids),
        "num_images": sum(token == IMAGE_TOKEN_INDEX for token in ids),
        "num_learned": sum(label >= 0 for label in row["labels"]),
    }


def _values(data: Any, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yields the values of some columns row by row; a column alone is slow to iterate."""
    for batch in data.select_columns(list(names)).iter(batch_size=_ROWS_PER_TABLE):
        yield from zip(*(batch[name] for name in names), strict=True)


def _skip_unusable(data: Any, skip_log: SkipLog, max_length: int, source: str) -> Any:
    keep, faults = [], {}
    rows = _values(data, "num_pairs", "num_learned", "num_marks", "image")
    for index, (pairs, learned, marks, files) in enumerate(rows):
        if learned and marks == len(files or ()):
            keep.append(index)
            continue
        row = data[index]
        reason = f"no word of the answer is within max_length {max_length}"
        if not pairs:
            reason = "dataset_map_fn or the template left no question with an answer"
        elif learned:
            reason = (
                f"dataset_map_fn left {marks} image token(s) for {len(files or ())} image(s); "
                "conversations with several images in one turn need interleaved_map_fn"
            )
        faults[f"{index}"] = f"{row['id']}: {reason}"  # ids may repeat
        skip_log.record(row["id"], (image_files(row) or [""])[0], reason)
    check_fraction(len(faults), len(data), source, faults)
    return data if len(keep) == len(data) else data.select(keep)


def _used_files(row: Mapping[str, Any]) -> list[str]:
    """Returns the row's images whose tokens were not truncated.

    Raises:
        ImageError: If there are more image tokens than files.
    """
    files = image_files(row)
    if len(files) < row["num_images"]:
        raise ImageError(
            f"row {row.get('id')!r}: {row['num_images']} image places, {len(files)} image file(s)"
        )
    return files[: row["num_images"]]


def _on_first_rank(read_headers: Callable[[list[str]], Any], names: list[str]) -> Any:
    found = [read_headers(names) if get_rank() == 0 else None]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def build(value: Any) -> Any:
    """Builds an object from its config; returns any other value unchanged."""
    if isinstance(value, dict | Config | ConfigDict):
        return BUILDER.build(value)
    return value
