"""`xtuner-add list-cfg`, `copy-cfg` and `plan`, for XTuner's configs and ours.

XTuner's own commands only know its configs, which are single files. Ours inherit, so a copy needs
the base files too.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xtuner_add.commands.options import (
    COUNT,
    COUNT_OR_0,
    counted,
    example,
    name_values,
    user_errors,
)
from xtuner_add.paths import find_config, own_configs, xtuner_configs

if TYPE_CHECKING:
    from pallava.engine.planning import MemoryPlan, TrainingPlan

_GIB = 2**30
_GPU_SIZES_GIB = (24, 40, 80)
_RESERVED_GIB = 1
"""Memory that CUDA and its libraries allocate before any computation."""


@click.command("list-cfg", epilog=example("list-cfg", "--pattern pallava"))
@click.option("-p", "--pattern", default="", help="Show only names that contain this text.")
def list_cfg(pattern: str) -> None:
    """List the configs that have a name: this project's, then XTuner's."""
    try:
        sections = {"xtuner-add": own_configs(), "XTuner": xtuner_configs()}
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    for title, configs in sections.items():
        names = [name for name in sorted(configs) if pattern.lower() in name.lower()]
        click.echo(f"{title}: {counted(len(names), 'config')}")
        for name in names:
            click.echo(f"  {name}")


@click.command("copy-cfg", epilog=example("copy-cfg", "pallava_domain_alignment my_configs"))
@click.argument("name")
@click.argument("save_dir", type=click.Path(file_okay=False, path_type=Path))
def copy_cfg(name: str, save_dir: Path) -> None:
    """Copy the config NAME to SAVE_DIR, with the files that it inherits from.

    The copy is called NAME_copy.py. Existing files are not overwritten.
    """
    with user_errors(SyntaxError):
        config = find_config(name)
        copies = {config: save_dir / f"{config.stem}_copy.py"}
        for base in inherited_files(config):
            if not base.is_relative_to(config.parent):
                raise click.ClickException(f"{config} inherits from {base}, outside its folder")
            copies[base] = save_dir / base.relative_to(config.parent)
        for source, target in copies.items():
            if target.is_file():
                click.echo(f"Kept {target}")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            click.echo(f"Copied {target}")


def inherited_files(config: Path) -> list[Path]:
    """Returns all files that a config inherits from, directly or indirectly.

    Supports both styles of MMEngine: `read_base()`, and a string or list `_base_`.
    """
    found: list[Path] = []
    for statement in ast.walk(ast.parse(config.read_text(encoding="utf-8"), str(config))):
        for base in _bases_of(statement, config):
            found += [base, *inherited_files(base)]
    return list(dict.fromkeys(found))


def _bases_of(statement: ast.AST, config: Path) -> list[Path]:
    if isinstance(statement, ast.ImportFrom) and statement.level:
        folder = config.parents[statement.level - 1]
        return [folder.joinpath(*(statement.module or "").split(".")).with_suffix(".py")]
    if isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "_base_" for target in statement.targets
    ):
        names = ast.literal_eval(statement.value)
        return [config.parent / name for name in ([names] if isinstance(names, str) else names)]
    return []


@click.command(
    "plan",
    epilog=example(
        "plan",
        "pallava_qlora_domain_alignment",
        "pallava_domain_alignment --gpus 16 --zero 2 --text-tokens 300",
    ),
)
@click.argument("config")
@click.option(
    "--gpus",
    default=1,
    show_default=True,
    type=COUNT,
    help="GPUs over which DeepSpeed partitions.",
)
@click.option(
    "--zero",
    default="0",
    show_default=True,
    type=click.Choice(["0", "2", "3"]),
    help="DeepSpeed's stage; 0 without DeepSpeed.",
)
@click.option(
    "--batch-size",
    type=COUNT,
    help="Samples per GPU and iteration. [default: the config's]",
)
@click.option(
    "--num-images",
    "images",
    default=1,
    show_default=True,
    type=COUNT_OR_0,
    help="Images per sample.",
)
@click.option(
    "--sub-images",
    type=COUNT_OR_0,
    help="Sub-images per image. [default: 8, the most; 0 for thumbnails alone]",
)
@click.option(
    "--text-tokens",
    default=256,
    show_default=True,
    type=COUNT,
    help="Text tokens per sample, all of which are learned.",
)
@click.option(
    "--llm",
    help="Folder with the language model's config.json, or its name on the hub. "
    "[default: the config's]",
)
@click.option("--visual-encoder", help="Vision encoder. [default: the config's]")
@click.option(
    "--cfg-options", multiple=True, metavar="KEY=VALUE", help="Override settings of the config."
)
def plan(
    config: str,
    llm: str | None,
    visual_encoder: str | None,
    cfg_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Estimate the GPU memory of the training CONFIG before it runs.

    Needs neither a GPU nor weights: of the language model, only config.json is read. The model is
    built without data, and a training step is traced for the heaviest batches: one with the given
    text, and one with the longest text that the config allows. Fused attention is assumed.
    """
    from pallava.engine.planning import TrainingPlan
    from xtuner_add.training_check import read_config

    with user_errors(TypeError):  # such as LoraConfig's for an unknown argument
        file = find_config(config)
        from mmengine.config import DictAction

        changes = {
            key: DictAction._parse_iterable(value)
            for key, value in name_values("--cfg-options", cfg_options).items()
        }
        read_config(file, changes)
        training = TrainingPlan(file, llm=llm, visual_encoder=visual_encoder, options=changes)
        lines = _plan_lines(training, **options)
    click.echo("\n".join(lines))


