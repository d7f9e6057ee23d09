"""`xtuner-add evaluate`, `score`, `compare-scores` and `answer`.

Options of `evaluate` have the names of the original tools as well. Several processes are started as
for training: `NPROC_PER_NODE=4 xtuner-add evaluate ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from pallava.evaluation.answers import read_answers
from pallava.registry import EVALUATIONS
from pallava.skipping import SKIP_LOG_NAME
from pathcore.exit_codes import EXIT_OK, EXIT_SKIPPED
from pathcore.files import write_json
from pathcore.rows import encode_row, row_files
from xtuner_add.commands.options import (
    ANY_PATH,
    COST,
    COUNT,
    COUNT_OR_0,
    ENDPOINT,
    OUT_FILE,
    POSITIVE,
    POSITIVE_OR_0,
    REQUESTS,
    RelaunchedCommand,
    add_options,
    budget,
    counted,
    end,
    example,
    given_options,
    keyword_values,
    open_endpoint,
    relaunch,
    shows_results,
    user_errors,
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument and options that select the model."""
    return click.argument("llm", metavar="LLM")(_part_options(function))


def _part_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--llava", help="Folder that `pth-to-hf` wrote. [default: LLM]"),
        click.option(
            "--visual-encoder", help="PLIP folder, or encoder:NAME. [default: the one in --llava]"
        ),
        click.option(
            "--visual-select-layer",
            type=int,
            help="Hidden state of the encoder that the connector reads. [default: the one used in "
            "training, as recorded with the weights]",
        ),
        click.option(
            "--prompt-template",
            help="Name of a prompt template of XTuner, or `tokenizer`. [default: the template used "
            "in training, as recorded with the weights]",
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
            help="Apply llm_adapter/ to LLM. [default: unless LLM is inside --llava]",
        ),
        click.option(
            "--bos",
            type=click.Choice(["single", "double"]),
            help="[default: single, as in training; with --compat original double]",
        ),
        click.option(
            "--features",
            "features_folder",
            type=ANY_PATH,
            default=Path("work_dirs", "slide_features"),
            show_default=True,
            help="For models of slides: folder of SLIDE.h5, and of features computed here.",
        ),
    )
    return add_options(function, options)


def _batch_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--batch-size", type=COUNT, default=8, show_default=True)(function)
    return click.option("--max-new-tokens", type=COUNT, default=1200, show_default=True)(function)


def _run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--data",
            "--data-path",
            "data_path",
            required=True,
            type=ANY_PATH,
            help="File or folder of questions.",
        ),
        click.option("--image-folder", type=ANY_PATH, help="[default: images/ next to the data]"),
        click.option("--work-dir", type=ANY_PATH, help="[default: work_dirs/NAME_of_the_data]"),
        click.option(
            "--compat",
            type=click.Choice(["none", "original"]),
            default="none",
            show_default=True,
            help="`original`: use two BOS tokens and fp16 on a GPU, like the published tools, and "
            "report their scores first.",
        ),
        click.option(
            "--audit",
            is_flag=True,
            help="Also ask every question with exchanged, blank and no images, in other words and "
            "orders, and report what each contributes to the score.",
        ),
        click.option(
            "--decoding",
            default="greedy",
            show_default=True,
            help="Or temperature=0.9,num_beams=5 (also top_p and seed).",
        ),
        click.option(
            "--image-resize",
            metavar="RULE",
            help="Resize images first: shorter:N, squash:N, pad:N or crop:N, with N in px.",
        ),
        click.option(
            "--launcher",
            type=click.Choice(["none", "pytorch"]),
            default="none",
            help="`pytorch`: use torchrun even for one process.",
        ),
        # Options of the original tools without effect: decoding is greedy, AnyRes always on.
        *ENDPOINT,
        *REQUESTS,
        *COST,
        click.option("--seed", type=int, hidden=True, expose_value=False),
        click.option("--anyres-image", is_flag=True, hidden=True, expose_value=False),
    )
    return add_options(function, options)


