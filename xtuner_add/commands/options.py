"""Shared parts of sub-commands: option types, parsing, errors, progress and exit codes.

Imports nothing slow, because every command's `--help` loads this module.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from pathcore.exit_codes import EXIT_SKIPPED
from pathcore.jobs import SKIPPED_NAME
from pathcore.names import WrongArgumentError
from xtuner_add.launch import LaunchError, child_environ, run_child, torchrun_command

if TYPE_CHECKING:
    from pathcore.jobs import Report

_Function = TypeVar("_Function", bound=Callable[..., Any])

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE_OR_FOLDER = click.Path(exists=True, path_type=Path)
OUT_FILE = click.Path(dir_okay=False, path_type=Path)
OUT_FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
"""A path that click does not check, because the command's own error message is better."""


class Number(click.FloatRange):
    """A finite number in a range: click's comparisons let NaN through every range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the number, or reports wrong usage."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1)
COUNT_OR_0 = click.IntRange(0)
POSITIVE = Number(0, min_open=True)
POSITIVE_OR_0 = Number(0)
FRACTION = Number(0, 1)

device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device. [default: a GPU if there is one]",
)
output_folder = click.option("--output", type=ANY_PATH, required=True, help="Output folder.")
engine_option = click.option(
    "--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True
)
address_option = click.option(
    "--address", help="Address of a Ray cluster. [default: Ray on this machine]"
)
read_workers_option = click.option(
    "--read-workers",
    type=COUNT_OR_0,
    help="Number of processes that prefetch tiles per slide; 0 uses a thread. [default: the "
    "remaining cores on a machine with a GPU, else 0]",
)
image_workers_option = click.option(
    "--workers", "num_workers", type=COUNT_OR_0, default=0, show_default=True,
    help="Processes that read images.",
)  # fmt: skip
samples_option = click.option(
    "--samples", type=COUNT_OR_0, default=10, show_default=True,
    help="Dropped rows to show per step.",
)  # fmt: skip
retry_option = click.option(
    "--retry-skipped", is_flag=True, help="Retry what an earlier run skipped."
)
pictures_option = click.option(
    "--no-pictures", "pictures", is_flag=True, flag_value=False, default=True,
    help="Do not draw pictures.",
)  # fmt: skip
quiet_option = click.option(
    "--quiet", "progress", is_flag=True, flag_value=False, default=True, help="No progress bar."
)


map_format_option = click.option(
    "--map-format",
    "map_formats",
    type=click.Choice(["png", "geojson", "ome-tiff"]),
    multiple=True,
    default=("png",),
    show_default=True,
    help="Format of the maps; may be repeated. geojson and ome-tiff are for QuPath.",
)

ENDPOINT = (
    click.option("--endpoint", metavar="URL", help="OpenAI-compatible endpoint, with /v1; "
                 "API key in the environment variable OPENAI_API_KEY."),
    click.option("--model", help="Name of the model at the endpoint."),
)  # fmt: skip
REQUESTS = (
    click.option("--concurrency", type=COUNT, default=8, show_default=True,
                 help="Requests in flight."),
    click.option("--timeout", type=POSITIVE, default=120.0, show_default=True,
                 help="Timeout of a request in seconds."),
    click.option("--max-retries", type=COUNT_OR_0, default=5, show_default=True,
                 help="Retries of a failed request, with exponential backoff."),
    click.option("--token-field", type=click.Choice(["max_tokens", "max_completion_tokens"]),
                 default="max_tokens", show_default=True,
                 help="Newer OpenAI models require max_completion_tokens."),
)  # fmt: skip
COST = (
    click.option("--price-in", type=POSITIVE_OR_0, default=0.0,
                 help="US dollars per million prompt tokens."),
    click.option("--price-out", type=POSITIVE_OR_0, default=0.0,
                 help="US dollars per million reply tokens."),
    click.option("--max-cost", type=POSITIVE_OR_0,
                 help="Budget in US dollars, earlier runs included."),
    click.option("--max-tokens", type=COUNT_OR_0,
                 help="Budget in tokens, earlier runs included."),
    click.option("--image-tokens", type=COUNT_OR_0, default=3000, show_default=True,
                 help="Upper bound of tokens per image, for the budget."),
)  # fmt: skip


def budget(options: dict[str, Any]) -> Any:
    """Returns the budget that the options of `COST` describe."""
    from pathcore.chat_budget import Budget

    return Budget(
        options["price_in"],
        options["price_out"],
        options["max_cost"],
        options["max_tokens"],
        options["image_tokens"],
    )


def open_endpoint(options: dict[str, Any], sampling: Any, *, structured: bool = False) -> Any:
    """Opens the endpoint that the options of `ENDPOINT` and `REQUESTS` describe.

    Raises:
        click.UsageError: If the model is not named.
        ValueError: If there is no API key.
    """
    from pathcore.chat_backends import OpenAIBackend

    if options["model"] is None:
        raise click.UsageError("--endpoint requires --model")
    return OpenAIBackend(
        options["endpoint"],
        options["model"],
        sampling,
        concurrency=options["concurrency"],
        timeout_s=options["timeout"],
        max_retries=options["max_retries"],
        structured=structured,
        token_field=options["token_field"],
    )


def example(command: str, *arguments: str) -> str:
    """Returns the epilog of a command's help, with one example line per entry of `arguments`."""
    lines = [f"  xtuner-add {command} {words}".rstrip() for words in arguments or ("",)]
    return "\n".join(("\b", "Example:" if len(lines) == 1 else "Examples:", *lines))


