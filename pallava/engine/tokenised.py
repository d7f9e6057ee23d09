"""Tokenizes conversations in advance to a folder that training reads instead of the text.

The folder is written by `datasets.save_to_disk` with `input_ids`, `labels` and `image`. It serves
as `offline_processed_text_folder` of `pallava.dataset.LLaVADataset` or of XTuner's own class.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine import print_log
from mmengine.config import Config
from xtuner.registry import BUILDER

from pallava.engine.conversations import (
    DEFAULT_MAX_LENGTH,
    map_function,
    process_text,
)
from pallava.engine.prompts import TOKENISED_REPORT, template_of_dataset
from pallava.engine.runtime import prepare_host
from pallava.inference.loading import load_tokenizer
from pallava.skipping import SKIP_LOG_NAME, SkipLog
from pallava.text.encoding import interleaved_map_fn
from pallava.text.templates import TOKENIZER_TEMPLATE, PromptTemplate
from pathcore.config_file import read_config
from pathcore.files import (
    OutputExistsError,
    StrPath,
    file_identity,
    folder_lock,
    fsync_path,
    write_json,
)
from pathcore.names import WrongArgumentError, did_you_mean

_SAMPLE = "Grade 2\n\n  carcinoma (ER+, 1,024 \u00b5m); don't bi\u00f6psy \u7ec4\u7ec7."
"""Text whose ids reveal other merges or another splitting of words with the same vocabulary."""


@dataclass(frozen=True)
class TextSettings:
    """Settings that determine the tokens of a row.

    Attributes:
        tokenizer: Hugging Face tokenizer.
        dataset_map_fn: Row mapping of `LLaVADataset`; None for `interleaved_map_fn`.
        template_map_fn: See `pallava.dataset.LLaVADataset`.
        max_length: Maximum number of tokens; longer sequences are truncated.
        description: All settings as JSON values, by which runs are distinguished.
        image_field: Field of the rows that names their images.
        contrast_answers: Whether the rows get `label_marks`.
    """

    tokenizer: Any
    dataset_map_fn: Any
    template_map_fn: Any
    max_length: int
    description: dict[str, Any]
    image_field: str = "image"
    contrast_answers: bool = False


def settings_from_names(
    tokenizer: str,
    prompt_template: str = "llama3_chat",
    *,
    map_fn: str = "llava",
    max_length: int = 2048 - 196,
) -> TextSettings:
    """Returns settings without a config.

    Args:
        tokenizer: Folder or Hub name of the tokenizer.
        prompt_template: XTuner's name of the prompt template, such as `llama3_chat`, or
            `tokenizer` for the tokenizer's own.
        map_fn: `llava` moves the image to the front, as published; `interleaved` keeps positions.
        max_length: Maximum number of tokens; longer sequences are truncated.

    Raises:
        ValueError: If there is no such tokenizer, template or mapping.
    """
    prepare_host()
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    if prompt_template not in (*PROMPT_TEMPLATE, TOKENIZER_TEMPLATE):
        hint = did_you_mean(prompt_template, [*PROMPT_TEMPLATE, TOKENIZER_TEMPLATE])
        raise ValueError(f"prompt template {prompt_template!r}: unknown to XTuner{hint}")
    if map_fn not in ("llava", "interleaved"):
        raise ValueError(f"map_fn {map_fn}: expected llava or interleaved")
    return TextSettings(
        load_tokenizer(tokenizer, padding_side="right"),
        llava_map_fn if map_fn == "llava" else None,
        TOKENIZER_TEMPLATE
        if prompt_template == TOKENIZER_TEMPLATE
        else template_map_fn_factory(template=PROMPT_TEMPLATE[prompt_template]),
        max_length,
        {
            "tokenizer": tokenizer,
            "prompt_template": prompt_template,
            "map_fn": map_fn,
            "max_length": max_length,
        },
    )


def settings_from_config(config_file: StrPath) -> TextSettings:
    """Returns the settings of a training config.

    Raises:
        WrongArgumentError: If it cannot be read, or its training data is not a single dataset
            with a tokenizer.
    """
    prepare_host()

    cfg = read_config(Config.fromfile, config_file)
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    if "tokenizer" not in dataset:
        raise WrongArgumentError(
            f"{config_file}: expected train_dataloader.dataset with a tokenizer; of several "
            "datasets tokenise each by --tokenizer and --prompt-template"
        )
    max_length = dataset.get("max_length") or DEFAULT_MAX_LENGTH
    return TextSettings(
        BUILDER.build(dataset.tokenizer),
        dataset.get("dataset_map_fn"),
        dataset.get("template_map_fn"),
        max_length,
        {
            "config": {
                "max_length": max_length,
                **{
                    key: _described(dataset.get(key))
                    for key in ("tokenizer", "dataset_map_fn", "template_map_fn")
                },
                **({"contrast_answers": True} if dataset.get("contrast_answers") else {}),
            }
        },
        "slide" if "features_folder" in dataset else "image",
        bool(dataset.get("contrast_answers")),
    )


def _described(value: Any) -> Any:
    """Converts a config value to JSON that is the same in every process; functions become names."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, bool | int | float | None) else str(value)


def _token_settings(
    tokenizer: Any, dataset_map_fn: Any, template: PromptTemplate | None, max_length: int | None
) -> dict[str, Any]:
    """Returns what determines the ids of a row as JSON values, by argument; None is left out."""
    settings = {
        "tokenizer": None if tokenizer is None else vocabulary_digest(tokenizer),
        "dataset_map_fn": None
        if dataset_map_fn is None
        else _described(map_function(dataset_map_fn)),
        "template_map_fn": None if template is None else replace(template, stop_words=()).fields(),
        "max_length": max_length,
    }
    return {name: value for name, value in settings.items() if value is not None}