@click.command(
    "evaluate",
    cls=RelaunchedCommand,
    epilog=example(
        "evaluate",
        "pathvqa model --data pathvqa_test.json",
        "pathmmu llava-hf/llava-1.5-7b-hf --data PathMMU --option split=test_tiny",
        "quilt-vqa --endpoint http://localhost:8000/v1 --model NAME --data Quilt_VQA",
    ),
)
@click.argument("benchmark")
@click.argument("llm", metavar="[MODEL]", required=False)
@_run_options
@_batch_options
@_part_options
@click.option(
    "--option",
    "extra",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of the benchmark, such as prompt=NAME, split=NAME, or classes=NAME.",
)
@click.pass_context
def evaluate(ctx: click.Context, benchmark: str, **options: Any) -> None:
    """Ask a model the questions of BENCHMARK and score its answers.

    BENCHMARK is one of the names that `xtuner-add plugins` lists: pathvqa, pmc-vqa, pathmmu,
    quilt-vqa, quilt-vqa-red, slidebench-tcga, slidebench-bcnb, zero-shot, ... MODEL is an exported
    folder, a language model with the other parts in --llava and --visual-encoder, or a Hugging Face
    model that takes images. With --endpoint and --model, a model behind an OpenAI-compatible
    endpoint answers.
    """
    if (options["llm"] is None) == (options["endpoint"] is None):
        raise click.UsageError("expected either MODEL, or --endpoint with --model", ctx)
    _refuse_unused(ctx, options)
    extra = keyword_values(options.pop("extra"))
    work_dir = options["work_dir"] or Path("work_dirs", f"{benchmark}_{options['data_path'].stem}")
    if relaunch(ctx, always=options["launcher"] == "pytorch"):
        metrics = json.loads((work_dir / "metrics.json").read_text(encoding="utf-8"))
        _end(metrics["num_skipped"], work_dir, options["audit"])
        return
    from pallava.evaluation.benchmarks import resized
    from pallava.evaluation.runs import evaluate as run_evaluation

    try:
        with user_errors(ImportError):
            make = EVALUATIONS.get(benchmark)
            made = make(options["data_path"], options["image_folder"], **extra)
            if options["image_resize"] is not None:
                made = resized(made, options["image_resize"])
            metrics = run_evaluation(
                made,
                _open_model(options, work_dir),
                work_dir,
                batch_size=_batch_size(options),
                max_new_tokens=options["max_new_tokens"],
                compat=options["compat"],
                audited=options["audit"],
            )
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise click.ClickException(str(error)) from error
    if metrics is None:
        return
    _write_run(work_dir, {**options, "benchmark": benchmark, "option": extra})
    if shows_results():
        _end(metrics["num_skipped"], work_dir, options["audit"])


_PALLAVA_OPTIONS = (
    "llava", "visual_encoder", "visual_select_layer", "prompt_template", "use_adapter", "bos",
    "features_folder",
)  # fmt: skip
_LOCAL_OPTIONS = ("torch_dtype", "device")
_ENDPOINT_OPTIONS = (
    "model", "concurrency", "timeout", "max_retries", "token_field", "price_in", "price_out",
    "max_cost", "max_tokens", "image_tokens",
)  # fmt: skip


def _refuse_unused(ctx: click.Context, options: dict[str, Any]) -> None:
    """Refuses options that the kind of model has no use for.

    Raises:
        click.UsageError: If such an option was given.
    """
    pallava = [*_PALLAVA_OPTIONS, *(["compat"] if options["compat"] == "original" else [])]
    given = given_options(ctx)
    kind, names = "a model on this machine", [*_ENDPOINT_OPTIONS]
    if options["endpoint"] is not None:
        kind, names = "an endpoint", [*pallava, *_LOCAL_OPTIONS]
    elif not given.keys().isdisjoint(pallava) and _is_hugging_face(options):
        kind, names = "a Hugging Face model", [*pallava, *_ENDPOINT_OPTIONS]
    if unused := [given[name] for name in given if name in names]:
        raise click.UsageError(
            f"{kind} takes no {', '.join(unused)}; omit {'it' if len(unused) == 1 else 'them'}", ctx
        )


def _is_hugging_face(options: dict[str, Any]) -> bool:
    from pallava.evaluation.chat_model import is_hugging_face_model

    return options["llava"] is None and is_hugging_face_model(options["llm"])