def _plan_lines(
    training: TrainingPlan,
    gpus: int,
    zero: str,
    batch_size: int | None,
    images: int,
    sub_images: int | None,
    text_tokens: int,
) -> list[str]:
    from tabulate import tabulate

    from pallava.engine.planning import Batch

    rows = [
        (
            part.name,
            f"{part.parameters:,}",
            f"{part.trained:,}",
            ", ".join(part.dtypes),
            f"{part.held_bytes / _GIB:.2f}",
        )
        for part in training.parts()
        if part.parameters
    ]
    samples = batch_size or training.batch_size
    tiles = training.max_sub_images if sub_images is None else sub_images
    plans: dict[str, MemoryPlan] = {}
    for tokens in dict.fromkeys((text_tokens, training.max_length)):
        for checkpointing in (True, False):
            name = f"{tokens:,} tokens" + ("" if checkpointing else ", all kept")
            plans[name] = training.estimate(
                Batch(samples, tiles, tokens, images),
                gpus=gpus,
                zero=int(zero),  # type: ignore[arg-type]
                checkpointing=checkpointing,
            )
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "total")
    table = [
        [name, *(f"{getattr(plan, name) / _GIB:.2f}" for plan in plans.values())] for name in names
    ]
    for size in _GPU_SIZES_GIB:
        room = (size - _RESERVED_GIB) * _GIB
        fits = ["fits" if plan.total <= room else "-" for plan in plans.values()]
        table.append([f"{size} GiB", *fits])
    engine = f"ZeRO-{zero}" if zero != "0" else "no DeepSpeed"
    right = ("left", "right", "right", "left", "right")
    numbers = ("left", *("right" for _ in plans))
    return [
        tabulate(rows, ("part", "parameters", "trained", "type", "GiB"), "simple", colalign=right,
                 disable_numparse=True),
        "",
        f"GiB on each of {counted(gpus, 'GPU')}, {engine}, {counted(samples, 'sample')} with "
        f"{counted(images, 'image')} of {counted(tiles, 'sub-image')}:",
        "",
        tabulate(table, ("", *plans), "simple", colalign=numbers, disable_numparse=True),
        "",
        *(f"Note: {note}" for note in training.notes),
        '"all kept" is without activation checkpointing. A GPU fits with '
        f"{_RESERVED_GIB} GiB to spare for CUDA; fragmentation may take more.",
    ]  # fmt: skip