def add_options(
    function: _Function, options: Sequence[Callable[[_Function], _Function]]
) -> _Function:
    """Adds options to a command so that the help shows them in the given order."""
    for option in reversed(options):
        function = option(function)
    return function


def given_options(ctx: click.Context) -> dict[str, str]:
    """Returns the flags of the options that the command line names, by parameter."""
    return {
        str(parameter.name): parameter.opts[0]
        for parameter in ctx.command.params
        if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }


def refuse_unused(ctx: click.Context, names: Collection[str], why: str) -> None:
    """Refuses options that the other options leave without effect.

    Args:
        ctx: Context of the command.
        names: Parameters of the options.
        why: The rest of the sentence "--coords has no effect ...".

    Raises:
        click.UsageError: If the command line names such an option.
    """
    if unused := [flag for name, flag in given_options(ctx).items() if name in names]:
        verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        raise click.UsageError(f"{', '.join(unused)} {verb} no effect {why}; omit {them}", ctx)


def refuse_options_of_other_steps(
    ctx: click.Context, steps: Collection[str], steps_of_option: Mapping[str, Sequence[str]]
) -> None:
    """Refuses options that only steps read which do not run.

    Args:
        ctx: Context of the command.
        steps: Steps that run.
        steps_of_option: Names of the steps that read an option, by parameter.

    Raises:
        click.UsageError: If such an option was given.
    """
    for name, flag in given_options(ctx).items():
        readers = steps_of_option.get(name)
        if readers and not set(readers) & set(steps):
            raise click.UsageError(
                f"{flag} is for the step {' or '.join(readers)}, which does not run; add it to "
                f"--steps, or omit {flag}",
                ctx,
            )


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Reports errors that the user can fix in one line.

    The exit code is 2 for a `WrongArgumentError`, and 1 for the others.

    Args:
        *others: Exceptions to report in addition to `ValueError` and `OSError`.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except WrongArgumentError as error:
        raise click.UsageError(str(error)) from error
    except ModuleNotFoundError:
        raise  # the group of all commands says what to install
    except expected as error:
        raise click.ClickException(str(error)) from error


