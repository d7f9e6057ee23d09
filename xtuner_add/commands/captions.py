"""`xtuner-add describe`, `revise`, `summarise` and the other commands about captions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pathcore.exit_codes import EXIT_SKIPPED
from xtuner_add.commands.options import (
    COST,
    COUNT,
    COUNT_OR_0,
    ENDPOINT,
    FILE,
    FOLDER,
    FRACTION,
    OUT_FILE,
    REQUESTS,
    Number,
    add_options,
    budget,
    counted,
    example,
    open_endpoint,
    refuse_options_of_other_steps,
    refuse_unused,
    samples_option,
    user_errors,
    weight_values,
)

if TYPE_CHECKING:
    from pathgen.agents.steps import Step


class _Temperature(click.ParamType):
    name = "number|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | None:
        """Returns a number from 0 to 2, or None for `none`."""
        return None if value == "none" else Number(0, 2).convert(value, param, ctx)


_STEPS = ("length", "markup", "refusal", "leak", "loop", "exact", "near")
_STEPS_OF_OPTION = {
    "min_words": ("length",),
    "max_words": ("length",),
    "within": ("exact", "near"),
    "similarity": ("near",),
}
"""Steps of filter-captions that read an option, by parameter."""

_WHOM = (
    *ENDPOINT,
    click.option("--local", metavar="MODEL", help="Run a Hugging Face image-text-to-text "
                 "model here instead: folder or name."),
    click.option("--trust-remote-code", is_flag=True,
                 help="Run the code that comes with the --local model."),
    click.option("--device", help="Device for --local. [default: a GPU if there is one]"),
    click.option("--batch-size", type=COUNT, default=4, show_default=True,
                 help="Batch size of --local."),
)  # fmt: skip
_HOW = (
    *REQUESTS,
    click.option("--attempts", type=COUNT, default=2, show_default=True,
                 help="Maximum number of requests for one usable reply."),
    click.option("--structured", is_flag=True,
                 help="Send the JSON schema of the reply (vLLM, OpenAI)."),
    click.option("--max-reply-tokens", type=COUNT, default=700, show_default=True,
                 help="Maximum length of a reply."),
    click.option("--temperature", type=_Temperature(), default="0", show_default=True,
                 help="0 to 2, or none to omit it: some models reject the parameter."),
    click.option("--seed", type=int, help="Sampling seed, for endpoints that support one."),
    click.option("--cache", type=OUT_FILE,
                 help="SQLite file of replies. [default: OUT.cache.sqlite]"),
)  # fmt: skip
_LOCAL_OPTIONS = ("trust_remote_code", "device", "batch_size")
_ENDPOINT_OPTIONS = (
    "model", "concurrency", "timeout", "max_retries", "token_field", "structured",
)  # fmt: skip
_IMAGES = click.option(
    "--image-folder",
    "images",
    type=FOLDER,
    help="Folder of the images. [default: the folder of ROWS]",
)
_PROMPT = click.option("--prompt-file", type=FILE, help="Custom prompt, .json or .txt.")
_LENGTH = (
    click.option("--min-words", type=COUNT_OR_0, default=20, show_default=True),
    click.option("--max-words", type=COUNT, default=250, show_default=True),
)


def asks_a_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments and options of every command that asks a model."""
    rows, out = click.argument("rows", type=FILE), click.argument("out", type=OUT_FILE)
    return add_options(command, (rows, out, *_WHOM, *_HOW, *COST))