def _batch_size(options: dict[str, Any]) -> int:
    """Returns the number of questions per batch; requests in flight are those of one batch."""
    size: int = options["batch_size"]
    return size if options["endpoint"] is None else max(size, options["concurrency"])


def _open_model(options: dict[str, Any], work_dir: Path) -> Any:
    """Opens an endpoint, a Hugging Face model or a PA-LLaVA, with the decoding of the options."""
    from pallava.evaluation.chat_model import ChatModel
    from pallava.inference.decoding import Decoding
    from pathcore.chat_backends import Sampling

    decoding = Decoding.parse(options["decoding"])
    if options["endpoint"] is None and not _is_hugging_face(options):
        model = load_from_options(options)
        model.decoding = decoding
        return model
    sampling = Sampling(
        options["max_new_tokens"],
        decoding.temperature,
        decoding.seed if decoding.temperature else None,
        cut_is_fault=False,
    )
    if options["endpoint"] is not None:
        if decoding.num_beams > 1 or decoding.top_p < 1:
            raise click.UsageError("--decoding: an endpoint takes temperature and seed only")
        return ChatModel(
            open_endpoint(options, sampling), work_dir / "replies.sqlite", budget(options)
        )
    from pathcore.chat_local import LocalBackend

    dtypes = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    dtype = options["torch_dtype"] or "auto"
    return ChatModel(
        LocalBackend(
            options["llm"],
            sampling,
            device=options["device"],
            dtype=dtypes.get(dtype, dtype),
            generation={} if decoding.is_greedy else decoding.generation_kwargs(),
        )
    )


@click.command(
    "answer", epilog=example("answer", "model image.png --question 'Is there necrosis?'")
)
@model_options
@_batch_options
@click.argument("images", nargs=-1, required=True, type=ANY_PATH)
@click.option("--question", "-q", required=True, multiple=True, help="May be repeated.")
@click.option("--output", type=OUT_FILE, help="Also write JSON lines to this file.")
@click.option(
    "--evidence",
    type=ANY_PATH,
    help="For a model of slides: GeoJSON of the tiles that each answer depends on, for QuPath; a "
    "file.geojson for one slide, otherwise a folder.",
)
@click.pass_context
def answer(
    ctx: click.Context,
    images: tuple[Path, ...],
    question: tuple[str, ...],
    output: Path | None,
    evidence: Path | None,
    **options: Any,
) -> None:
    """Ask questions about images, given as files or folders.

    A model of whole slides takes slides or files of tile features instead of images.

    LLM is an exported folder, or the language model with the other parts in --llava and
    --visual-encoder.
    """
    from pathcore.images import ImageError
    from xtuner_add.slide_evidence import EvidenceFiles

    batch_size, max_new_tokens = options.pop("batch_size"), options.pop("max_new_tokens")
    num_skipped = 0
    with user_errors(ImportError), ExitStack() as outputs:
        files = list(_image_files(images))
        if output is not None and output.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"{output}: would replace what is read; name another file")
        # Opened before the model, so that no answer is lost for want of a place to write it.
        to = outputs.enter_context(row_files(output))[0] if output is not None else None
        evidence_files = None if evidence is None else EvidenceFiles(evidence, files)
        model = load_from_options(options)
        if evidence is not None and not model.reads_slides:
            raise ValueError(f"{options['llm']}: reads images; --evidence is for models of slides")
        asked: list[tuple[Path, Any, str]] = []

        def write(rows: Iterable[dict[str, Any]]) -> None:
            if to is not None:
                to.writelines(map(encode_row, rows))

        def flush() -> None:
            prompts = [model.encode(text, has_image=True) for _, _, text in asked]
            stacks = [pixels for _, pixels, _ in asked]
            replies = model.answer_encoded(prompts, stacks, max_new_tokens=max_new_tokens)
            for (path, _, text), reply in zip(asked, replies, strict=True):
                click.echo(f"{path}\n  {text}\n  {reply}")
                write([{"image": str(path), "question": text, "answer": reply}])
            asked.clear()

        for path in files:
            try:
                pixels = model.pixel_values(path)
            except ImageError as error:
                num_skipped += 1
                click.echo(f"skipped: {error}", err=True)
                continue
            if evidence_files is not None:
                write(evidence_files.answer(model, path, pixels, question, max_new_tokens))
                continue
            for text in question:
                asked.append((path, pixels, text))
                if len(asked) >= batch_size:
                    flush()
        if asked:
            flush()
    ctx.exit(EXIT_SKIPPED if num_skipped else EXIT_OK)


