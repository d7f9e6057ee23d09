"""The console script `xtuner-add`.

Sub-commands are imported when they run, so that help needs neither torch nor XTuner nor MMEngine.
"""

from __future__ import annotations

from typing import Any, cast

import click

from pathcore.deferred_imports import defer_imports
from pathcore.extras import missing_package
from pathcore.names import did_you_mean
from xtuner_add import launch
from xtuner_add.commands.options import example
from xtuner_add.modes import MODES, Mode, read_arguments
from xtuner_add.plugins import distribution_name, load_command, load_target, plugin_commands

_COMMANDS = "xtuner_add.commands"

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Slides": {
        "tile": (f"{_COMMANDS}.slides:tile", "Find the patches of slides that show tissue."),
        "extract": (f"{_COMMANDS}.slides:extract", "Cut patches and their captions out of slides."),
        "select-patches": (
            f"{_COMMANDS}.slides:select_patches",
            "Choose representative patches of slides.",
        ),
        "conform": (
            f"{_COMMANDS}.slides:conform",
            "Check feature files of other tools for known defects, and convert them.",
        ),
        "gdc-manifest": (
            f"{_COMMANDS}.slides:gdc_manifest",
            "Write the manifest with which gdc-client downloads slides.",
        ),
        "embed": (
            f"{_COMMANDS}.gigapath:embed",
            "Embed tiles and whole slides with Prov-GigaPath.",
        ),
        "encode-slides": (
            f"{_COMMANDS}.gigapath:encode_slides",
            "Embed slides or patients from patch features, with a slide encoder by name.",
        ),
        "probe-tiles": (
            f"{_COMMANDS}.gigapath:probe_tiles",
            "Evaluate an encoder by linear probe, nearest neighbours or few shots.",
        ),
        "finetune-slides": (
            f"{_COMMANDS}.gigapath:finetune_slides",
            "Fine-tune and test slide classifiers on tile embeddings.",
        ),
        "train-mil": (
            f"{_COMMANDS}.gigapath:train_mil",
            "Train and test attention MIL on tile features.",
        ),
    },
    "Captions": {
        "describe": (f"{_COMMANDS}.captions:describe", "Caption patches with a model."),
        "revise": (
            f"{_COMMANDS}.captions:revise",
            "Check captions against their images; correct or reject them.",
        ),
        "summarise": (
            f"{_COMMANDS}.captions:summarise",
            "Shorten captions to CLIP's context length.",
        ),
        "filter-captions": (
            f"{_COMMANDS}.captions:filter_captions",
            "Drop refusals, leaked prompts, duplicates and wrong lengths.",
        ),
        "make-instructions": (
            f"{_COMMANDS}.captions:make_instructions",
            "Turn captions into conversations and questions.",
        ),
    },
    "Datasets": {
        "convert-dataset": (
            f"{_COMMANDS}.datasets:convert_dataset",
            "Convert a public dataset to pairs, conversations or class folders.",
        ),
        "join-datasets": (
            f"{_COMMANDS}.datasets:join_datasets",
            "Join sets with separate image folders to one.",
        ),
        "dataformat": (
            f"{_COMMANDS}.datasets:dataformat",
            "Turn image-caption pairs into conversations.",
        ),
        "clean-pairs": (
            f"{_COMMANDS}.datasets:clean_pairs",
            "Keep the pairs that show human pathology.",
        ),
        "tokenise": (
            f"{_COMMANDS}.datasets:tokenise",
            "Tokenise conversations once, before training.",
        ),
    },
    "CLIP": {
        "train-clip": (f"{_COMMANDS}.clip:train_clip", "Train a CLIP on image-caption pairs."),
        "clip-zero-shot": (
            f"{_COMMANDS}.clip:clip_zero_shot",
            "Classify public image sets with a CLIP and prompts.",
        ),
        "clip-zero-shot-slides": (
            f"{_COMMANDS}.clip:clip_zero_shot_slides",
            "Classify slides by the top k patches for prompts (MI-Zero), and draw maps.",
        ),
        "clip-retrieval": (
            f"{_COMMANDS}.clip:clip_retrieval",
            "Retrieve captions for images, images for captions, or images for images.",
        ),
    },
    "CITE": {
        "cite-splits": (
            f"{_COMMANDS}.cite:splits",
            "Write the annotation files of PatchGastric.",
        ),
        "cite-texts": (f"{_COMMANDS}.cite:texts", "Embed the descriptions of classes."),
        "cite-features": (
            f"{_COMMANDS}.cite:features",
            "Compute the features of a dataset once, for the baselines.",
        ),
        "cite-sweep": (
            f"{_COMMANDS}.cite:sweep_slides",
            "Train and test configs over numbers of slides and seeds.",
        ),
        "cite-export": (
            f"{_COMMANDS}.cite:export",
            "Export a classifier that runs without MMEngine.",
        ),
        "cite-score-maps": (
            f"{_COMMANDS}.cite:score_maps",
            "Draw a classifier's scores over slides.",
        ),
        "cite-convert": (
            f"{_COMMANDS}.cite:convert_weights",
            "Convert an image encoder's weights between libraries.",
        ),
    },
    "PA-LLaVA training": {
        "list-cfg": (f"{_COMMANDS}.configs:list_cfg", "List the configs known by name."),
        "copy-cfg": (
            f"{_COMMANDS}.configs:copy_cfg",
            "Copy a config and the files that it inherits from.",
        ),
        "plan": (
            f"{_COMMANDS}.configs:plan",
            "Estimate the GPU memory of a training before it runs.",
        ),
        "demo": (
            f"{_COMMANDS}.demos:demo",
            "Train a small PA-LLaVA on synthetic slides and evaluate it.",
        ),
        "demo-pathgen": (
            f"{_COMMANDS}.demos:demo_pathgen",
            "Caption synthetic slides and train a CLIP on the captions.",
        ),
    },
    "Release": {
        "pth-to-hf": (
            f"{_COMMANDS}.release:pth_to_hf",
            "Convert a checkpoint without building the language model.",
        ),
        "merge": (
            f"{_COMMANDS}.release:merge",
            "Merge LoRA adapters into a base model, shard by shard.",
        ),
        "export": (f"{_COMMANDS}.release:export", "Write one folder that transformers loads."),
        "quantise": (
            f"{_COMMANDS}.release:quantise",
            "Write an exported model with a language model in 8 or 4 bits.",
        ),
        "split": (f"{_COMMANDS}.release:split", "Write a model with one tensor per shard."),
        "check-merge": (
            f"{_COMMANDS}.release:check_merge",
            "Check that a model is a base model with adapters merged in.",
        ),
        "extract-adapter": (
            f"{_COMMANDS}.release:extract_adapter",
            "Write the difference of two models as a LoRA adapter.",
        ),
        "push": (f"{_COMMANDS}.release:push", "Publish a folder on the Hugging Face hub."),
    },
    "Evaluation": {
        "evaluate": (f"{_COMMANDS}.evaluate:evaluate", "Score any model on a benchmark by name."),
        "score": (f"{_COMMANDS}.evaluate:score", "Score existing answers."),
        "compare-scores": (
            f"{_COMMANDS}.evaluate:compare_scores",
            "Compare models on the same questions, with paired intervals.",
        ),
        "reproduce": (
            f"{_COMMANDS}.reproduce:reproduce",
            "Measure a published figure, and find out why it differs.",
        ),
    },
    "Use": {
        "answer": (f"{_COMMANDS}.evaluate:answer", "Ask a trained model about images."),
        "chat": (f"{_COMMANDS}.serve:chat", "Talk to a trained model in the terminal."),
        "serve": (
            f"{_COMMANDS}.serve:serve",
            "Serve a model: web page and OpenAI-compatible endpoint.",
        ),
        "doctor": (
            f"{_COMMANDS}.doctor:doctor",
            "Show what is installed, and which encoders can be loaded.",
        ),
        "setup-host": (
            f"{_COMMANDS}.host:setup_host",
            "Install XTuner, which trains, after the extra train.",
        ),
        "plugins": (
            "xtuner_add.plugins:command",
            "List everything that can be used by name, including plug-ins.",
        ),
    },
}
"""Our sub-commands by subject: name -> (`module:name` of the click command, summary)."""

