"""`xtuner-add pth-to-hf`, `merge`, `export` and the other steps to a release."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from xtuner_add.commands.options import (
    ANY_PATH,
    COUNT,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    add_options,
    counted,
    device_option,
    example,
    user_errors,
)
from xtuner_add.paths import find_config


def _checks_result(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of commands that merge adapters into a base model."""
    options = [
        click.option(
            "--force-base",
            is_flag=True,
            help="Merge even if the adapter seems to belong to another base model.",
        ),
        click.option(
            "--no-probe",
            "probe",
            is_flag=True,
            flag_value=False,
            default=True,
            help="Do not compare the logits of a few tokens with those of PEFT.",
        ),
    ]
    return add_options(function, options)


@click.command(
    "merge", epilog=example("merge", "Meta-Llama-3-8B-Instruct parts/llm_adapter merged")
)
@click.argument("base", type=FOLDER)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.argument("out", type=ANY_PATH)
@device_option
@_checks_result
def merge(base: Path, adapters: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Merge LoRA ADAPTERS into the model BASE and write the folder OUT.

    Works shard by shard, so memory use does not depend on the size of the model. Data types are
    those of BASE. An interrupted run continues when the same command is run again.
    """
    from pallava.release.merge import merge as merge_folders

    with user_errors():
        digests = merge_folders(base, adapters, out, **options)
    click.echo(f"Wrote {out}: {counted(len(digests), 'file')}, digests verified")


@click.command("split", epilog=example("split", "model shards"))
@click.argument("model", type=FOLDER)
@click.argument("out", type=ANY_PATH)
def split(model: Path, out: Path) -> None:
    """Write MODEL to OUT with one tensor per shard."""
    from pallava.release.merge import merge as merge_folders

    with user_errors():
        digests = merge_folders(model, [], out, device="cpu", one_tensor_per_shard=True)
    click.echo(f"Wrote {out}: {counted(len(digests), 'file')}, digests verified")


@click.command(
    "check-merge",
    epilog=example("check-merge", "Meta-Llama-3-8B-Instruct parts/llm_adapter merged"),
)
@click.argument("base", type=FOLDER)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.argument("merged", type=FOLDER)
@click.option(
    "--force-base", is_flag=True, help="Check even if the adapter seems to belong to another model."
)
def check_merge(base: Path, adapters: tuple[Path, ...], merged: Path, force_base: bool) -> None:
    """Check that MERGED equals BASE with ADAPTERS merged in, to within one rounding step.

    The exit code is 1 if it does not.
    """
    from pallava.release.merge import check_merge as check

    with user_errors():
        result = check(base, adapters, merged, force_base=force_base)
    click.echo(f"{result.num_equal} of {result.num_tensors} tensors are bitwise equal")
    if result.roundings:
        click.echo(f"largest difference: {result.roundings:.3g} rounding steps, in {result.worst}")
    if result.roundings > 1:
        raise click.ClickException(f"{merged} is not {base} with these adapters")


@click.command("extract-adapter", epilog=example("extract-adapter", "base tuned adapter --rank 64"))
@click.argument("base", type=FOLDER)
@click.argument("tuned", type=FOLDER)
@click.argument("out", type=ANY_PATH)
@click.option("--rank", type=COUNT, default=128, show_default=True, help="Rank of the adapter.")
def extract_adapter(base: Path, tuned: Path, out: Path, rank: int) -> None:
    """Write a LoRA adapter that turns the model BASE into the model TUNED."""
    from pallava.release.extract import extract_adapter as extract

    with user_errors():
        lost = extract(base, tuned, out, rank=rank)
    click.echo(f"Wrote {out}; at most {lost:.2%} of the difference of a matrix is lost")


@click.command("pth-to-hf", epilog=example("pth-to-hf", "my_config.py iter_5198.pth parts"))
@click.argument("config")
@click.argument("pth", type=FILE_OR_FOLDER)
@click.argument("out", type=ANY_PATH)
@click.option("--visual-encoder", type=FOLDER, help="PLIP folder. [default: the config's]")
@click.option("--fp32", is_flag=True, help="Keep the adapter in fp32. [default: half precision]")
def pth_to_hf(config: str, pth: Path, out: Path, visual_encoder: Path | None, fp32: bool) -> None:
    """Write adapter, connector, encoder, processor and tokenizer of the checkpoint PTH to OUT.

    PTH is a .pth file or a DeepSpeed ZeRO-1, -2 or -3 folder; CONFIG is the training config, a file
    or a name that `xtuner-add list-cfg` shows. The language model is not built. XTuner's own
    converter, `convert pth_to_hf`, builds the whole model, which takes its weights and memory, and
    does not record what `export` needs.
    """
    from pallava.engine.recipe import read_recipe
    from pallava.release.pth_to_hf import convert_checkpoint

    with user_errors():
        file = find_config(config)
        encoder = str(visual_encoder) if visual_encoder else None
        recipe, save_tokenizer = read_recipe(file, visual_encoder=encoder)
        digests = convert_checkpoint(
            pth, recipe, out, save_tokenizer=save_tokenizer, config_file=file, fp32=fp32
        )
    click.echo(f"Wrote {out}: {counted(len(digests), 'file')}, digests verified")


@click.command("export", epilog=example("export", "Meta-Llama-3-8B-Instruct parts model"))
@click.argument("base", type=FOLDER)
@click.argument("converted", type=FOLDER)
@click.argument("out", type=ANY_PATH)
@click.option(
    "--layout",
    type=click.Choice(["pallava", "llava"]),
    default="pallava",
    show_default=True,
    help="llava: for transformers' own LLaVA classes, if the connector permits.",
)
@click.option(
    "--scores",
    type=FILE,
    multiple=True,
    help="metrics.json of an evaluation, for the model card, with the verdict of an audit beside "
    "it; may be repeated.",
)
@device_option
@_checks_result
def export(
    base: Path, converted: Path, out: Path, scores: tuple[Path, ...], **options: Any
) -> None:
    """Write one folder that transformers loads: encoder, connector, merged language model.

    BASE is the language model, CONVERTED the folder that `xtuner-add pth-to-hf` wrote.
    """
    from pallava.evaluation.audit import read_audits
    from pallava.evaluation.report import read_scores
    from pallava.release.export import export as export_folder

    with user_errors():
        digests = export_folder(
            base,
            converted,
            out,
            scores=read_scores(scores),
            audits=read_audits(scores),
            **options,
        )
    click.echo(f"Wrote {out}: {counted(len(digests), 'file')}, digests verified")


@click.command("quantise", epilog=example("quantise", "model model-4bit --bits 4"))
@click.argument("model", type=FOLDER)
@click.argument("out", type=ANY_PATH)
@click.option("--bits", type=click.Choice(["8", "4"]), required=True)
@device_option
def quantise(model: Path, out: Path, bits: str, device: str | None) -> None:
    """Write the exported MODEL to OUT with its language model in 8 or 4 bits.

    The linear layers are quantised by bitsandbytes: 8 bits by LLM.int8(), 4 bits by NF4. OUT is
    loaded like MODEL, and needs bitsandbytes.
    """
    from pallava.release.quantise import quantise as quantise_folder

    with user_errors(ImportError):
        digests = quantise_folder(model, out, bits=8 if bits == "8" else 4, device=device)
    click.echo(f"Wrote {out}: {counted(len(digests), 'file')}, digests verified")


@click.command("push", epilog=example("push", "model owner/name"))
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@click.option(
    "--yes", is_flag=True, help="Upload; without this option nothing leaves this machine."
)
@click.option("--public", is_flag=True, help="Make the repository public.")
def push(folder: Path, repository: str, yes: bool, public: bool) -> None:
    """Publish FOLDER as REPOSITORY (owner/name) on the Hugging Face hub.

    Lists the files to upload; uploads them only with --yes, using the token in HF_TOKEN.
    """
    from pallava.release.hub import plan_push
    from pallava.release.hub import push as push_folder

    with user_errors():
        plan = plan_push(folder, repository)
        for name, size in plan.files.items():
            click.echo(f"{size:>14,} B  {name}")
        if not yes:
            click.echo(f"Nothing was uploaded. To publish as {repository}, add --yes.")
            return
        address = push_folder(folder, plan, private=not public)
    click.echo(f"Published: {address}")
