"""``xtuner-add describe``, ``revise``, ``summarise`` and the rest between patches and pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pathcore.exit_codes import EXIT_SKIPPED
from xtuner_add.commands.options import (
    FILE,
    FOLDER,
    OUT_FILE,
    add_options,
    user_errors,
    weight_values,
)

if TYPE_CHECKING:
    from pathgen.agents.steps import Step

_STEPS = ("length", "markup", "refusal", "leak", "loop", "exact", "near")

_WHOM = (
    click.option("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1; key in the "
                 "environment variable OPENAI_API_KEY."),
    click.option("--model", help="The model's name at the endpoint."),
    click.option("--local", metavar="MODEL", help="Instead: a Hugging Face image-text-to-text "
                 "model, folder or name."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with --local."),
    click.option("--device", help="Of --local; by default a GPU where there is one."),
    click.option("--batch-size", default=4, show_default=True, help="Of --local."),
)  # fmt: skip
_HOW = (
    click.option("--concurrency", default=8, show_default=True, help="Requests at a time."),
    click.option("--timeout", default=120.0, show_default=True, help="Seconds for one reply."),
    click.option("--max-retries", default=5, show_default=True,
                 help="Of a request that fails, with growing pauses."),
    click.option("--attempts", default=2, show_default=True,
                 help="How often to ask for a reply that can be used."),
    click.option("--structured", is_flag=True,
                 help="Send the reply's JSON schema along; vLLM and OpenAI take it."),
    click.option("--token-field", type=click.Choice(["max_tokens", "max_completion_tokens"]),
                 default="max_tokens", show_default=True,
                 help="OpenAI's newer models take the second."),
    click.option("--max-reply-tokens", default=700, show_default=True, help="Of one reply."),
    click.option("--temperature", default=0.0, show_default=True),
    click.option("--seed", type=int, help="Of the model, where it takes one."),
    click.option("--cache", type=OUT_FILE, help="Replies; by default OUT's name, .cache.sqlite."),
)  # fmt: skip
_COST = (
    click.option("--price-in", default=0.0, help="US dollars for a million tokens of prompt."),
    click.option("--price-out", default=0.0, help="US dollars for a million tokens of reply."),
    click.option("--max-cost", type=float, help="Most US dollars, earlier runs included."),
    click.option("--max-tokens", type=int, help="Most tokens, earlier runs included."),
    click.option("--image-tokens", default=3000, show_default=True,
                 help="The most that one image can count."),
)  # fmt: skip
_IMAGES = click.option("--images", type=FOLDER, help="Folder of the images; by default ROWS's.")
_PROMPT = click.option("--prompt-file", type=FILE, help=".json or .txt instead of our prompt.")


def asks_a_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of every command that asks a model."""
    rows, out = click.argument("rows", type=FILE), click.argument("out", type=OUT_FILE)
    return add_options(command, (rows, out, *_WHOM, *_HOW, *_COST))


@click.command("describe")
@asks_a_model
@_IMAGES
@_PROMPT
@click.option("--min-words", default=20, show_default=True)
@click.option("--max-words", default=250, show_default=True)
def describe(prompt_file: Path | None, min_words: int, max_words: int, **options: Any) -> None:
    """Describe the image of each row of ROWS and write the rows to OUT.

    ROWS is JSON lines with `id` and `image`; what else a row says in `caption` and `report` is
    offered to the model as notes. Run the same command again after a stop: it continues. Rows that
    could not be described are listed beside OUT, and the exit code is 3.
    """
    from pathgen.agents.captions import describe as describe_step

    with user_errors():
        step = describe_step(prompt_file, min_words=min_words, max_words=max_words)
    _run(step, **options)


@click.command("revise")
@asks_a_model
@_IMAGES
@_PROMPT
@click.option("--min-words", default=20, show_default=True)
@click.option("--max-words", default=250, show_default=True)
def revise(prompt_file: Path | None, min_words: int, max_words: int, **options: Any) -> None:
    """Check the caption of each row against its image, correct or reject it.

    A row's `report` is shown to the model too. Rejected rows are listed beside OUT.
    """
    from pathgen.agents.captions import revise as revise_step

    with user_errors():
        step = revise_step(prompt_file, min_words=min_words, max_words=max_words)
    _run(step, **options)


@click.command("summarise")
@asks_a_model
@_PROMPT
@click.option("--max-clip-tokens", default=77, show_default=True,
              help="Tokens of CLIP with both marks.")  # fmt: skip
@click.option("--max-words", default=60, show_default=True)
def summarise(
    prompt_file: Path | None, max_clip_tokens: int, max_words: int, **options: Any
) -> None:
    """Shorten the caption of each row to what CLIP's text encoder reads."""
    from pathgen.agents.captions import summarise as summarise_step

    with user_errors():
        step = summarise_step(prompt_file, max_tokens=max_clip_tokens, max_words=max_words)
    _run(step, **options)


