"""Checks a training before torch, XTuner and DeepSpeed are started.

Starting a training takes half a minute and, if a path is misspelt, ends in a traceback of forty
lines. The check only reads the config file, folder listings and the first rows of the data. It
ignores what it does not know, such as configs of other models and datasets of other packages.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pallava
from pallava.text.encoding import check_row, image_files
from pallava.text.templates import PROMPT_TEMPLATES
from pathcore import config_file
from pathcore.names import WrongArgumentError, did_you_mean
from pathcore.rows import check_fraction, read_rows
from xtuner_add.launch import LaunchError, Processes
from xtuner_add.paths import xtuner_dir

_ROWS_CHECKED = 200
_RUNNER_KEY_NAMES = (
    "model train_dataloader val_dataloader test_dataloader train_cfg val_cfg test_cfg "
    "optim_wrapper param_scheduler val_evaluator test_evaluator default_hooks "
    "custom_hooks data_preprocessor load_from resume launcher env_cfg log_processor "
    "log_level visualizer default_scope randomness work_dir experiment_name "
    "model_wrapper_cfg strategy runner_type auto_scale_lr framework tokenizer "
    "custom_imports sequence_parallel_size "
)
_RUNNER_KEYS = frozenset(_RUNNER_KEY_NAMES.split())
_POSITIVE = (
    "train_dataloader.batch_size",
    "optim_wrapper.accumulative_counts",
    "train_cfg.max_epochs",
    "train_cfg.max_iters",
    "train_dataloader.dataset.max_length",
    "train_dataloader.dataset.max_dataset_length",
)


class TrainingInputError(WrongArgumentError):
    """Raised if a training cannot work; the message says what to change."""


def check_training(
    config: Path, arguments: Sequence[str], environ: Mapping[str, str] = os.environ
) -> None:
    """Checks config, options, paths, first rows, checkpoint and schedule of a training.

    Args:
        config: Config file.
        arguments: Arguments that follow the config on the command line.
        environ: Environment variables, which determine the number of processes.

    Raises:
        WrongArgumentError: If something is wrong. The message is one line that names the option or
            field, what was found, what was expected and what to do.
    """
    known = _parse_arguments(arguments)
    cfg = read_config(config, known.cfg_options or {})
    _check_arguments(known)
    deepspeed = bool(known.deepspeed or cfg.get("strategy"))
    _check_start("--resume", known.resume, deepspeed)
    _check_start("load_from", cfg.get("load_from"), deepspeed)
    if known.resume and deepspeed and known.launcher not in ("slurm", "mpi"):
        _check_shards(Path(known.resume), environ)
    _check_numbers(cfg)
    model = cfg.get("model")
    dataset = _at(cfg, "train_dataloader.dataset")
    if isinstance(model, dict) and "llm" in model:
        _check_model(model)
    _check_tokenizer(cfg)
    rows = _check_dataset(dataset) if isinstance(dataset, dict) else None
    if rows:
        _check_schedule(cfg, rows, environ)


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(prog="xtuner-add train", add_help=False, allow_abbrev=False)
    for name in ("--work-dir", "--deepspeed", "--resume", "--seed", "--launcher"):
        parser.add_argument(name)
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("--cfg-options", nargs="+", action=_Options, base=DictAction)
    return parser.parse_known_args(list(arguments))[0]


class _Options(argparse.Action):
    """Parses MMEngine's `KEY=VALUE` syntax; the error message shows the syntax."""

    def __init__(self, *args: Any, base: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parse_value = base._parse_iterable

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        options = {}
        for text in values:
            key, separator, value = text.partition("=")
            if not separator or not key:
                raise TrainingInputError(f"--cfg-options {text!r}: expected KEY=VALUE")
            options[key] = self._parse_value(value)
        setattr(namespace, self.dest, options)


def read_config(config: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Reads a config with the options of a command line, and checks the names in both.

    Raises:
        TrainingInputError: If an option or an argument of one of this project's classes does not
            exist.
        WrongArgumentError: If the config cannot be read, or an option cannot be applied.
    """
    from mmengine.config import Config

    def check_options(cfg: Any) -> None:
        top = set(cfg._to_lazy_dict())
        for key in options:
            name = key.partition(".")[0]
            if name not in top and name not in _RUNNER_KEYS:
                hint = did_you_mean(name, top | _RUNNER_KEYS)
                raise TrainingInputError(f"--cfg-options {key}: {config.name} has no {name}{hint}")

    cfg = config_file.read_config(Config.fromfile, config, options, check=check_options)
    values: dict[str, Any] = cfg._to_lazy_dict()
    for where, part in _typed_parts(values, ""):
        _check_names(where, part)
    return values


def _check_arguments(known: argparse.Namespace) -> None:
    if known.work_dir and Path(known.work_dir).exists() and not Path(known.work_dir).is_dir():
        raise TrainingInputError(f"--work-dir {known.work_dir}: expected a folder, found a file")
    if known.deepspeed and not Path(known.deepspeed).is_file():
        names = sorted(path.stem for path in (xtuner_dir() / "configs/deepspeed").glob("*.json"))
        if known.deepspeed not in names:
            hint = did_you_mean(known.deepspeed, names)
            raise TrainingInputError(
                f"--deepspeed {known.deepspeed}: neither a file nor one of XTuner's{hint}"
            )


def _check_start(option: str, name: Any, deepspeed: bool) -> None:
    """Checks that a checkpoint to start from exists and is of the kind that the training reads."""
    if not isinstance(name, str) or "://" in name:
        return
    path = Path(name)
    if not path.exists():
        raise TrainingInputError(f"{option} {name}: no such checkpoint")
    if path.is_dir() and not any(path.glob("*model_states.pt")):
        raise TrainingInputError(
            f"{option} {name}: expected a checkpoint, such as iter_500.pth, found another folder"
        )
    if option == "--resume" and path.is_file() and not zipfile.is_zipfile(path):
        raise TrainingInputError(
            f"{option} {name}: no checkpoint, or one that was not written to its end; name an "
            "earlier one"
        )
    if path.is_dir() != deepspeed:
        found, do = (
            ("a training with DeepSpeed", "add --deepspeed deepspeed_zero2, or its other stage")
            if path.is_dir()
            else ("a training without DeepSpeed", "leave --deepspeed out")
        )
        raise TrainingInputError(
            f"{option} {name}: a checkpoint of {found}; {do}, or start from its weights by "
            "model.pretrained_pth"
        )


def _check_shards(checkpoint: Path, environ: Mapping[str, str]) -> None:
    """Checks that as many processes resume as wrote the optimizer's state, one file each."""
    written = len(list(checkpoint.glob("*_optim_states.pt")))
    world = _num_processes(environ)
    if world is not None and written and written != world:
        raise TrainingInputError(
            f"--resume {checkpoint}: written by {written} process(es), but this training has "
            f"{world}; DeepSpeed resumes only with as many: set NPROC_PER_NODE and NNODES, or "
            "start from its weights by model.pretrained_pth"
        )


def _num_processes(environ: Mapping[str, str]) -> int | None:
    """Returns the number of processes; None if the launcher will report a wrong one."""
    if "RANK" in environ:  # one of the processes that the user's torchrun started
        return int(environ["WORLD_SIZE"]) if "WORLD_SIZE" in environ else None
    try:
        processes = Processes.from_environ(environ)
    except LaunchError:
        return None
    return processes.nnodes * processes.nproc_per_node


def _check_numbers(cfg: dict[str, Any]) -> None:
    for path in _POSITIVE:
        value = _at(cfg, path)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise TrainingInputError(
                f"{path}: expected a whole number of at least 1, found {value!r}"
            )
    rate = _at(cfg, "optim_wrapper.optimizer.lr")
    if rate is not None and not (
        isinstance(rate, int | float) and rate >= 0 and math.isfinite(rate)
    ):
        raise TrainingInputError(f"optim_wrapper.optimizer.lr: expected at least 0, found {rate!r}")


def _typed_parts(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "type" in value:
            yield where, value
        for key, item in value.items():
            yield from _typed_parts(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _typed_parts(item, f"{where}[{index}]")


def _check_names(where: str, part: dict[str, Any]) -> None:
    """Checks the argument names of this project's classes and the names of prompt templates."""
    template = str(_dotted(part.get("template")))
    if template.startswith("xtuner.utils.PROMPT_TEMPLATE."):
        name = template.rpartition(".")[2]
        if name not in PROMPT_TEMPLATES:
            hint = did_you_mean(name, PROMPT_TEMPLATES)
            raise TrainingInputError(f"{where}.template: no PROMPT_TEMPLATE.{name}{hint}")
    dotted = _dotted(part["type"])
    if not isinstance(dotted, str) or not dotted.startswith("pallava."):
        return
    accepted = _accepted(*dotted.rsplit(".", 1))
    for name in part:
        if accepted is not None and name not in accepted and name != "type":
            hint = did_you_mean(name, accepted)
            raise TrainingInputError(f"{where}.{name}: {dotted} has no such argument{hint}")


def _accepted(module: str, name: str) -> set[str] | None:
    """Parses the arguments of a class from its source, because an import would start torch."""
    # find_spec("pallava.engine.hooks") would import pallava.engine and XTuner, so build the path.
    file = Path(pallava.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    arguments = function.args
                    if arguments.kwarg is not None:
                        return None
                    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                    return {argument.arg for argument in every} - {"self"}
    return None


def _check_model(model: dict[str, Any]) -> None:
    llm = model["llm"]
    config = None
    if isinstance(llm, dict):
        config = _check_language_model("model.llm", llm.get("pretrained_model_name_or_path"))
    encoder = model.get("visual_encoder")
    vision = None
    if isinstance(encoder, str) and not (":" in encoder and not Path(encoder).exists()):
        vision = _check_encoder(encoder)
    layers, layer = (vision or {}).get("num_hidden_layers"), model.get("visual_select_layer", -2)
    if isinstance(layers, int) and not (isinstance(layer, int) and -layers - 1 <= layer <= layers):
        raise TrainingInputError(
            f"model.visual_select_layer: expected {-layers - 1} to {layers}, since {encoder} has "
            f"{layers} layers, found {layer!r}"
        )
    pretrained = model.get("pretrained_pth")
    if pretrained is not None:
        _check_checkpoint(model, str(pretrained), config, vision)


def _check_language_model(where: str, name: Any) -> dict[str, Any] | None:
    """Returns the contents of `config.json` of a local folder; None for a name on the hub."""
    if not isinstance(name, str):
        return None
    folder = Path(name)
    if not folder.is_dir():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.exists()
        if looks_local or folder.parent.is_dir():
            raise TrainingInputError(
                f"{where}: language model {name}: no such folder; set "
                "pretrained_model_name_or_path to a folder, or to a name on the hub (owner/name)"
            )
        return None
    config = _json_object(folder / "config.json", where)
    kind = str(config.get("model_type"))
    if kind in ("clip", "clip_vision_model", "siglip", "bert", "pallava") or (
        "vision_config" in config
    ):
        raise TrainingInputError(
            f"{where}: expected a causal language model, found a model of type {kind} in {folder}"
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise TrainingInputError(f"{where}: {folder}: no weights (*.safetensors or *.bin)")
    return config


def _check_encoder(encoder: str) -> dict[str, Any]:
    folder = Path(encoder)
    if not folder.is_dir():
        raise TrainingInputError(
            f"model.visual_encoder: PLIP folder {encoder}: no such folder; set it to a folder with "
            "config.json and weights of PLIP or CLIP"
        )
    config = _json_object(folder / "config.json", "model.visual_encoder")
    config = config.get("vision_config") or config
    if "num_attention_heads" not in config or "image_size" not in config:
        raise TrainingInputError(
            f"model.visual_encoder: expected a CLIP vision encoder, found "
            f"{config.get('model_type')} in {folder / 'config.json'}"
        )
    return dict(config)


def _check_checkpoint(
    model: dict[str, Any],
    path: str,
    llm: dict[str, Any] | None,
    vision: dict[str, Any] | None,
) -> None:
    if not Path(path).exists():
        raise TrainingInputError(f"model.pretrained_pth: {path}: no such checkpoint")
    from pallava.release.zero import load_checkpoint
    from pathcore.weights import CheckpointError, check_finite

    try:
        tensors = load_checkpoint(path, mmap=Path(path).is_file())
        check_finite(tensors, path)
    except CheckpointError as error:
        raise TrainingInputError(f"model.pretrained_pth: {error}") from error
    rank = (model.get("llm_lora") or {}).get("r")
    for name, tensor in tensors.items():
        if ".lora_A." in name and isinstance(rank, int) and tensor.shape[0] != rank:
            raise TrainingInputError(
                f"model.pretrained_pth: {path} has LoRA rank {tensor.shape[0]}, but "
                f"model.llm_lora.r is {rank}; set r={tensor.shape[0]} and lora_alpha to the values "
                "of that training"
            )
        # The output of the connector's last layer has the width of the language model, the input of
        # its cross-attention that of the encoder.
        for what, config, ending, axis in (
            ("language model", llm, "projector.model.mlp.0.weight", 0),
            ("vision encoder", vision, "crossattention.self.key.weight", 1),
        ):
            width = (config or {}).get("hidden_size")
            if width and name.endswith(ending) and tensor.shape[axis] != width:
                raise TrainingInputError(
                    f"model.pretrained_pth: {path} belongs to a {what} of width "
                    f"{tensor.shape[axis]} ({name}), but the one of the config has width {width}"
                )


def _check_tokenizer(cfg: dict[str, Any]) -> None:
    for where in ("tokenizer", "train_dataloader.dataset.tokenizer"):
        name = _at(cfg, f"{where}.pretrained_model_name_or_path")
        if isinstance(name, str) and not Path(name).is_dir() and name.startswith((".", "/", "~")):
            raise TrainingInputError(f"{where}: {name}: no such folder")
        folder = Path(name) if isinstance(name, str) else None
        if folder and folder.is_dir() and not any([*folder.glob("tok*"), *folder.glob("vocab*")]):
            raise TrainingInputError(f"{where}: {name}: no tokenizer files in this folder")


def _check_dataset(dataset: dict[str, Any]) -> int | None:
    """Checks paths and the first rows; returns the number of rows, or None if unknown."""
    where = "train_dataloader.dataset"
    images = dataset.get("image_folder")
    for name in ("image_folder", "features_folder"):
        folder = dataset.get(name)
        if isinstance(folder, str) and not Path(folder).is_dir():
            what = "expected a folder, found a file" if Path(folder).exists() else "no such folder"
            raise TrainingInputError(f"{where}.{name}: {name} {folder}: {what}")
    processed = dataset.get("offline_processed_text_folder")
    if isinstance(processed, str):
        if not (Path(processed) / "dataset_info.json").is_file():
            raise TrainingInputError(
                f"{where}.offline_processed_text_folder: {processed}: not a folder that "
                "`xtuner-add tokenise` wrote"
            )
        return None
    data_path = dataset.get("data_path")
    if not isinstance(data_path, str) or "pallava." not in str(_dotted(dataset.get("type"))):
        return None
    field = "slide" if "features_folder" in dataset else "image"
    faults: dict[str, str] = {}
    absent: dict[str, str] = {}
    total = with_images = 0
    try:
        for number, row in itertools.islice(read_rows(data_path, what="data_path"), _ROWS_CHECKED):
            total += 1
            fault = (
                check_row(row, field) if isinstance(row, Mapping) else f"not an object: {row!s:.80}"
            )
            if fault:
                faults[str(number)] = f"{data_path}, row {number}: {fault}"
                continue
            files = image_files(row, field)
            with_images += bool(files)
            if field == "image" and isinstance(images, str):
                for file in files:
                    if not (Path(images) / file).is_file():
                        absent[str(number)] = f"row {number}: {Path(images) / file}"
        # The training skips a few bad rows; if most of the first rows are bad, the file is wrong.
        check_fraction(
            len(faults), total, f"data_path {data_path}", faults, most=1, max_fraction=0.5
        )
        check_fraction(
            len(absent), with_images, f"image_folder {images}", absent, most=1, max_fraction=0.9
        )
    except (ValueError, OSError) as error:
        raise TrainingInputError(f"{where}: {' '.join(str(error).split())}") from error
    if not total:
        raise TrainingInputError(f"{where}.data_path: {data_path}: no rows")
    if total < _ROWS_CHECKED:
        return total
    with Path(data_path).open("rb") as lines:
        return sum(1 for line in lines if line.strip()) if data_path.endswith(".jsonl") else None


def _check_schedule(cfg: dict[str, Any], rows: int, environ: Mapping[str, str]) -> None:
    """Rejects a warm-up below two iterations, which keeps the learning rate at its start value."""
    batch = _at(cfg, "train_dataloader.batch_size")
    schedulers = cfg.get("param_scheduler")
    world = _num_processes(environ)
    if world is None or not isinstance(batch, int) or not isinstance(schedulers, list):
        return
    steps = math.ceil(rows / (batch * world))
    for index, scheduler in enumerate(schedulers):
        if not isinstance(scheduler, dict) or not scheduler.get("convert_to_iter_based"):
            continue
        begin, end = scheduler.get("begin", 0), scheduler.get("end")
        if "LinearLR" not in str(_dotted(scheduler.get("type"))) or not end:
            continue
        warmup = int(end * steps) - int(begin * steps)
        if warmup < 2:
            needed = math.ceil(200 / steps) / 100
            raise TrainingInputError(
                f"param_scheduler[{index}]: the warm-up of {end:g} epochs is {warmup} "
                f"iteration(s): {rows} rows are {steps} iteration(s) an epoch "
                f"({world} process(es) x batch {batch}). Below 2 iterations the learning rate "
                f"stays at its start value; set param_scheduler.{index}.end={needed + begin:g} "
                f"and param_scheduler.{index + 1}.begin={needed + begin:g}, or a smaller batch"
            )


def _json_object(file: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise TrainingInputError(
            f"{where}: {file.parent}: no {file.name} in this folder"
        ) from error
    except (OSError, ValueError) as error:
        raise TrainingInputError(f"{where}: {file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TrainingInputError(f"{where}: {file}: expected a JSON object")
    return value


def _dotted(value: Any) -> Any:
    """Returns the dotted name of a class or lazily imported object; other values unchanged."""
    if type(value).__name__ in ("LazyObject", "LazyAttr"):
        return f"{value._module}.{value}"
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _at(cfg: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(cfg, dict):
            return None
        cfg = cfg.get(name)
    return cfg
