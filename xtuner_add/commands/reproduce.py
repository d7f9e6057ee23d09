"""`xtuner-add reproduce`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pathcore.exit_codes import EXIT_SKIPPED
from xtuner_add.commands.options import OUT_FOLDER, Number, example, name_values, user_errors


@click.command(
    "reproduce",
    epilog=example(
        "reproduce",
        "--list",
        "quilt-vqa-red-closed model=llava/ data=quiltvqa_red_test_w_ans.json images=red_circle/ "
        "--work-dir runs/red",
    ),
)
@click.argument("card", required=False)
@click.argument("inputs", nargs=-1, metavar="[NAME=PATH]...")
@click.option("--list", "lists", is_flag=True, help="List the cards and what each needs.")
@click.option("--work-dir", type=OUT_FOLDER, help="[default: work_dirs/reproduce_CARD]")
@click.option(
    "--published", type=Number(), help="Figure to compare with, instead of the one on the card."
)
@click.option("--all", "all_arms", is_flag=True, help="Also switch the choices if it reproduces.")
@click.option(
    "--extra", default="", help="Options for every run, in quotes: '--device cuda --batch-size 32'."
)
@click.pass_context
def reproduce(
    ctx: click.Context,
    card: str | None,
    inputs: tuple[str, ...],
    lists: bool,
    work_dir: Path | None,
    published: float | None,
    all_arms: bool,
    extra: str,
) -> None:
    """Measure the published figure of CARD, and attribute a difference to its cause.

    CARD is a name from --list or a YAML file. The command behind the figure runs with the published
    choices; if the result differs by more than the card's tolerance, it runs again with one choice
    (prompt, scoring, decoding, resize, subset, template) changed at a time. Finished runs are kept
    and not repeated. The report is written to reproduction.json and reproduction.md.

    The exit code says whether the runs worked, not whether the figure was reproduced: 0 for all, 3
    if one with a changed choice failed or one skipped something, 1 if the published one failed.
    """
    from xtuner_add.reproduction import Reproduction, card_files, load_card, table

    if lists or card is None:
        if not lists:
            raise click.MissingParameter("name a card, or --list", ctx, param_type="argument")
        for name in card_files():
            found = load_card(name)
            figure = "no figure" if found.published is None else f"{found.published:g}"
            click.echo(f"{name}\n  {found.title}: {figure} ({found.source})")
            for key, what in found.inputs.items():
                click.echo(f"  {key}: {what}")
        return
    try:
        found = load_card(card)
        run = Reproduction(
            found,
            name_values("input", inputs),
            work_dir or Path("work_dirs", f"reproduce_{found.name}"),
            extra=shlex.split(extra),
            published=published,
        )
    except ValueError as error:  # nothing has run yet
        raise click.UsageError(str(error), ctx) from error
    with user_errors():
        report = run.run(all_arms=all_arms)
    click.echo(table(report))
    click.echo(f"Written to {run.folder}")
    if report["failed"] or report["incomplete"]:
        ctx.exit(EXIT_SKIPPED)
