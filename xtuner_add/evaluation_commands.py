"""``xtuner-add pathvqa``, ``pmcvqa``, ``zero-shot``, ``evaluate`` and ``answer``.

Options are named as those of the original's tools. Several processes are started as for training:
``NPROC_PER_NODE=4 xtuner-add pathvqa ...``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from xtuner_add.launch import (
    EXIT_SAMPLES_SKIPPED,
    OUTCOME_VARIABLE,
    LaunchError,
    child_environ,
    run_child,
    torchrun_command,
)

_FILE = click.Path(path_type=Path)
_EXPECTED_ERRORS = (ValueError, FileNotFoundError, ImportError)


class RelaunchedCommand(click.Command):
    """A command that starts itself in several processes when the environment asks for them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments for the processes to be started."""
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run here, or in children whose exit code becomes ours."""
        runner = ["-m", "xtuner_add.cli", str(self.name), *ctx.meta[__name__]]
        always = ctx.params.get("launcher") == "pytorch"
        try:
            command = torchrun_command(runner, os.environ, always=always)
        except LaunchError as error:
            raise click.UsageError(str(error), ctx) from error
        if command is None:
            return super().invoke(ctx)
        with tempfile.TemporaryDirectory(prefix="xtuner-add-") as folder:
            outcome = Path(folder, "outcome.json")
            environ = {**child_environ(os.environ), OUTCOME_VARIABLE: str(outcome)}
            code = run_child(command, environ)
            if code == 0 and outcome.is_file():
                _end(ctx, **json.loads(outcome.read_text(encoding="utf-8")))
        ctx.exit(code)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what says which model is loaded and how."""
    for option in reversed(
        (
            click.argument("llm", metavar="LLM"),
            click.option("--llava", help="Folder that `convert pth_to_hf` wrote. [default: LLM]"),
            click.option("--visual-encoder", help="PLIP folder. [default: the one in --llava]"),
            click.option("--visual-select-layer", default=-2, show_default=True),
            click.option(
                "--prompt-template",
                help="XTuner's name of the template used in training, or `tokenizer`. "
                "[default: llama3_chat; of an exported folder, the tokenizer's]",
            ),
            click.option(
                "--torch-dtype",
                type=click.Choice(["fp16", "bf16", "fp32", "auto"]),
                help="[default: bf16 or fp16 on a GPU, fp32 on a CPU]",
            ),
            click.option("--device", help="[default: the GPU of the process, or the CPU]"),
            click.option(
                "--adapter/--no-adapter",
                "use_adapter",
                default=None,
                help="Add llm_adapter/ to LLM. [default: unless LLM lies inside --llava]",
            ),
            click.option(
                "--bos",
                type=click.Choice(["single", "double"]),
                help="[default: single, as in training; with --compat original double]",
            ),
        )
    ):
        function = option(function)
    return function


def _batch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--batch-size", default=8, show_default=True)(function)
    return click.option("--max-new-tokens", default=1200, show_default=True)(function)


def _run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--data-path", required=True, type=_FILE, help="Questions."),
            click.option("--image-folder", type=_FILE, help="[default: images/ beside the data]"),
            click.option("--work-dir", type=_FILE, help="[default: work_dirs/NAME_of_the_data]"),
            click.option(
                "--compat",
                type=click.Choice(["none", "original"]),
                default="none",
                show_default=True,
                help="`original`: ask with two BOS and in fp16 on a GPU, as the published tools, "
                "and put their scores first.",
            ),
            click.option(
                "--launcher",
                type=click.Choice(["none", "pytorch"]),
                default="none",
                help="`pytorch`: through torchrun even for one process.",
            ),
            # Of the original's tools; answers are greedy, and images are always cut.
            click.option("--seed", type=int, hidden=True, expose_value=False),
            click.option("--anyres-image", is_flag=True, hidden=True, expose_value=False),
        )
    ):
        function = option(function)
    return function


@click.command("pathvqa", cls=RelaunchedCommand)
@model_options
@_batch_options
@_run_options
@click.option("--split", default="test", show_default=True, help="Of a folder of parquet files.")
@click.pass_context
def pathvqa(ctx: click.Context, **options: Any) -> None:
    """Evaluate on PathVQA, or other open and yes/no questions.

    --data-path is the JSON of the original (`id -> {question, image, answer, ...}`), a list of
    such records, JSON lines, PathVQA's pickle, or parquet files from the hub.
    """
    _run(ctx, "pathvqa", ("split",), options)


@click.command("pmcvqa", cls=RelaunchedCommand)
@model_options
@_batch_options
@_run_options
@click.option("--question-template", help="For CSV: text with {question} and {options}.")
@click.pass_context
def pmcvqa(ctx: click.Context, **options: Any) -> None:
    """Evaluate on PMC-VQA, or other multiple choice.

    --data-path is PMC-VQA's CSV, or records whose question holds the options already.
    """
    _run(ctx, "pmcvqa", ("question_template",), options)


@click.command("zero-shot", cls=RelaunchedCommand)
@model_options
@_batch_options
@_run_options
@click.option("--classes", help="Config of the classes: a file, or bach, oscc, colonpath.")
@click.option("--labels", type=_FILE, help="For a file of questions: JSON `id -> class`.")
@click.pass_context
def zero_shot(ctx: click.Context, **options: Any) -> None:
    """Classify images by asking.

    --data-path is a folder of images by class, or a file `id -> {question, image}`.
    """
    _run(ctx, "zero-shot", ("classes", "labels"), options)


@click.command("evaluate", cls=RelaunchedCommand)
@click.argument("benchmark")
@model_options
@_batch_options
@_run_options
@click.option("--option", "extra", multiple=True, metavar="NAME=VALUE", help="Of the benchmark.")
@click.pass_context
def evaluate(ctx: click.Context, benchmark: str, **options: Any) -> None:
    """Evaluate on BENCHMARK by name, those of other packages included (`xtuner-add plugins`)."""
    extra = {}
    for pair in options.pop("extra"):
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f"--option {pair}: NAME=VALUE expected", ctx)
        extra[name.replace("-", "_")] = value
    _run(ctx, benchmark, tuple(extra), {**options, **extra})


@click.command("answer")
@model_options
@_batch_options
@click.argument("images", nargs=-1, required=True, type=_FILE)
@click.option("--question", "-q", required=True, multiple=True, help="May be given repeatedly.")
@click.option("--output", type=_FILE, help="Also write JSON lines to this file.")
@click.pass_context
def answer(
    ctx: click.Context,
    images: tuple[Path, ...],
    question: tuple[str, ...],
    output: Path | None,
    **options: Any,
) -> None:
    """Ask questions about images: files, or folders of them.

    A model of whole slides is asked about files of tile features, or folders of them.

    LLM is the language model, --llava and --visual-encoder name the other parts; or an exported
    folder, which holds all of them.
    """
    from pallava.images import ImageError

    batch_size, max_new_tokens = options.pop("batch_size"), options.pop("max_new_tokens")
    try:
        files = list(_image_files(images))
        model = load_from_options(options)
    except _EXPECTED_ERRORS as error:
        raise click.ClickException(str(error)) from error
    asked: list[tuple[Path, Any, str]] = []
    rows, num_skipped = [], 0

    def flush() -> None:
        prompts = [model.encode(text, has_image=True) for _, _, text in asked]
        stacks = [pixels for _, pixels, _ in asked]
        replies = model.answer_encoded(prompts, stacks, max_new_tokens=max_new_tokens)
        for (path, _, text), reply in zip(asked, replies, strict=True):
            click.echo(f"{path}\n  {text}\n  {reply}")
            rows.append({"image": str(path), "question": text, "answer": reply})
        asked.clear()

    for path in files:
        try:
            pixels = model.pixel_values(path)
        except ImageError as error:
            num_skipped += 1
            click.echo(f"skipped: {error}", err=True)
            continue
        for text in question:
            asked.append((path, pixels, text))
            if len(asked) >= batch_size:
                flush()
    if asked:
        flush()
    if output is not None:
        from pathcore.files import write_text

        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(output, "".join(lines))
    ctx.exit(EXIT_SAMPLES_SKIPPED if num_skipped else 0)


def _image_files(images: Iterable[Path]) -> Iterable[Path]:
    from pallava.evaluation.questions import image_files

    for path in images:
        found = image_files(path) if path.is_dir() else [path]
        found = found or sorted(set(path.glob("*.h5")) - set(path.glob("*.embedding.h5")))
        if not found:
            raise FileNotFoundError(f"{path}: no images and no tile features in this folder")
        yield from found


def load_from_options(options: dict[str, Any]) -> Any:
    """Loads the model that `model_options` name; `compat` may be among them."""
    from pallava import load_model
    from pallava.evaluation.generation import default_device

    original = options.get("compat") == "original"
    device = options["device"] or default_device()
    dtype = options["torch_dtype"]
    if dtype is None and original and str(device).startswith("cuda"):
        dtype = "fp16"
    return load_model(
        options["llm"],
        options["llava"],
        options["visual_encoder"],
        prompt_template=options["prompt_template"],
        bos=options["bos"] or ("double" if original else "single"),
        dtype=dtype,
        device=device,
        use_adapter=options["use_adapter"],
        visual_select_layer=options["visual_select_layer"],
    )


def _run(ctx: click.Context, name: str, extra: tuple[str, ...], options: dict[str, Any]) -> None:
    from pallava.evaluation.runs import evaluate as run_evaluation
    from pallava.registry import EVALUATIONS

    work_dir = options["work_dir"] or Path("work_dirs", f"{name}_{options['data_path'].stem}")
    chosen = {key: options[key] for key in extra if options[key] is not None}
    try:
        make = EVALUATIONS.get(name)
        benchmark = make(options["data_path"], options["image_folder"], **chosen)
        model = load_from_options(options)
        metrics = run_evaluation(
            benchmark,
            model,
            work_dir,
            batch_size=options["batch_size"],
            max_new_tokens=options["max_new_tokens"],
            compat=options["compat"],
        )
    except (*_EXPECTED_ERRORS, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise
        raise click.ClickException(str(error)) from error
    if metrics is None:
        return
    _write_run(work_dir, options)
    outcome = {"num_skipped": metrics["num_skipped"], "work_dir": str(work_dir)}
    if target := os.environ.get(OUTCOME_VARIABLE):
        Path(target).write_text(json.dumps(outcome), encoding="utf-8")
        return
    _end(ctx, **outcome)


def _write_run(work_dir: Path, options: dict[str, Any]) -> None:
    import torch
    import transformers

    from pathcore.files import write_json

    arguments = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items()
    }
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_json(work_dir / "run.json", {"arguments": arguments, "versions": versions})


def _end(ctx: click.Context, num_skipped: int, work_dir: str) -> None:
    from pallava.evaluation.report import TABLES_NAME

    click.echo((Path(work_dir) / TABLES_NAME).read_text(encoding="utf-8"))
    click.echo(f"Written to {work_dir}")
    if num_skipped:
        noun = "question was" if num_skipped == 1 else "questions were"
        click.echo(
            f"Finished, but {num_skipped} {noun} skipped: see {work_dir}/skipped_samples.jsonl",
            err=True,
        )
        ctx.exit(EXIT_SAMPLES_SKIPPED)
