from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pathcore.exit_codes import EXIT_USAGE
from xtuner_add import cli, launch, training_check
from xtuner_add.modes import MODES, read_arguments

NO_ARGUMENTS = ("cite-splits", "demo", "demo-pathgen", "doctor", "list-cfg", "plugins",
                "setup-host")  # fmt: skip
HEAVY = ("torch", "transformers", "xtuner", "mmengine", "deepspeed", "datasets", "numpy")


LIGHT = [
    ["--help"], ["--version"], ["list-cfg"],
    *([name, "--help"] for name in cli.COMMANDS),
    *([*name.split(), "--help"] for name in MODES),
]  # fmt: skip
# Forks one process per command line off one that has imported the command line only.
RUN_EACH = f"""
import json, os, sys
from xtuner_add.cli import main
assert not [m for m in {HEAVY!r} if m in sys.modules]
for arguments in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    try:
        main(arguments)
    except SystemExit as end:
        heavy = [m for m in {HEAVY!r} if m in sys.modules]
        print("\\n" + json.dumps(["ran", arguments, end.code, heavy]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[int, list[str]]]:
    """Exit code, and which heavy packages were imported, by command line."""
    command = [sys.executable, "-c", RUN_EACH, json.dumps(LIGHT)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('["ran", ')]
    return {" ".join(arguments): (code, heavy) for _, arguments, code, heavy in rows}


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_imports_nothing_heavy(
    arguments: list[str], loaded: dict[str, tuple[int, list[str]]]
) -> None:
    assert loaded[" ".join(arguments)] == (0, [])


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, list(arguments))
    return result.exit_code, result.output


def test_help_shows_every_mode_and_command() -> None:
    code, output = invoke("--help")
    assert code == 0
    for name in {name.split()[0] for name in MODES} | set(cli.COMMANDS):
        assert f"  {name} " in output


def test_help_shows_each_name_once() -> None:
    _, output = invoke("--help")
    names = re.findall(r"^  ([a-z_-]+)  ", output, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 50
    for title in ("Slides", "Captions", "Datasets", "CLIP", "CITE", "PA-LLaVA training", "Release",
                  "Evaluation", "Use", "XTuner's modes"):  # fmt: skip
        assert f"\n{title}:\n" in output


def test_version_is_that_of_the_distribution() -> None:
    assert invoke("--version") == (0, f"xtuner-add, version {version('xtuner-add')}\n")


def test_help_of_a_mode_shows_the_options_of_the_installed_xtuner() -> None:
    code, output = invoke("train", "--help")
    assert code == 0
    assert "Usage: main train CONFIG [OPTIONS]" in output
    assert "--deepspeed" in output
    assert "specify checkpoint path to be resumed from." in output
    assert "[none|pytorch|slurm|mpi]" in output
    assert "NPROC_PER_NODE" in output


def test_every_mode_of_xtuner_has_a_command_of_ours() -> None:
    from xtuner.entry_point import modes

    theirs: set[str] = set()
    for name, entry in modes.items():
        if isinstance(entry, dict):
            theirs |= {f"{name} {part}" for part in entry if not part.startswith("-")}
        else:
            theirs.add(name)
    assert theirs <= set(MODES) | set(cli.COMMANDS)


@pytest.mark.parametrize("name", MODES)
def test_arguments_of_every_mode_are_read_from_its_source(name: str) -> None:
    arguments = read_arguments(MODES[name])
    positional = [flags for flags, _ in arguments if not flags.startswith("-")]
    assert MODES[name].takes_config == (positional[:1] == ["config"])
    assert bool(arguments) == (name != "list-dataset-format")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands that would have been started, each of which "ends" with exit code 7."""
    commands: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], environ: dict[str, str]) -> int:
        commands.append((list(command), dict(environ)))
        return 7

    monkeypatch.setattr(launch, "run_child", record)
    # The configs here are empty or name files of other machines; test_training_check.py covers it.
    monkeypatch.setattr(training_check, "check_training", lambda *_: None)
    return commands


