"""``xtuner-add probe-tiles`` and ``finetune-slides``: classifiers over stored tile embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xtuner_add.launch import (
    EXIT_SAMPLES_SKIPPED,
    LaunchError,
    child_environ,
    run_child,
    torchrun_command,
)
from xtuner_add.release_commands import user_errors

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_ANY = click.Path(exists=True, path_type=Path)
_OUT = click.Path(file_okay=False, path_type=Path)

_STARTED_HERE = "XTUNER_ADD_STARTED_HERE"
"""Environment variable of processes whose results the one that started them will show."""

_OPTION = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting instead of the recipe's; may be given again.",
)
_DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU, if any."
)


class RestartableCommand(click.Command):
    """A command that remembers its arguments, to start itself in several processes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses, and keeps what was typed."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)


@click.command("probe-tiles")
@click.argument("embeddings", type=_ANY)
@click.option("--output", required=True, type=_OUT)
@click.option(
    "--labels",
    type=_FILE,
    help="csv with input, label, split; by default the one among the embeddings.",
)
@click.option("--recipe", help="A YAML file, or the name of one of ours: pcam.")
@_OPTION
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("linear_probe",),
    show_default=True,
    help="linear_probe, knn or logistic; may be given again.",
)
@click.option("--embed-dim", type=int, help="By default that of most embeddings.")
@_DEVICE
@click.pass_context
def probe_tiles(
    ctx: click.Context,
    embeddings: Path,
    output: Path,
    labels: Path | None,
    recipe: str | None,
    options: tuple[str, ...],
    methods: tuple[str, ...],
    embed_dim: int | None,
    device: str | None,
) -> None:  # fmt: skip
    """Train a linear probe on EMBEDDINGS, a zip or folder of one .pt per tile, and test it.

    A zip is read as it is. Without a recipe the protocol published for PCam holds. Run again after
    a stop: it continues. Tiles that cannot be used are listed in skipped.jsonl, and the exit code
    is 3.
    """
    from gigapath.finetune.probe import ProbeSettings
    from gigapath.finetune.probe import probe_tiles as probe
    from gigapath.finetune.recipes import read_settings

    with user_errors():
        settings = read_settings(
            ProbeSettings, recipe and find_recipe(recipe), read_options(options)
        )
        results = probe(
            embeddings,
            labels,
            output,
            settings=settings,
            methods=methods,
            embed_dim=embed_dim,
            device=device,
        )
    _end(ctx, output, results)


@click.command("finetune-slides", cls=RestartableCommand)
@click.argument("features", type=_FOLDER)
@click.option(
    "--labels",
    required=True,
    type=_FILE,
    help="csv with slide_id, label (or a column of 0 and 1 per class) and, for patients, pat_id.",
)
@click.option("--output", required=True, type=_OUT)
@click.option(
    "--splits",
    type=_FOLDER,
    help="Folder of train_0.csv, val_0.csv, test_0.csv ...; by default made from the labels.",
)
@click.option(
    "--recipe",
    default="cohort",
    show_default=True,
    help="A YAML file, or the name of one of ours: cohort, panda, panda_flash, mutation_5_gene.",
)
@click.option("--task", help="A YAML file, or panda or mutation_5_gene, instead of the recipe's.")
@_OPTION
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("slide_encoder",),
    show_default=True,
    help="slide_encoder, abmil, knn or logistic; may be given again.",
)
@click.option(
    "--slide-embeddings",
    type=_FOLDER,
    help="For knn and logistic: SLIDE.h5 or .pt; by default the mean over the tiles.",
)
@_DEVICE
@click.pass_context
def finetune_slides(
    ctx: click.Context,
    features: Path,
    labels: Path,
    output: Path,
    splits: Path | None,
    recipe: str,
    task: str | None,
    options: tuple[str, ...],
    methods: tuple[str, ...],
    slide_embeddings: Path | None,
    device: str | None,
) -> None:  # fmt: skip
    """Fine-tune the slide encoder on FEATURES, a folder with SLIDE.h5 or SLIDE.pt, and test it.

    Several processes: NPROC_PER_NODE; several machines: NNODES, NODE_RANK, ADDR, PORT. Effective
    batch and result stay the same. Run again after a stop: it continues. Slides that cannot be used
    are listed in skipped.jsonl, and the exit code is 3.
    """
    try:
        command = torchrun_command(
            ["-m", "xtuner_add.cli", "finetune-slides", *ctx.meta["arguments"]], os.environ
        )
    except LaunchError as error:
        raise click.UsageError(str(error), ctx) from error
    if command is not None:
        if code := run_child(command, {**child_environ(os.environ), _STARTED_HERE: "1"}):
            ctx.exit(code)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        _end(ctx, output, results)
        return
    from gigapath.finetune.recipes import read_settings
    from gigapath.finetune.run import finetune_slides as finetune
    from gigapath.finetune.settings import FinetuneSettings

    with user_errors():
        file = find_recipe(recipe)
        results = finetune(
            features,
            labels,
            find_task(task, file),
            output,
            splits=splits,
            settings=read_settings(FinetuneSettings, file, read_options(options), others=("task",)),
            methods=methods,
            models=bag_models() if "abmil" in methods else None,
            vectors=slide_embeddings,
            device=device,
        )
    if "RANK" not in os.environ:
        _end(ctx, output, results)
    elif os.environ["RANK"] == "0" and _STARTED_HERE not in os.environ:
        # torchrun takes any other exit code than 0 for a crash, so 3 is not given here.
        _show(output, results)


