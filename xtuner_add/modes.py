"""XTuner's modes: which module runs each of them and how it is started.

Reading this table imports nothing of XTuner, so that help answers at once. The options of a mode
are read from the source of the installed XTuner and are therefore always those of that version.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from xtuner_add.paths import xtuner_dir


@dataclass(frozen=True)
class Mode:
    """One mode of XTuner.

    Attributes:
        name: what the user types; two words where XTuner groups modes (``convert merge``).
        module: the module of XTuner that runs it.
        summary: one line for help.
        takes_config: whether the first argument is a config, by path or by bare name.
        distributed: whether it can run in several processes (``NPROC_PER_NODE``, ``NNODES``).
        adapts_config: whether the config is fitted to the machine before it is used.
    """

    name: str
    module: str
    summary: str
    takes_config: bool = False
    distributed: bool = False
    adapts_config: bool = False


_MODES = (
    Mode(
        "train",
        "xtuner.tools.train",
        "Train a model from a config.",
        takes_config=True,
        distributed=True,
        adapts_config=True,
    ),
    Mode(
        "test",
        "xtuner.tools.test",
        "Run the evaluation loop of a config.",
        takes_config=True,
        distributed=True,
        adapts_config=True,
    ),
    Mode("chat", "xtuner.tools.chat", "Talk to a language model or a LLaVA model."),
    Mode(
        "convert pth_to_hf",
        "xtuner.tools.model_converters.pth_to_hf",
        "Turn a training checkpoint into a Hugging Face folder.",
        takes_config=True,
    ),
    Mode(
        "convert merge",
        "xtuner.tools.model_converters.merge",
        "Merge a LoRA adapter into its base model.",
    ),
    Mode(
        "convert split",
        "xtuner.tools.model_converters.split",
        "Split a language model into its smallest shards.",
    ),
    Mode(
        "log-dataset",
        "xtuner.tools.log_dataset",
        "Print samples of a config's training data as the model sees them.",
        takes_config=True,
    ),
    Mode(
        "check-custom-dataset",
        "xtuner.tools.check_custom_dataset",
        "Check the training data of a config.",
        takes_config=True,
    ),
    Mode(
        "list-dataset-format",
        "xtuner.tools.list_dataset_format",
        "List the dataset formats XTuner reads.",
    ),
    Mode(
        "preprocess arxiv",
        "xtuner.tools.data_preprocess.arxiv",
        "Filter the arXiv metadata dump by category and date.",
    ),
    Mode(
        "preprocess refcoco",
        "xtuner.tools.data_preprocess.convert_refcoco",
        "Convert RefCOCO annotations.",
    ),
    Mode(
        "mmbench",
        "xtuner.tools.mmbench",
        "Evaluate a LLaVA model on MMBench files.",
        distributed=True,
    ),
    Mode(
        "eval_refcoco",
        "xtuner.tools.eval_refcoco",
        "Evaluate a LLaVA model on RefCOCO.",
        distributed=True,
    ),
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _MODES}


def read_arguments(mode: Mode) -> list[tuple[str, str]]:
    """Return the arguments of a mode as XTuner declares them: ``(flags, help)``, in order.

    The source is parsed, not run: importing it takes ten seconds.

    Raises:
        FileNotFoundError: if XTuner is not installed.
    """
    relative = Path(*mode.module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse((xtuner_dir() / relative).read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    ]
    return [_describe(call) for call in sorted(calls, key=lambda call: call.lineno)]


def _describe(call: ast.Call) -> tuple[str, str]:
    flags = ", ".join(filter(None, map(_text, call.args)))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    choices = keywords.get("choices")
    if isinstance(choices, (ast.List, ast.Tuple)):
        flags += " [" + "|".join(str(ast.literal_eval(item)) for item in choices.elts) + "]"
    return flags, " ".join(_text(keywords.get("help")).split())


def _text(node: ast.AST | None) -> str:
    """Return the text of a string literal, or nothing for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