@click.command("make-instructions")
@asks_a_model
@_IMAGES
@click.option("--kinds", default="conversation=1,detail=1,open=1,closed=1", show_default=True,
              help="Weights; each caption gets one kind.")  # fmt: skip
@click.option("--every-kind", is_flag=True, help="Make each kind from each caption.")
@click.option("--with-image", is_flag=True, help="Let the model see the image too.")
@click.option("--draw-seed", default=0, show_default=True,
              help="Of kinds, choices' order and questions.")  # fmt: skip
def make_instructions(
    kinds: str, every_kind: bool, with_image: bool, draw_seed: int, **options: Any
) -> None:
    """Make conversations, descriptions and questions from the captions of ROWS.

    OUT is in the LLaVA schema, as training reads it.
    """
    from pathgen.agents.instructions import make_instructions as instructions_step

    with user_errors():
        step = instructions_step(
            weight_values(kinds, "--kinds"),
            every_kind=every_kind,
            with_image=with_image,
            seed=draw_seed,
        )
    _run(step, **options)


@click.command("filter-captions")
@click.argument("rows", type=FILE)
@click.argument("out", type=OUT_FILE)
@click.option("--steps", default=",".join(_STEPS), show_default=True, help="Which, in order.")
@click.option("--min-words", default=20, show_default=True)
@click.option("--max-words", default=250, show_default=True)
@click.option(
    "--within",
    metavar="FIELD",
    help="Compare for duplicates only rows with the same FIELD, wsi_id for instance.",
)
@click.option(
    "--similarity",
    default=0.8,
    show_default=True,
    help="Of three-word sequences, from which captions are the same.",
)
@click.option("--samples", default=10, show_default=True, help="Dropped rows shown for each step.")
def filter_captions(
    rows: Path,
    out: Path,
    steps: str,
    min_words: int,
    max_words: int,
    within: str | None,
    similarity: float,
    samples: int,
) -> None:  # fmt: skip
    """Copy the rows of ROWS whose captions pass every step to OUT.

    What was dropped, and why, is in OUT's name with .dropped.jsonl; counts and samples in
    .filters.json. Rows that are no rows at all give the exit code 3.
    """
    from pathgen import filters

    makers: dict[str, Callable[[], filters.FilterStep]] = {
        "length": lambda: filters.length_step(min_words, max_words),
        "markup": filters.markup_step,
        "refusal": filters.refusal_step,
        "leak": filters.leak_step,
        "loop": filters.loop_step,
        "exact": lambda: filters.exact_step(within),
        "near": lambda: filters.near_step(within, threshold=similarity),
    }
    names = [name.strip() for name in steps.split(",") if name.strip()]
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: {', '.join(_STEPS)} expected")
    with user_errors():
        chosen = [makers[name]() for name in names]
        counts = filters.filter_captions(rows, out, chosen, num_samples=samples)
    for count in counts:
        click.echo(f"{count.name:>10}: {count.dropped:,} of {count.seen:,} dropped")
    click.echo(f"Wrote {out}: {counts[-1].seen - counts[-1].dropped:,} rows")
    if counts[0].dropped:
        raise SystemExit(EXIT_SKIPPED)


def _run(step: Step, *, rows: Path, out: Path, images: Path | None = None, **options: Any) -> None:
    from pathgen.agents.budget import Budget
    from pathgen.agents.steps import run_step

    with user_errors():
        budget = Budget(
            options["price_in"],
            options["price_out"],
            options["max_cost"],
            options["max_tokens"],
            options["image_tokens"],
        )
        with closing(_backend(options)) as backend:
            report = run_step(
                step,
                backend,
                rows,
                out,
                images=images,
                budget=budget,
                cache=options["cache"],
                attempts=options["attempts"],
            )
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(report.counts.items()))
    click.echo(f"Wrote {out}: {counts}")
    click.echo(f"Spent so far: {report.spent.tokens:,} tokens, {report.spent.cost:.4f} US dollars")
    if not report.complete:
        for example in report.examples:
            click.echo(f"  {example}", err=True)
        click.echo(f"All reasons: {report.left_out}; to try again, run this again", err=True)
        raise SystemExit(EXIT_SKIPPED)


def _backend(options: dict[str, Any]) -> Any:
    from pathgen.agents.backends import OpenAIBackend, Sampling

    sampling = Sampling(options["max_reply_tokens"], options["temperature"], options["seed"])
    if (options["local"] is None) == (options["endpoint"] is None):
        raise click.UsageError("either --endpoint with --model, or --local expected")
    if options["local"] is not None:
        from pathgen.agents.local_model import LocalBackend

        return LocalBackend(
            options["local"],
            sampling,
            batch_size=options["batch_size"],
            device=options["device"],
            trust_remote_code=options["trust_remote_code"],
        )
    if options["model"] is None:
        raise click.UsageError("--endpoint needs --model")
    return OpenAIBackend(
        options["endpoint"],
        options["model"],
        sampling,
        concurrency=options["concurrency"],
        timeout_s=options["timeout"],
        max_retries=options["max_retries"],
        structured=options["structured"],
        token_field=options["token_field"],
    )