def bag_models() -> dict[str, Any]:
    """Attention MIL, with its own learning rate and epochs, as a model of the fine-tuning."""
    import torch
    from torch import Tensor, nn

    from gigapath.finetune.run import BagModel
    from pathgen.mil import MILSettings
    from pathgen.mil_models import ABMIL

    class Bags(nn.Module):
        """`ABMIL`, which takes a slide, over a batch of them."""

        def __init__(self, in_dim: int, num_classes: int) -> None:
            super().__init__()
            self.abmil = ABMIL(in_dim, num_classes)

        def forward(self, features: Tensor, coords: Tensor, lengths: Sequence[int]) -> Tensor:
            bags = zip(features, lengths, strict=True)
            return torch.stack([self.abmil(bag[:length]).logits for bag, length in bags])

    own = MILSettings()
    settings = {
        "epochs": own.epochs,
        "lr": own.lr,
        "min_lr": 0.0,
        "warmup_epochs": 0.0,
        "optim_wd": own.weight_decay,
        "layer_decay": 1.0,
        "gc": 1,
        "batch_size": 1,
        "model_select": "val",
        "patience": 0,
    }
    return {"abmil": BagModel(Bags, settings)}


def find_recipe(name: str) -> Path:
    """The file that a recipe argument means: a path, or the bare name of one of ours.

    Raises:
        FileNotFoundError: Neither.
    """
    return _find("recipe", name, "gigapath")


def find_task(name: str | None, recipe: Path) -> Path:
    """The file of a task: named here, or by the recipe, relative to it.

    Raises:
        FileNotFoundError: No such task.
        ValueError: Neither names one.
    """
    from gigapath.finetune.recipes import read_yaml

    if name is not None:
        return _find("task", name, "gigapath/tasks")
    own = read_yaml(recipe).get("task")
    if not own:
        raise ValueError(f"recipe {recipe}: names no task; give one by --task")
    return recipe.parent / str(own)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` with values as in YAML.

    Raises:
        ValueError: No `=`.
    """
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: NAME=VALUE expected")
        try:
            found[name.replace("-", "_")] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise ValueError(f"--option {text}: {error}") from error
    return found


def _find(what: str, name: str, folder: str) -> Path:
    from xtuner_add.paths import configs_dir

    known = {path.stem: path for path in sorted((configs_dir() / folder).glob("*.yml"))}
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise FileNotFoundError(f"{what} {name}: neither a file nor one of {sorted(known)}")
    return known[name]


def _show(output: Path, results: dict[str, Any]) -> None:
    click.echo((output / "results.md").read_text(encoding="utf-8"))
    if results["num_skipped"]:
        click.echo(f"{results['num_skipped']} left out: see {output / 'skipped.jsonl'}", err=True)


def _end(ctx: click.Context, output: Path, results: dict[str, Any]) -> None:
    _show(output, results)
    if results["num_skipped"]:
        ctx.exit(EXIT_SAMPLES_SKIPPED)
