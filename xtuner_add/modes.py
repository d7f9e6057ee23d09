"""Table of XTuner's modes: the module that runs each mode, and how it is started.

The table does not import XTuner, so that help is fast. The options of a mode are parsed from the
source of the installed XTuner, so they always match its version.
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
        name: Name on the command line; two words for grouped modes (`convert merge`). XTuner's
            `chat` is called `xtuner-chat`, because `chat` is one of our commands.
        module: Module of XTuner that runs the mode.
        summary: One-line description for the help.
        example: Arguments of the example in the help.
        takes_config: Whether the first argument is a config, given as a path or a name.
        distributed: Whether the mode can run in several processes (`NPROC_PER_NODE`, `NNODES`).
        adapts_config: Whether the config is adapted to the machine before use.
    """

    name: str
    module: str
    summary: str
    example: str
    takes_config: bool = False
    distributed: bool = False
    adapts_config: bool = False


_MODES = (
    Mode(
        "train",
        "xtuner.tools.train",
        "Train a model from a config.",
        "pallava_domain_alignment_tiny --work-dir work_dirs/alignment",
        takes_config=True,
        distributed=True,
        adapts_config=True,
    ),
    Mode(
        "test",
        "xtuner.tools.test",
        "Run the evaluation loop of a config.",
        "my_config.py --checkpoint iter_100.pth",
        takes_config=True,
        distributed=True,
        adapts_config=True,
    ),
    Mode(
        "xtuner-chat",
        "xtuner.tools.chat",
        "Talk to a language model or a LLaVA model with XTuner's own chat.",
        "internlm/internlm2-chat-7b --prompt-template internlm2_chat",
    ),
    Mode(
        "convert pth_to_hf",
        "xtuner.tools.model_converters.pth_to_hf",
        "Convert a training checkpoint to a Hugging Face folder. This is XTuner's converter: it "
        "builds the whole model, which takes memory, and writes one folder per part. Our own "
        "command `pth-to-hf` only reads the checkpoint (DeepSpeed folders too, without DeepSpeed), "
        "verifies digests, and records the recipe that `export` needs.",
        "my_config.py iter_100.pth converted",
        takes_config=True,
    ),
    Mode(
        "convert merge",
        "xtuner.tools.model_converters.merge",
        "Merge a LoRA adapter into its base model, which is loaded whole. Our own command `merge` "
        "works shard by shard.",
        "base adapter merged",
    ),
    Mode(
        "convert split",
        "xtuner.tools.model_converters.split",
        "Split a language model into its smallest shards.",
        "model shards",
    ),
    Mode(
        "log-dataset",
        "xtuner.tools.log_dataset",
        "Print samples of a config's training data as the model sees them.",
        "internlm2_chat_7b_qlora_alpaca_e3",
        takes_config=True,
    ),
    Mode(
        "check-custom-dataset",
        "xtuner.tools.check_custom_dataset",
        "Check the training data of a config.",
        "my_config.py",
        takes_config=True,
    ),
    Mode(
        "list-dataset-format",
        "xtuner.tools.list_dataset_format",
        "List the dataset formats XTuner reads.",
        "",
    ),
    Mode(
        "preprocess arxiv",
        "xtuner.tools.data_preprocess.arxiv",
        "Filter the arXiv metadata dump by category and date.",
        "arxiv-metadata.json filtered.json --categories cs.AI --start-date 2020-01-01",
    ),
    Mode(
        "preprocess refcoco",
        "xtuner.tools.data_preprocess.convert_refcoco",
        "Convert RefCOCO annotations.",
        "--ann-path refcoco_annotations --image-path coco/train2014 --save-path out",
    ),
    Mode(
        "mmbench",
        "xtuner.tools.mmbench",
        "Evaluate a LLaVA model on MMBench files.",
        "llm --visual-encoder clip --llava llava --prompt-template vicuna --data-path MMBench.tsv "
        "--work-dir out",
        distributed=True,
    ),
    Mode(
        "eval_refcoco",
        "xtuner.tools.eval_refcoco",
        "Evaluate a LLaVA model on RefCOCO.",
        "llm --visual-encoder clip --llava llava --prompt-template vicuna --data-path refcoco.json "
        "--work-dir out",
        distributed=True,
    ),
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _MODES}


def read_arguments(mode: Mode) -> list[tuple[str, str]]:
    """Returns the arguments that XTuner declares for a mode, as pairs `(flags, help)`, in order.

    The source is parsed rather than imported, which would take ten seconds.

    Raises:
        FileNotFoundError: If XTuner is not installed.
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
    return [_describe_argument(call) for call in sorted(calls, key=lambda call: call.lineno)]


def _describe_argument(call: ast.Call) -> tuple[str, str]:
    flags = ", ".join(filter(None, map(_literal_text, call.args)))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    choices = keywords.get("choices")
    if isinstance(choices, (ast.List, ast.Tuple)):
        flags += " [" + "|".join(str(ast.literal_eval(item)) for item in choices.elts) + "]"
    return flags, " ".join(_literal_text(keywords.get("help")).split())


def _literal_text(node: ast.AST | None) -> str:
    """Returns the value of a string literal; an empty string for any other node."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