def writes_captions(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of commands whose model writes a caption for an image."""
    return asks_a_model(add_options(command, (_IMAGES, _PROMPT, *_LENGTH)))


@click.command(
    "describe",
    epilog=example(
        "describe",
        "selection.jsonl captions.jsonl --endpoint http://localhost:8000/v1 --model NAME",
        "selection.jsonl captions.jsonl --local llava-hf/llava-1.5-7b-hf",
    ),
)
@writes_captions
def describe(prompt_file: Path | None, min_words: int, max_words: int, **options: Any) -> None:
    """Describe the image of each row of ROWS and write the rows to OUT.

    ROWS contains JSON lines with `id` and `image`. If a row has a `caption` or `report`, the model
    receives it as a note. An interrupted run continues when the same command is run again. Rows
    that could not be described are listed in OUT.skipped.jsonl, and the exit code is 3.
    """
    from pathgen.agents.captions import describe as describe_step

    with user_errors():
        step = describe_step(prompt_file, min_words=min_words, max_words=max_words)
    _run_agent(step, **options)


@click.command(
    "revise",
    epilog=example(
        "revise", "captions.jsonl revised.jsonl --endpoint http://localhost:8000/v1 --model NAME"
    ),
)
@writes_captions
def revise(prompt_file: Path | None, min_words: int, max_words: int, **options: Any) -> None:
    """Check the caption of each row against its image, and correct or reject it.

    The model also receives the `report` of a row. Rejected rows are listed in OUT.skipped.jsonl.
    """
    from pathgen.agents.captions import revise as revise_step

    with user_errors():
        step = revise_step(prompt_file, min_words=min_words, max_words=max_words)
    _run_agent(step, **options)


@click.command(
    "summarise",
    epilog=example(
        "summarise", "revised.jsonl short.jsonl --endpoint http://localhost:8000/v1 --model NAME"
    ),
)
@asks_a_model
@_PROMPT
@click.option("--max-clip-tokens", type=COUNT, default=77, show_default=True,
              help="Limit in CLIP tokens, start and end tokens included.")  # fmt: skip
@click.option("--max-words", type=COUNT, default=60, show_default=True)
def summarise(
    prompt_file: Path | None, max_clip_tokens: int, max_words: int, **options: Any
) -> None:
    """Shorten the caption of each row to fit CLIP's text encoder."""
    from pathgen.agents.captions import summarise as summarise_step

    with user_errors():
        step = summarise_step(prompt_file, max_tokens=max_clip_tokens, max_words=max_words)
    _run_agent(step, **options)


@click.command(
    "make-instructions",
    epilog=example(
        "make-instructions",
        "revised.jsonl conversations.jsonl --endpoint http://localhost:8000/v1 --model NAME",
    ),
)
@asks_a_model
@_IMAGES
@click.option("--kinds", default="conversation=1,detail=1,open=1,closed=1", show_default=True,
              help="Weights of the kinds; each caption gets one kind.")  # fmt: skip
@click.option("--every-kind", is_flag=True, help="Make every kind from every caption.")
@click.option("--with-image", is_flag=True, help="Show the model the image too.")
@click.option("--draw-seed", default=0, show_default=True,
              help="Seed for kinds, order of choices, and questions.")  # fmt: skip
def make_instructions(
    kinds: str, every_kind: bool, with_image: bool, draw_seed: int, **options: Any
) -> None:
    """Make conversations, descriptions and questions from the captions of ROWS.

    OUT follows the LLaVA schema, which training reads.
    """
    from pathgen.agents.instructions import make_instructions as instructions_step

    with user_errors():
        step = instructions_step(
            weight_values(kinds, "--kinds"),
            every_kind=every_kind,
            with_image=with_image,
            seed=draw_seed,
        )
    _run_agent(step, **options)


@click.command(
    "filter-captions", epilog=example("filter-captions", "short.jsonl pairs.jsonl --max-words 60")
)
@click.argument("rows", type=FILE)
@click.argument("out", type=OUT_FILE)
@click.option("--steps", default=",".join(_STEPS), show_default=True, help="Steps, in this order.")
@click.option("--min-words", type=COUNT_OR_0, default=20, show_default=True)
@click.option("--max-words", type=COUNT, default=250, show_default=True)
@click.option(
    "--within",
    metavar="FIELD",
    help="Look for duplicates only among rows with the same FIELD, such as wsi_id.",
)
@click.option(
    "--similarity",
    type=FRACTION,
    default=0.8,
    show_default=True,
    help="Jaccard similarity of word trigrams above which captions are duplicates.",
)
@samples_option
@click.pass_context
def filter_captions(
    ctx: click.Context,
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

    OUT.dropped.jsonl lists the dropped rows and the reasons; OUT.filters.json contains counts and
    samples. The exit code is 3 if a line of ROWS is not a valid row.
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
        raise click.BadParameter(f"{', '.join(unknown)}: expected {', '.join(_STEPS)}")
    refuse_options_of_other_steps(ctx, names, _STEPS_OF_OPTION)
    with user_errors():
        chosen = [makers[name]() for name in names]
        counts = filters.filter_captions(rows, out, chosen, num_samples=samples)
    for count in counts:
        click.echo(f"{count.name:>10}: {count.dropped:,} of {count.seen:,} dropped")
    click.echo(f"Wrote {out}: {counted(counts[-1].seen - counts[-1].dropped, 'row')}")
    if counts[0].dropped:
        raise SystemExit(EXIT_SKIPPED)


def _run_agent(
    step: Step, *, rows: Path, out: Path, images: Path | None = None, **options: Any
) -> None:
    from pathgen.agents.steps import run_step

    with user_errors(), closing(_backend(options)) as backend:
        report = run_step(
            step,
            backend,
            rows,
            out,
            images=images,
            budget=budget(options),
            cache=options["cache"],
            attempts=options["attempts"],
        )
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(report.counts.items()))
    click.echo(f"Wrote {out}: {counts}")
    click.echo(f"Spent so far: {report.spent.tokens:,} tokens, {report.spent.cost:.4f} US dollars")
    if not report.complete:
        for example in report.examples:
            click.echo(f"  {example}", err=True)
        click.echo(f"All reasons: {report.skipped}; run the same command to try again", err=True)
        raise SystemExit(EXIT_SKIPPED)


def _backend(options: dict[str, Any]) -> Any:
    from pathcore.chat_backends import Sampling

    sampling = Sampling(options["max_reply_tokens"], options["temperature"], options["seed"])
    if (options["local"] is None) == (options["endpoint"] is None):
        raise click.UsageError("expected either --endpoint with --model, or --local")
    ctx = click.get_current_context()
    if options["local"] is not None:
        refuse_unused(ctx, _ENDPOINT_OPTIONS, "with --local")
        from pathcore.chat_local import LocalBackend

        return LocalBackend(
            options["local"],
            sampling,
            batch_size=options["batch_size"],
            device=options["device"],
            trust_remote_code=options["trust_remote_code"],
        )
    refuse_unused(ctx, _LOCAL_OPTIONS, "with --endpoint")
    return open_endpoint(options, sampling, structured=options["structured"])