def vocabulary_digest(tokenizer: Any) -> str:
    """Returns a digest of what a tokenizer makes of text, independent of its path."""
    ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    content = repr((sorted(tokenizer.get_vocab().items()), special, ids))
    return hashlib.sha256(content.encode()).hexdigest()


def check_tokens(
    folder: StrPath,
    *,
    tokenizer: Any,
    dataset_map_fn: Any,
    template_map_fn: Any,
    max_length: int | None,
) -> None:
    """Compares a folder of tokenized rows with the arguments of the data set that reads it.

    A folder without a record, such as one that XTuner's own tool wrote, only causes a warning.

    Args:
        folder: Folder that `tokenise` wrote.
        tokenizer: Tokenizer; this and the next are None if the data set does not state them.
        dataset_map_fn: See `pallava.dataset.LLaVADataset`, as for the next two.
        template_map_fn: Prompt template.
        max_length: Maximum number of tokens.

    Raises:
        ValueError: If an argument differs from what the rows were tokenized with.
    """
    template = None
    if template_map_fn is not None and (tokenizer or template_map_fn != TOKENIZER_TEMPLATE):
        template = template_of_dataset({"tokenizer": tokenizer, "template_map_fn": template_map_fn})
    stated = _token_settings(tokenizer, dataset_map_fn, template, max_length)
    path = Path(folder) / TOKENISED_REPORT
    report = json.loads(path.read_bytes()) if path.is_file() else {}
    recorded = report.get("inputs", {}).get("tokens")
    if recorded is None and stated:
        print_log(
            f"offline_processed_text_folder {folder}: does not record with which tokenizer and "
            f"settings it was written, so that {', '.join(stated)} cannot be compared; "
            "`xtuner-add tokenise` records them",
            logger="current",
            level=logging.WARNING,
        )
        return
    for name, value in stated.items():
        if recorded[name] != value:
            raise ValueError(
                f"offline_processed_text_folder {folder}: {name} differs from that of the data "
                f"set: the rows were tokenised with {_shown(name, recorded[name])}, the data set "
                f"has {_shown(name, value)}; run `xtuner-add tokenise` again with the data set's "
                f"settings, or give the data set those of {TOKENISED_REPORT} in the folder"
            )


def _shown(name: str, value: Any) -> str:
    if name == "tokenizer":
        return f"the vocabulary {value[:12]}"
    return PromptTemplate.from_fields(value).name if name == "template_map_fn" else str(value)


def tokenise(
    data_path: StrPath,
    out: StrPath,
    settings: TextSettings,
    *,
    num_proc: int | None = None,
) -> dict[str, Any]:
    """Tokenizes a data file to a folder, which is written atomically.

    Args:
        data_path: `conversations.jsonl`, or a `.json` array.
        out: Output folder.
        settings: Settings that determine the tokens.
        num_proc: Number of processes; chosen by the number of rows by default.

    Returns:
        The report: `num_rows`, `num_tokens`, `num_skipped`.

    Raises:
        ValueError: If there are no rows, or too many cannot be used.
        OutputExistsError: If `out` holds something else, or another process is writing it.
    """
    out, data_path = Path(os.path.abspath(out)), Path(data_path)
    if not data_path.is_file():
        raise FileNotFoundError(f"data_path {data_path}: no such file")
    inputs = {
        "data": file_identity(data_path),
        "tokens": _token_settings(
            settings.tokenizer,
            settings.dataset_map_fn or interleaved_map_fn,
            template_of_dataset(vars(settings)),
            settings.max_length,
        ),
        **settings.description,
    }
    if out.exists():
        return _finished_report(out, inputs)
    partial = out.with_name(f"{out.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock_file = out.with_name(f"{out.name}.lock")
    with folder_lock(lock_file, folder=out):
        if out.exists():  # another process finished it while we waited for the lock
            return _finished_report(out, inputs)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        report = _write(data_path, partial, settings, num_proc)
        write_json(partial / TOKENISED_REPORT, {**report, "inputs": inputs})
        for path in partial.iterdir():
            fsync_path(path)
        os.replace(partial, out)
        fsync_path(out.parent)
        lock_file.unlink()
    return report


def _finished_report(out: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    path = out / TOKENISED_REPORT
    report = json.loads(path.read_bytes()) if path.is_file() else {}
    if report.pop("inputs", None) != json.loads(json.dumps(inputs)):
        raise OutputExistsError(
            f"{out}: already exists and holds other files or the result of other settings; "
            "name a new folder, or remove it"
        )
    return report


def _write(
    data_path: Path, folder: Path, settings: TextSettings, num_proc: int | None
) -> dict[str, Any]:
    log = SkipLog(folder / SKIP_LOG_NAME)
    data = process_text(
        data_path,
        tokenizer=settings.tokenizer,
        dataset_map_fn=settings.dataset_map_fn,
        template_map_fn=settings.template_map_fn,
        max_length=settings.max_length,
        max_dataset_length=None,
        num_proc=num_proc,
        skip_log=log,
        image_field=settings.image_field,
        contrast_answers=settings.contrast_answers,
    )
    images = data["image"]
    if all(len(files or ()) <= 1 for files in images):  # XTuner's own class supports only one name
        names = [files[0] if files else None for files in images]
        data = data.remove_columns("image").add_column("image", names)
    data.flatten_indices().save_to_disk(str(folder))
    return {
        "num_rows": len(data),
        "num_tokens": sum(data["length"]),
        "num_skipped": len(log.read()),
        # The tokens alone do not reveal the template, which inference needs to know.
        "prompt_template": template_of_dataset(vars(settings)).fields(),
    }
