"""The console script ``xtuner-add``.

Sub-commands are imported when they run: help answers without torch, XTuner or MMEngine.
"""

from __future__ import annotations

from typing import cast

import click

from xtuner_add import launch
from xtuner_add.modes import MODES, Mode, read_arguments
from xtuner_add.plugins import distribution_name, load_command, load_target, plugin_commands

COMMANDS = {
    "answer": (
        "xtuner_add.commands.evaluate:answer",
        "Ask a trained model about images.",
    ),
    "chat": (
        "xtuner_add.commands.serve:chat",
        "Talk to a trained model in the terminal.",
    ),
    "check-merge": (
        "xtuner_add.commands.release:check_merge",
        "Check that a model is a base model with adapters merged in.",
    ),
    "clean-pairs": (
        "xtuner_add.commands.datasets:clean_pairs",
        "Keep the rows that show human pathology, by named steps, with a report.",
    ),
    "convert-dataset": (
        "xtuner_add.commands.datasets:convert_dataset",
        "Turn a public dataset into pairs, conversations or folders of classes.",
    ),
    "clip-retrieval": (
        "xtuner_add.commands.clip:clip_retrieval",
        "Find captions for images and images for captions by a CLIP: recall at k.",
    ),
    "clip-zero-shot": (
        "xtuner_add.commands.clip:clip_zero_shot",
        "Classify the images of public data sets by a CLIP and prompts.",
    ),
    "copy-cfg": (
        "xtuner_add.commands.configs:copy_cfg",
        "Copy a config known by name, with the files it inherits from.",
    ),
    "dataformat": (
        "xtuner_add.commands.datasets:dataformat",
        "Turn image-caption pairs into conversations for training.",
    ),
    "demo": (
        "xtuner_add.commands.demos:demo",
        "Train a small PA-LLaVA on data made here and answer held-out questions.",
    ),
    "demo-pathgen": (
        "xtuner_add.commands.demos:demo_pathgen",
        "Caption made-up slides, train a CLIP on the captions and score it.",
    ),
    "describe": (
        "xtuner_add.commands.captions:describe",
        "Write captions of patches by a vision-language model.",
    ),
    "doctor": (
        "xtuner_add.commands.doctor:doctor",
        "Say what is installed here, and which encoders can be loaded.",
    ),
    "embed": (
        "xtuner_add.commands.gigapath:embed",
        "Embed the tiles of slides, and slides as wholes, by Prov-GigaPath.",
    ),
    "revise": (
        "xtuner_add.commands.captions:revise",
        "Check captions against their images, correct or reject them.",
    ),
    "summarise": (
        "xtuner_add.commands.captions:summarise",
        "Shorten captions to what CLIP reads.",
    ),
    "filter-captions": (
        "xtuner_add.commands.captions:filter_captions",
        "Drop captions by length, refusals, leaks and duplicates.",
    ),
    "make-instructions": (
        "xtuner_add.commands.captions:make_instructions",
        "Make conversations and questions from captions.",
    ),
    "export": (
        "xtuner_add.commands.release:export",
        "Write one folder that transformers loads.",
    ),
    "extract": (
        "xtuner_add.commands.slides:extract",
        "Cut patches with captions out of slides: PathGen's JSON, or coordinates.",
    ),
    "extract-adapter": (
        "xtuner_add.commands.release:extract_adapter",
        "Write the LoRA adapter that leads from one model to another.",
    ),
    "evaluate": (
        "xtuner_add.commands.evaluate:evaluate",
        "Evaluate on any benchmark by name, those of other packages included.",
    ),
    "finetune-slides": (
        "xtuner_add.commands.gigapath:finetune_slides",
        "Fine-tune the slide encoder on tile embeddings of labelled slides, and test it.",
    ),
    "gdc-manifest": (
        "xtuner_add.commands.slides:gdc_manifest",
        "Write the manifest to fetch the slides of annotations with gdc-client.",
    ),
    "list-cfg": (
        "xtuner_add.commands.configs:list_cfg",
        "List the configs known by name: this project's, then XTuner's.",
    ),
    "merge": (
        "xtuner_add.commands.release:merge",
        "Merge LoRA adapters into a base model, in little memory.",
    ),
    "pathvqa": (
        "xtuner_add.commands.evaluate:pathvqa",
        "Evaluate on PathVQA, or other open and yes/no questions.",
    ),
    "plugins": (
        "xtuner_add.plugins:command",
        "List the encoders, connectors and sub-commands that can be used by name.",
    ),
    "pmcvqa": (
        "xtuner_add.commands.evaluate:pmcvqa",
        "Evaluate on PMC-VQA, or other multiple choice.",
    ),
    "score": (
        "xtuner_add.commands.evaluate:score",
        "Score answers that are there already, also by a judge.",
    ),
    "select-patches": (
        "xtuner_add.commands.slides:select_patches",
        "Choose representative patches of slides by prompts, report and clusters.",
    ),
    "serve": (
        "xtuner_add.commands.serve:serve",
        "Serve a trained model: web page and OpenAI-compatible endpoint.",
    ),
    "zero-shot": (
        "xtuner_add.commands.evaluate:zero_shot",
        "Classify images by asking, and score the classes.",
    ),
    "pth-to-hf": (
        "xtuner_add.commands.release:pth_to_hf",
        "Convert a training checkpoint without building the language model.",
    ),
    "probe-tiles": (
        "xtuner_add.commands.gigapath:probe_tiles",
        "Train a linear probe on labelled tile embeddings, read from their zip, and test it.",
    ),
    "push": (
        "xtuner_add.commands.release:push",
        "Publish a folder on the hub; shows what it would send first.",
    ),
    "split": (
        "xtuner_add.commands.release:split",
        "Write a model with one tensor per shard.",
    ),
    "conform": (
        "xtuner_add.commands.slides:conform",
        "Check feature files of other tools for known defects, and convert them.",
    ),
    "tile": (
        "xtuner_add.commands.slides:tile",
        "Find the patches of slides: tissue, size, resolution, overlap.",
    ),
    "tokenise": (
        "xtuner_add.commands.datasets:tokenise",
        "Tokenise conversations once, so that training starts at once.",
    ),
    "train-clip": (
        "xtuner_add.commands.clip:train_clip",
        "Train a pathology CLIP on image-caption pairs, in stages, by open_clip.",
    ),
    "train-mil": (
        "xtuner_add.commands.gigapath:train_mil",
        "Classify slides by attention over stored features: train, test, draw.",
    ),
}
"""Our own sub-commands: name -> (``module:name`` of a click command, summary)."""