def name_values(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Parses the NAME=VALUE texts of a repeatable option.

    Names are returned unchanged; `keyword_values` also replaces hyphens by underscores.

    Raises:
        click.UsageError: If a text has no `=`, or no name before it.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def keyword_values(texts: Sequence[str], option: str = "--option") -> dict[str, str]:
    """Parses NAME=VALUE texts into keyword arguments; `batch-size` becomes `batch_size`."""
    return {name.replace("-", "_"): value for name, value in name_values(option, texts).items()}


def yaml_values(texts: Sequence[str], option: str = "--option") -> dict[str, Any]:
    """Parses NAME=VALUE texts like `keyword_values`, and the values as YAML.

    Raises:
        click.UsageError: If a text has no `=`, or its value is not valid YAML.
    """
    import yaml

    found = {}
    for name, value in keyword_values(texts, option).items():
        try:
            found[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise click.UsageError(f"{option} {name}={value}: not a YAML value: {error}") from error
    return found


def weight_values(text: str, option: str) -> dict[str, float]:
    """Parses `NAME=WEIGHT,...`; a name alone has weight 1.

    Raises:
        click.UsageError: If a weight is not a number.
    """
    found = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        try:
            found[name.strip()] = float(number) if equals else 1.0
        except ValueError as error:
            raise click.UsageError(f"{option} {part!r}: expected NAME=WEIGHT") from error
    return found


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int], Any]]:
    """Shows a progress bar; yields a function that advances it by a number of rows."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=" rows", disable=None) as bar:
        yield bar.update


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_read_workers(given: int | None, workers: int, *, on_gpu: bool) -> int:
    """Returns the number of reading processes per slide; by default as the option says."""
    if given is not None:
        return given
    return max(1, num_cores() // workers - 1) if on_gpu else 0


def end(num_skipped: int, log: Path, noun: str = "row") -> None:
    """Ends the command; if anything was skipped, prints one line and exits with code 3.

    Args:
        num_skipped: Number of skipped items.
        log: File that lists the skipped items.
        noun: Name of an item, in the singular.
    """
    if num_skipped:
        verb = "was" if num_skipped == 1 else "were"
        click.echo(
            f"Finished, but {counted(num_skipped, noun)} {verb} skipped: see {log}", err=True
        )
        # Under torchrun the code stays 0, since torchrun treats every other code as a crash.
        if "RANK" not in os.environ:
            click.get_current_context().exit(EXIT_SKIPPED)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun.

    Example:
        >>> counted(1, "slide"), counted(1204, "patch")
        ('1 slide', '1,204 patches')
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def end_of_job(report: Report, noun: str, output: Path) -> None:
    """Prints the report of a job, and exits with code 3 if the job skipped anything.

    Args:
        report: Report of the job.
        noun: Name of one of the job's units, in the singular.
        output: Output folder of the job, which contains skipped.jsonl.
    """
    click.echo(f"Wrote {counted(report.written, noun)} to {output}")
    for note, count in report.notes.items():
        click.echo(f"  of which {count:,}: {note}")
    for reason, count in report.incomplete.items():
        click.echo(f"  of which {count:,}: {reason}", err=True)
    for reason, count in report.passed_over.items():
        click.echo(
            f"Passed over {count:,}: {reason} (see {output / 'passed_over.jsonl'})", err=True
        )
    for reason, count in report.reasons.items():
        click.echo(f"Skipped {count:,}: {reason}", err=True)
    if report.skipped:
        skipped = output / SKIPPED_NAME
        with skipped.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        if "detail" in first:
            click.echo(f"  for instance {first['detail']}", err=True)
        verb = "was" if report.skipped == 1 else "were"
        click.echo(
            f"{counted(report.skipped, noun)} {verb} skipped; {skipped} says which and why. Fix "
            "the cause and add --retry-skipped to try again",
            err=True,
        )
    if report.exit_code:
        click.get_current_context().exit(report.exit_code)


RELAUNCHED_VARIABLE = "XTUNER_ADD_RELAUNCHED"
"""Set in processes that `relaunch` starts, whose results the parent prints."""


class RelaunchedCommand(click.Command):
    """A command that remembers its arguments, so that `relaunch` can start it in processes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments and stores the originals."""
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)


def relaunch(ctx: click.Context, *, always: bool = False) -> bool:
    """Runs a `RelaunchedCommand` in the processes that NPROC_PER_NODE and NNODES ask for.

    Args:
        ctx: Context of the command.
        always: Whether to use torchrun for a single process too.

    Returns:
        Whether child processes have run the command. If they failed, the command exits with their
        exit code instead.

    Raises:
        click.UsageError: If the environment describes an impossible set of processes.
    """
    runner = ["-m", "xtuner_add.cli", str(ctx.command.name), *ctx.meta[__name__]]
    try:
        command = torchrun_command(runner, os.environ, always=always)
    except LaunchError as error:
        raise click.UsageError(str(error), ctx) from error
    if command is None:
        return False
    if code := run_child(command, {**child_environ(os.environ), RELAUNCHED_VARIABLE: "1"}):
        ctx.exit(code)
    return True


def shows_results() -> bool:
    """Returns whether this process prints results: rank 0, unless a parent process prints them."""
    return os.environ.get("RANK", "0") == "0" and RELAUNCHED_VARIABLE not in os.environ