def _image_files(images: Iterable[Path]) -> Iterable[Path]:
    from pathcore.images import image_files
    from wsi.slide_listing import SlideListing

    for path in images:
        found = image_files(path) if path.is_dir() else [path]
        found = found or sorted(set(path.glob("*.h5")) - set(path.glob("*.embedding.h5")))
        found = found or list(SlideListing(path).paths)
        if not found:
            raise FileNotFoundError(f"{path}: no image, slide or tile features in this folder")
        yield from found


def load_from_options(options: dict[str, Any]) -> Any:
    """Loads the model that the options of `model_options`, and optionally `compat`, select."""
    from pallava import load_model
    from pallava.evaluation.generation import default_device
    from xtuner_add.slide_features import reads_slide_files

    original = options.get("compat") == "original"
    device = options["device"] or default_device()
    dtype = options["torch_dtype"]
    if dtype is None and original and str(device).startswith("cuda"):
        dtype = "fp16"
    model = load_model(
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
    return reads_slide_files(model, options["features_folder"], device=options["device"])


def _write_run(work_dir: Path, options: dict[str, Any]) -> None:
    import torch
    import transformers

    from pathcore.chat_api import shown_endpoint

    arguments = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items()
    }
    if arguments["endpoint"] is not None:
        arguments["endpoint"] = shown_endpoint(arguments["endpoint"])
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_json(work_dir / "run.json", {"arguments": arguments, "versions": versions})


def _end(num_skipped: int, work_dir: Path, audited: bool) -> None:
    from pallava.evaluation.audit import AUDIT_NAME, PAGE_NAME, table
    from pallava.evaluation.report import TABLES_NAME

    click.echo((work_dir / TABLES_NAME).read_text(encoding="utf-8"))
    if audited:
        content = json.loads((work_dir / AUDIT_NAME).read_text(encoding="utf-8"))
        click.echo(table(content))
        click.echo(f"Questions with their images: {work_dir / PAGE_NAME}")
        if missing := sum(content["missing"].values()):
            click.echo(f"{missing:,} questions of the audit have no answer", err=True)
            num_skipped = num_skipped or missing
    click.echo(f"Written to {work_dir}")
    end(num_skipped, work_dir / SKIP_LOG_NAME, "question")