_HELP_FLAGS = ("-h", "--help")
_SETTINGS = {"help_option_names": list(_HELP_FLAGS)}


class ForwardedCommand(click.Command):
    """A mode of XTuner: every argument goes there as it is; only help is answered here."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(
            mode.name.split()[-1],
            help=f"{mode.summary}\n\n{_notes(mode)}",
            short_help=mode.summary,
            context_settings=_SETTINGS,
        )
        self.mode = mode

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments for XTuner, unless help is asked for."""
        if any(argument in _HELP_FLAGS for argument in args):
            click.echo(ctx.get_help())
            ctx.exit()
        ctx.args = args
        return []

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the usage line: the positional arguments of XTuner's parser."""
        positional = [flags for flags, _ in self._arguments() if not flags.startswith("-")]
        return [*map(str.upper, positional), "[OPTIONS]"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments that the installed XTuner declares."""
        arguments = self._arguments()
        for title, rows in (
            ("Arguments", [row for row in arguments if not row[0].startswith("-")]),
            ("Options", [row for row in arguments if row[0].startswith("-")]),
        ):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> None:
        """Run the mode and end with its exit code."""
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


class LazyGroup(click.Group):
    """The top of the command line: XTuner's modes, our sub-commands, those of other packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all sub-commands."""
        own = {*super().list_commands(ctx), *COMMANDS}
        return [*sorted(own), *sorted(set(plugin_commands()) - own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a sub-command; our own names go before those of other packages."""
        if cmd_name in COMMANDS:
            return cast(click.Command, load_target(COMMANDS[cmd_name][0]))
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in (others := plugin_commands()):
            command = load_command(others[cmd_name])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sub-commands without importing them."""
        modes = [
            (name, command.get_short_help_str(limit=100))
            for name, command in sorted(self.commands.items())
        ]
        own = [(name, summary) for name, (_, summary) in sorted(COMMANDS.items())]
        taken = {*self.commands, *COMMANDS}
        others = [
            (name, f"from {distribution_name(entry_point)}")
            for name, entry_point in sorted(plugin_commands().items())
            if name not in taken
        ]
        for title, rows in (
            ("Commands", own),
            ("Modes of XTuner", modes),
            ("Commands of other packages", others),
        ):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings=_SETTINGS)
@click.version_option(package_name="xtuner-add", prog_name="xtuner-add")
def main() -> None:
    """Pathology vision-language models that train inside XTuner.

    Exit codes: 0 success; 2 wrong usage; 3 training finished but samples were skipped; otherwise
    the code of what failed.
    """


def _notes(mode: Mode) -> str:
    notes = []
    if mode.takes_config:
        notes.append(
            "CONFIG is a file, or the bare name of one of the configs that `xtuner-add list-cfg` "
            "shows."
        )
    if mode.distributed:
        notes.append(
            "Several processes: set NPROC_PER_NODE, and on several machines NNODES, NODE_RANK, "
            "ADDR and PORT."
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
                    click.Group(parent, help=summaries[parent], context_settings=_SETTINGS)
                )
            target = cast(click.Group, group.commands[parent])
        target.add_command(ForwardedCommand(mode))


_add_modes(main)

if __name__ == "__main__":
    main()
