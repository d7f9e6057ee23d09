from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from xtuner_add import cli
from xtuner_add.commands.configs import inherited_files
from xtuner_add.paths import configs_dir, own_configs


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, list(arguments))
    return result.exit_code, result.output


def test_listing_shows_our_configs_and_those_of_xtuner() -> None:
    code, output = invoke("list-cfg")
    assert code == 0
    assert "  pallava_domain_alignment\n" in output
    assert "  internlm2_chat_7b_qlora_alpaca_e3\n" in output
    code, output = invoke("list-cfg", "-p", "PALLAVA_domain")
    assert output == (
        "xtuner-add: 2 configs\n  pallava_domain_alignment\n  pallava_domain_alignment_tiny\n"
        "XTuner: 0 configs\n"
    )


def test_bases_are_found_through_several_files() -> None:
    config = own_configs()["pallava_instruction_tuning_tiny"]
    base = configs_dir() / "pallava" / "_base_"
    assert inherited_files(config) == [base / "tiny.py", base / "pallava_llama3_8b.py"]


def test_bases_are_found_in_configs_of_the_other_style(tmp_path: Path) -> None:
    name = "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric"
    folder = configs_dir() / "cite" / "gastric"
    bases = [folder / "_base_" / f"{n}.py" for n in ("runtime", "gastric", "schedule_1k")]
    assert inherited_files(own_configs()[f"{name}-4"]) == [folder / f"{name}.py", *bases]
    code, output = invoke("copy-cfg", f"{name}-4", str(tmp_path))
    assert code == 0, output
    from mmengine.config import Config

    copy = Config.fromfile(tmp_path / f"{name}-4_copy.py")
    assert copy.to_dict() == Config.fromfile(folder / f"{name}-4.py").to_dict()


def test_copy_can_be_read_and_files_that_are_there_are_kept(tmp_path: Path) -> None:
    from pallava.engine.runtime import prepare_host

    prepare_host()
    from mmengine.config import Config

    name = "pallava_instruction_tuning_tiny"
    code, output = invoke("copy-cfg", name, str(tmp_path / "mine"))
    assert code == 0, output
    copy = tmp_path / "mine" / f"{name}_copy.py"
    copied, original = (Config.fromfile(file) for file in (copy, own_configs()[name]))
    assert copied.pretty_text == original.pretty_text

    copy.write_text("mine = 1\n")
    code, output = invoke("copy-cfg", name, str(tmp_path / "mine"))
    assert code == 0
    assert f"Kept {copy}" in output
    assert copy.read_text() == "mine = 1\n"


@pytest.mark.parametrize("name", ["pallava_domain_aligment", "nothing_of_the_kind"])
def test_unknown_name_copies_nothing(name: str, tmp_path: Path) -> None:
    code, output = invoke("copy-cfg", name, str(tmp_path / "mine"))
    assert code == 2
    assert name in output
    assert not (tmp_path / "mine").exists()


def test_copy_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, output = invoke("copy-cfg", "pallava_domain_alignment", str(tmp_path / "file" / "mine"))
    assert code == 1 and "file" in output.splitlines()[-1]
    (tmp_path / "own.py").write_text("model = dict(\n")
    code, output = invoke("copy-cfg", str(tmp_path / "own.py"), str(tmp_path / "mine"))
    assert code == 1 and "own.py" in output.splitlines()[-1]
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(\n", "line 1: cannot be read: SyntaxError"),
        ("model = dict(type=Foo)\n", "cannot be read: NameError: name 'Foo'"),
        ("_base_ = 'absent.py'\n", "cannot be read: FileNotFoundError"),
        ("work_dir = 'x'\n", "expected "),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["plan", "CONFIG"],
        ["pth-to-hf", "CONFIG", "OTHER", "OUT"],
        ["tokenise", "OTHER", "OUT", "--config", "CONFIG"],
        ["cite-features", "CONFIG", "OUT"],
        ["cite-export", "CONFIG", "OTHER", "OUT"],
        ["cite-sweep", "a=CONFIG", "--train-file", "OTHER", "--work-dir", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_a_config_that_cannot_be_used_is_named_in_one_line(
    words: list[str], text: str, message: str, tmp_path: Path
) -> None:
    config, other = tmp_path / "mine.py", tmp_path / "other"
    config.write_text(text)
    other.write_text("")
    places = {"CONFIG": str(config), "OTHER": str(other), "OUT": str(tmp_path / "out.safetensors")}
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    code, output = invoke(*words)
    assert code == 2, output
    assert "mine.py" in output and message in output