EXTRAS = {
    "Slides": "gigapath",
    "Captions": "pathgen",
    "Datasets": "convert",
    "CLIP": "pathgen",
    "CITE": "cite",
    "PA-LLaVA training": "train,demo",
    "Release": "train",
    "Evaluation": "evaluate",
    "Use": "serve",
    # Commands that need another one than their subject:
    "select-patches": "pathgen",
    "plan": "train",
    "tokenise": "train",
    "answer": "evaluate",
}
"""Extra with the requirements of a command, by subject or name."""

COMMANDS = {name: entry for commands in GROUPS.values() for name, entry in commands.items()}

_HELP_FLAGS = ("-h", "--help")
_SETTINGS = {"help_option_names": list(_HELP_FLAGS)}


class ForwardedCommand(click.Command):
    """A mode of XTuner. Arguments are forwarded unchanged; only `--help` is handled here."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(
            mode.name.split()[-1],
            help=f"{mode.summary}\n\n{_notes(mode)}",
            epilog=example(mode.name, mode.example),
            short_help=mode.summary,
            context_settings=_SETTINGS,
        )
        self.mode = mode

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps all arguments for XTuner; prints the help if requested."""
        if any(argument in _HELP_FLAGS for argument in args):
            click.echo(ctx.get_help())
            ctx.exit()
        ctx.args = args
        return []

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Returns the usage line with the positional arguments of XTuner's parser."""
        positional = [flags for flags, _ in self._arguments() if not flags.startswith("-")]
        return [*map(str.upper, positional), "[OPTIONS]"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the arguments that the installed XTuner declares."""
        arguments = self._arguments()
        for title, rows in (
            ("Arguments", [row for row in arguments if not row[0].startswith("-")]),
            ("Options", [row for row in arguments if row[0].startswith("-")]),
        ):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> None:
        """Runs the mode and exits with its exit code."""
        try:
            code = launch.launch(self.mode, ctx.args)
        except (FileNotFoundError, launch.LaunchError) as error:
            raise click.UsageError(str(error), ctx) from error
        ctx.exit(code)

    def _arguments(self) -> list[tuple[str, str]]:
        try:
            return read_arguments(self.mode)
        except FileNotFoundError as error:
            return [("[OPTIONS]", str(error))]


class SuggestingGroup(click.Group):
    """A group that suggests similar names for an unknown command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds a sub-command by name.

        Raises:
            click.UsageError: If there is none; the message suggests similar names.
        """
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not name.startswith("-"):
            hint = did_you_mean(name, self.list_commands(ctx))
            raise click.UsageError(f"no such command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """Top-level group: our sub-commands, XTuner's modes, and commands of other packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all sub-commands."""
        own = {*super().list_commands(ctx), *COMMANDS}
        return [*sorted(own), *sorted(set(plugin_commands()) - own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports and returns a sub-command; our own take precedence over other packages'.

        Underscores match hyphens, because the original scripts spell names like `zero_shot`.
        """
        for name in dict.fromkeys((cmd_name, cmd_name.replace("_", "-"))):
            if name in COMMANDS:
                return cast(click.Command, load_target(COMMANDS[name][0]))
            if command := super().get_command(ctx, name):
                return command
            if name in (others := plugin_commands()):
                return load_command(others[name])
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a sub-command; one whose requirements are missing says how to install them."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name = ctx.invoked_subcommand or ""
            title = next((title for title, commands in GROUPS.items() if name in commands), "")
            said = missing_package(error, name, EXTRAS.get(name) or EXTRAS.get(title, "train"))
            raise click.ClickException(str(said)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the sub-commands by subject, without importing them."""
        sections = {
            title: [(name, summary) for name, (_, summary) in commands.items()]
            for title, commands in GROUPS.items()
        }
        sections["XTuner's modes"] = [
            (name, command.get_short_help_str(limit=100))
            for name, command in sorted(self.commands.items())
        ]
        sections["Commands of other packages"] = [
            (name, f"from {distribution_name(entry_point)}")
            for name, entry_point in sorted(plugin_commands().items())
            if name not in {*self.commands, *COMMANDS}
        ]
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings=_SETTINGS)
@click.version_option(package_name="xtuner-add", prog_name="xtuner-add")
def main() -> None:
    """Pathology vision-language models that train inside XTuner.

    Exit codes: 0 success; 1 failure; 2 wrong usage; 3 finished, but something was skipped (the
    output says what and why). A mode of XTuner that fails returns its own code.
    """
    defer_imports()


def _notes(mode: Mode) -> str:
    notes = []
    if mode.takes_config:
        notes.append("CONFIG is a file, or the name of a config that `xtuner-add list-cfg` shows.")
    if mode.distributed:
        notes.append(
            "To use several processes, set NPROC_PER_NODE; on several machines also NNODES, "
            "NODE_RANK, ADDR and PORT."
        )
    if mode.name == "train":
        notes.append(
            f"--track {'|'.join(launch.TRACKERS)} chooses where losses go besides the log file. "
            "--debug shows tracebacks and all that the libraries log."
        )
    return " ".join(notes)


def _add_modes(group: click.Group) -> None:
    summaries = {
        "convert": "Convert checkpoints: to Hugging Face, merged, split.",
        "preprocess": "Prepare public datasets.",
    }
    for mode in MODES.values():
        target = group
        if " " in mode.name:
            parent = mode.name.split()[0]
            if parent not in group.commands:
                group.add_command(
                    SuggestingGroup(parent, help=summaries[parent], context_settings=_SETTINGS)
                )
            target = cast(click.Group, group.commands[parent])
        target.add_command(ForwardedCommand(mode))


_add_modes(main)

if __name__ == "__main__":
    main()
