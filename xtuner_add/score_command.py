"""``xtuner-add score``: score answers that are there already, also by a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path)


@click.command("score")
@click.argument("benchmark")
@click.option("--data-path", required=True, type=_FILE, help="Questions with references.")
@click.option("--answers", required=True, type=_FILE, help="`[{question_id, answer}]`, or JSONL.")
@click.option("--work-dir", required=True, type=_FILE, help="Receives the report.")
@click.option("--compat", type=click.Choice(["none", "original"]), default="none")
@click.option("--tokenizer", help="Folder or name of the LLM, for the published token recall.")
@click.option("--option", "extra", multiple=True, metavar="NAME=VALUE", help="Of the benchmark.")
@click.option("--judge", metavar="URL", help="OpenAI-compatible endpoint, up to /v1.")
@click.option("--judge-model", help="Model to ask there. The key: OPENAI_API_KEY.")
@click.option("--judge-concurrency", default=8, show_default=True)
@click.option("--judge-timeout", default=60.0, show_default=True, help="Seconds for one reply.")
@click.option("--judge-retries", default=5, show_default=True)
@click.option("--judge-price-in", default=0.0, help="US dollars for a million prompt tokens.")
@click.option("--judge-price-out", default=0.0, help="US dollars for a million reply tokens.")
@click.option("--max-cost", type=float, help="US dollars; needs the prices.")
@click.pass_context
def score(ctx: click.Context, benchmark: str, **options: Any) -> None:
    """Score answers to BENCHMARK: pathvqa, pmcvqa, zero-shot, ...; needs no model and no image.

    Ends with exit code 3 if the judge left answers without a score; run it again to continue.
    """
    from pallava.evaluation.answers import read_answers
    from pallava.evaluation.questions import NO_IMAGES
    from pallava.evaluation.report import write_report
    from pallava.registry import EVALUATIONS
    from xtuner_add.launch import EXIT_SAMPLES_SKIPPED

    if bool(options["judge"]) != bool(options["judge_model"]):
        raise click.UsageError("--judge and --judge-model belong together", ctx)
    extra = dict(_pair(ctx, text) for text in options["extra"])
    try:
        made = EVALUATIONS.get(benchmark)(options["data_path"], NO_IMAGES, **extra)
        answers = read_answers(options["answers"])
        judged, complete = _judge(made, answers, options) if options["judge"] else (None, True)
        metrics = write_report(
            made,
            answers,
            made.questions.skipped,
            options["work_dir"],
            tokenizer=_tokenizer(options["tokenizer"]),
            compat=options["compat"],
            judged=judged,
        )
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    from pallava.evaluation.report import markdown

    click.echo(markdown(metrics))
    click.echo(f"Written to {options['work_dir']}")
    if not complete:
        click.echo("The judge left answers without a score: run this again to continue.", err=True)
    if not complete or metrics["num_skipped"]:
        ctx.exit(EXIT_SAMPLES_SKIPPED)


def _pair(ctx: click.Context, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--option {text}: NAME=VALUE expected", ctx)
    return name.replace("-", "_"), value


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _judge(
    benchmark: Any, answers: dict[str, str], options: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    from pallava.evaluation.judge import Judge, judge_answers, summarise

    judge = Judge(
        base_url=options["judge"],
        model=options["judge_model"],
        concurrency=options["judge_concurrency"],
        timeout_s=options["judge_timeout"],
        max_retries=options["judge_retries"],
        price_in=options["judge_price_in"],
        price_out=options["judge_price_out"],
        max_cost=options["max_cost"],
    )
    references = {
        question.id: question.answer
        for question in benchmark.questions.questions
        if question.answer is not None
    }
    verdicts = judge_answers(judge, answers, references, options["work_dir"] / "judge.sqlite")
    return {"model": judge.model, **summarise(verdicts)}, verdicts.complete