def test_arguments_reach_xtuner_as_they_are(launched: list, tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    config.touch()
    options = ["--cfg-options", "a.b=1", "c=[1,2]", "--seed", "1024", "--deepspeed", "zero2"]
    code, _ = invoke("train", str(config), *options)
    assert code == 7
    assert launched[0][0][1:] == ["-m", "xtuner_add.run_mode", "train", str(config), *options]
    invoke("convert", "merge", "llm", "adapter", "out", "--device", "cpu")
    assert launched[1][0][3:] == ["convert merge", "llm", "adapter", "out", "--device", "cpu"]


def test_bare_config_name_becomes_a_file(launched: list) -> None:
    invoke("train", "pallava_domain_alignment_tiny", "--work-dir", "w")
    config, *rest = launched[0][0][4:]
    assert Path(config).is_file()
    assert rest == ["--work-dir", "w"]
    invoke("convert", "pth_to_hf", "pallava_domain_alignment_tiny.py", "a.pth", "out")
    assert launched[1][0][4:] == [config, "a.pth", "out"]


@pytest.mark.parametrize("mode", [["train"], ["test"], ["convert", "pth_to_hf"]])
def test_unknown_config_starts_nothing(launched: list, mode: list[str]) -> None:
    code, output = invoke(*mode, "pallava_domain_aligment_tiny.py")
    assert code == 2
    assert "did you mean" in output
    assert "pallava_domain_alignment_tiny" in output
    assert launched == []


def test_impossible_processes_start_nothing(
    launched: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "many")
    config = tmp_path / "own.py"
    config.touch()
    code, output = invoke("train", str(config))
    assert code == 2
    assert "NPROC_PER_NODE='many'" in output
    assert launched == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "train"),
        ("evalute", "evaluate"),
        ("zero-shot", "clip-zero-shot"),
        ("desribe", "describe"),
    ],
)
def test_unknown_command_is_wrong_usage_and_the_nearest_is_named(typed: str, meant: str) -> None:
    code, output = invoke(typed)
    assert code == 2
    assert f"no such command '{typed}'; did you mean" in output and meant in output


def test_unknown_command_of_a_mode_names_the_nearest() -> None:
    code, output = invoke("convert", "pth-to-fh")
    assert code == 2 and "did you mean pth_to_hf" in output


def test_underscores_of_the_originals_scripts_are_understood() -> None:
    code, output = invoke("compare_scores", "--help")
    assert code == 0 and "Compare models" in output


def test_the_chat_of_xtuner_can_be_reached(launched: list) -> None:
    assert invoke("xtuner-chat", "internlm", "--bits", "4")[0] == 7
    assert launched[0][0][1:] == [
        "-m", "xtuner_add.run_mode", "xtuner-chat", "internlm", "--bits", "4",
    ]  # fmt: skip
    assert MODES["xtuner-chat"].module == "xtuner.tools.chat"


def test_both_converters_say_how_they_differ() -> None:
    assert "`pth-to-hf`" in invoke("convert", "pth_to_hf", "--help")[1]
    assert "`convert pth_to_hf`" in invoke("pth-to-hf", "--help")[1]


@pytest.mark.parametrize("name", [*cli.COMMANDS, *MODES])
def test_help_has_an_example_whose_options_exist(name: str) -> None:
    code, output = invoke(*name.split(), "--help")
    assert code == 0
    found = re.search(rf"Examples?:\n((?:  +xtuner-add {name}\b.*\n?(?:    .*\n?)*)+)", output)
    assert found, output
    used = set(re.findall(r"(?<= )--?[a-z][\w-]*", found.group(1)))
    declared = set(re.findall(r"--?[a-z][\w-]*", output[: found.start()]))
    assert used <= declared


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_wrong_options_are_wrong_usage(name: str) -> None:
    code, output = invoke(name, "--no-such-option")
    assert code == EXIT_USAGE == 2 and "--no-such-option" in output


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - set(NO_ARGUMENTS)))
def test_missing_arguments_are_wrong_usage(name: str) -> None:
    code, output = invoke(name)
    assert code == EXIT_USAGE and "Missing" in output


def test_the_same_thing_is_the_same_option_everywhere() -> None:
    """Words that were once used for what another option already names."""
    commands = {name: cli.main.get_command(click.Context(cli.main), name) for name in cli.COMMANDS}
    used = {
        (flag, name)
        for name, command in commands.items()
        for parameter in command.params
        for flag in parameter.opts
    }
    for old in ("--tile-px", "--images", "--num-proc", "--packers", "--num-workers", "--out",
                "--cfg-option"):  # fmt: skip
        assert [name for flag, name in used if flag == old] == [], old