@click.command(
    "score",
    epilog=example(
        "score", "pathvqa --data pathvqa_test.json --answers answers.jsonl --work-dir scores/"
    ),
)
@click.argument("benchmark")
@click.option(
    "--data",
    "--data-path",
    "data_path",
    required=True,
    type=ANY_PATH,
    help="Questions with reference answers.",
)
@click.option("--answers", required=True, type=ANY_PATH, help="`[{question_id, answer}]` or JSONL.")
@click.option("--work-dir", required=True, type=ANY_PATH, help="Folder for the report.")
@click.option("--compat", type=click.Choice(["none", "original"]), default="none")
@click.option(
    "--missing",
    type=click.Choice(["wrong", "skip"]),
    default="wrong",
    show_default=True,
    help="Count questions without an answer as wrong, or skip them.",
)
@click.option(
    "--tokenizer", help="Tokenizer of the LLM, for the published token recall: folder or name."
)
@click.option(
    "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Option of the benchmark."
)
@click.option("--judge", metavar="URL", help="OpenAI-compatible endpoint, with /v1.")
@click.option("--judge-model", help="Name of the judge at the endpoint; API key in OPENAI_API_KEY.")
@click.option("--judge-concurrency", type=COUNT, default=8, show_default=True)
@click.option(
    "--judge-timeout",
    type=POSITIVE,
    default=60.0,
    show_default=True,
    help="Timeout of a request in seconds.",
)
@click.option("--judge-retries", type=COUNT_OR_0, default=5, show_default=True)
@click.option(
    "--judge-price-in",
    type=POSITIVE_OR_0,
    default=0.0,
    help="US dollars per million prompt tokens.",
)
@click.option(
    "--judge-price-out",
    type=POSITIVE_OR_0,
    default=0.0,
    help="US dollars per million reply tokens.",
)
@click.option("--max-cost", type=POSITIVE_OR_0, help="Budget in US dollars; requires the prices.")
@click.pass_context
def score(ctx: click.Context, benchmark: str, **options: Any) -> None:
    """Score existing answers to BENCHMARK (pathvqa, pathmmu, ...) without a model.

    The exit code is 3 if questions have no answer, or if the judge did not score all answers; run
    the command again to continue.
    """
    from pallava.evaluation.report import write_report
    from pallava.records.questions import NO_IMAGES

    if bool(options["judge"]) != bool(options["judge_model"]):
        raise click.UsageError("--judge and --judge-model require each other", ctx)
    if (
        options["max_cost"] is not None
        and not options["judge_price_in"] + options["judge_price_out"]
    ):
        raise click.UsageError("--max-cost requires --judge-price-in or --judge-price-out", ctx)
    extra = keyword_values(options["extra"])
    with user_errors(ImportError):
        made = EVALUATIONS.get(benchmark)(options["data_path"], NO_IMAGES, **extra)
        answers, positions = read_answers(options["answers"])
        if positions:
            click.echo(
                f"{options['answers']}: {positions} answers have no question_id; assigning "
                "them in the order of the questions",
                err=True,
            )
        judged, complete = _judge(made, answers, options) if options["judge"] else (None, True)
        metrics = write_report(
            made,
            answers,
            made.questions.skipped,
            options["work_dir"],
            tokenizer=_tokenizer(options["tokenizer"]),
            compat=options["compat"],
            judged=judged,
            missing=options["missing"],
        )
    from pallava.evaluation.report import markdown

    click.echo(markdown(metrics))
    click.echo(f"Written to {options['work_dir']}")
    if not complete:
        click.echo(
            "The judge did not score all answers; run the command again to continue.", err=True
        )
    if metrics["num_missing"]:
        click.echo(f"{counted(metrics['num_missing'], 'question')} without an answer.", err=True)
    if not complete or metrics["num_skipped"] or metrics["num_missing"]:
        ctx.exit(EXIT_SKIPPED)


@click.command(
    "compare-scores",
    epilog=example("compare-scores", "ours=results/ours llava=results/llava gpt=results/gpt"),
)
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]WORK_DIR...")
@click.option("--output", type=OUT_FILE, help="Also write the comparison to this JSON file.")
def compare_scores(runs: tuple[str, ...], output: Path | None) -> None:
    """Compare models on the questions that all of them were asked.

    Each WORK_DIR is that of one `xtuner-add evaluate`; the others are compared with the first.
    """
    from pallava.evaluation.comparison import compare, markdown

    folders: dict[str, Path] = {}
    for text in runs:
        name, equals, folder = text.partition("=")
        key = name if equals else Path(text).name
        if key in folders:
            raise click.UsageError(f"two runs are called {key!r}; name them NAME=WORK_DIR")
        folders[key] = Path(folder if equals else text)
    with user_errors():
        comparison = compare(folders)
        click.echo(markdown(comparison))
        if output is not None:
            write_json(output, comparison)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from pallava.inference.loading import load_tokenizer

    return load_tokenizer(name)


def _judge(
    benchmark: Any, answers: dict[str, str], options: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    from pallava.evaluation.judge import SAMPLING, judge_answers, summarise
    from pathcore.chat_backends import OpenAIBackend
    from pathcore.chat_budget import Budget

    limits = Budget(options["judge_price_in"], options["judge_price_out"], options["max_cost"])
    judge = OpenAIBackend(
        options["judge"],
        options["judge_model"],
        SAMPLING,
        concurrency=options["judge_concurrency"],
        timeout_s=options["judge_timeout"],
        max_retries=options["judge_retries"],
    )
    references = {
        question.id: question.answer
        for question in benchmark.questions.questions
        if question.answer is not None
    }
    cache_path = options["work_dir"] / "judge.sqlite"
    with closing(judge):
        verdicts = judge_answers(judge, answers, references, cache_path, limits)
    return {"model": judge.model, **summarise(verdicts)}, verdicts.complete