@pytest.mark.slow
def test_modes_run_for_real_and_wrong_options_are_seen(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "xtuner_add.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    formats = run("list-dataset-format")
    assert formats.returncode == 0, formats.stderr
    assert "llava" in formats.stdout.lower() or "alpaca" in formats.stdout.lower()

    (tmp_path / "any.py").write_text("model = None\n")
    wrong_option = run("train", "any.py", "--no-such-option")
    assert wrong_option.returncode == 2
    assert "usage: xtuner-add train" in wrong_option.stderr


def test_the_documents_hold_the_exit_codes() -> None:
    from pathcore import exit_codes

    table = (Path(__file__).parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    codes = {value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")}
    assert (
        codes
        == set(map(int, re.findall(r"^\| (\d) \|", table, flags=re.MULTILINE)))
        == {0, 1, 2, 3}
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_number_is_nan(name: str) -> None:
    """Every comparison with NaN is false: a limit of NaN would be no limit."""
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    for parameter in command.params:
        if "float" in parameter.type.name:
            for text in ("nan", "inf"):
                with pytest.raises(click.BadParameter, match=r"finite|range"):
                    parameter.type.convert(text, parameter, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "rows.json", "--slides", ".", "--output", "o", "--slide-mpp", "0"],
        ["conform", ".", "--slide-mpp", "-1"],
        ["clean-pairs", __file__, "o", "--max-area-px", "-1"],
        ["dataformat", __file__, "o", "--max-skipped", "2"],
        ["describe", __file__, "o", "--max-retries", "-1"],
        ["describe", __file__, "o", "--price-in", "-1"],
        ["answer", "m", "a.png", "-q", "?", "--batch-size", "0"],
        ["score", "b", "--judge-timeout", "0"],
        ["train-mil", ".", "--fold", "-1"],
        ["clip-zero-shot", "m", "--workers", "-1"],
    ],
    ids=" ".join,
)
def test_impossible_numbers_are_wrong_usage(arguments: list[str]) -> None:
    code, output = invoke(*arguments)
    assert code == EXIT_USAGE
    assert f"Invalid value for '{arguments[-2]}'" in output and "range" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["gdc-manifest", "read", "read", "--listing", "other"],
        ["gdc-manifest", "other", "read", "--listing", "read"],
        ["cite-texts", "read", "--classes", "read", "--model", "bert"],
        ["cite-features", "read", "read"],
        ["cite-convert", "read", "./read", "--from", "timm", "--to", "mm"],
        ["filter-captions", "read", "read"],
        ["summarise", "read", "read", "--endpoint", "http://localhost/v1", "--model", "m"],
    ],
    ids=" ".join,
)
def test_a_file_that_is_read_is_never_replaced(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    for name in ("read", "other"):
        Path(name).write_text("precious")
    code, output = invoke(*arguments)
    assert code == 1 and "would replace what is read" in output
    assert Path("read").read_text() == "precious"


_TILES = ". --output o --tile-encoder random --tile-arch resnet18"
_SURVIVAL = ". --output o --labels F --splits . --time days --event died"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("clean-pairs F o --classifier vit --label tumour", "--classifier is for the step"),
        ("clean-pairs F o --clip plip --min-score 0.2", "--clip is for the step clip-classes or"),
        ("clean-pairs F o --steps size --min-words 5", "--min-words is for the step words,"),
        ("filter-captions F o --steps exact --max-words 60", "--max-words is for the step length"),
        ("tokenise F o --config c --max-length 100", "sets these too: omit --max-length"),
        ("clip-retrieval m --output o --pairs F --data-path .", "--data-path is for --benchmark"),
        ("clip-retrieval m --output o --labels F --image-folder .", "--image-folder is for"),
        ("embed . --output o --coords . --mpp 1 --patch-px 9", "--mpp, --patch-px have no effect"),
        ("embed . --output o --coords . --masks .", "--masks has no effect with --coords"),
        ("embed . --output o --coords . --min-tissue 0.1", "--min-tissue has no effect with"),
        (f"embed {_TILES} --slide-encoder none --preset trident", "--preset has no effect without"),
        (f"embed {_TILES} --slide-encoder mean --grid-px 9", "--grid-px has no effect with"),
        (f"embed {_TILES} --slide-encoder mean --slide-arch x", "--slide-arch has no effect with"),
        ("encode-slides . --output o --slide-encoder max --preset trident", "--preset has no effe"),
        ("probe-tiles . --output o --encoder plip --embed-dim 9", "--embed-dim has no effect with"),
        ("train-mil . --output o --labels F --splits . --map-format png", "without --heat-maps"),
        (f"train-mil {_SURVIVAL} --label grade", "--label has no effect with --time"),
        ("train-mil . --output o --patho-bench F --label grade", "--label has no effect with"),
        ("finetune-slides . --output o --labels F --slide-embeddings .", "without --method knn"),
        ("finetune-slides . --output o --labels F --map-format png", "without --heat-maps"),
        ("tile . --output o --level0 --mpp 1", "--mpp has no effect with --level0"),
        ("tile . --output o --whole-slide --min-tissue 0.2", "--min-tissue has no effect with"),
        ("chat m --top-p 0.9 --seed 3", "--top-p, --seed have no effect without --temperature"),
        ("describe F o --local m --model n", "--model has no effect with --local"),
        ("revise F o --local m --structured", "--structured has no effect with --local"),
        (
            "revise F o --endpoint u --model m --device cpu",
            "--device has no effect with --endpoint",
        ),
    ],
)
def test_an_option_without_effect_is_wrong_usage(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("F").write_text('{"id": "1", "image": "a.png", "caption": "Glands."}\n')
    code, output = invoke(*arguments.split())
    assert code == EXIT_USAGE and message in " ".join(output.split())
    assert not Path("o").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "plan pallava_alignment",
        "copy-cfg pallava_alignment o",
        "tokenise F o --config pallava_alignment",
        "pth-to-hf pallava_alignment F o",
        "train pallava_alignment",
    ],
)
def test_a_config_that_is_not_found_is_wrong_usage(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("F").write_text("{}")
    code, output = invoke(*arguments.split())
    assert code == EXIT_USAGE and "did you mean pallava_" in " ".join(output.split())
    assert not Path("o").exists()
