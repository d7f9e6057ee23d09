from __future__ import annotations

from pathlib import Path

import pytest

from xtuner_add import paths


def test_own_configs_are_found_by_bare_name_with_and_without_suffix() -> None:
    expected = paths.configs_dir() / "pallava" / "pallava_domain_alignment_tiny.py"
    assert paths.find_config("pallava_domain_alignment_tiny") == expected
    assert paths.find_config("pallava_domain_alignment_tiny.py") == expected


def test_configs_of_xtuner_are_found_too() -> None:
    name = "internlm2_chat_7b_qlora_alpaca_e3"
    assert paths.find_config(name) == paths.xtuner_configs()[name]


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pallava_domain_alignment_tiny.py").write_text("model = None\n")
    found = paths.find_config("pallava_domain_alignment_tiny.py")
    assert found.resolve().parent == tmp_path.resolve()


def test_unknown_config_names_the_nearest() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'pallava_domain_aligment_tiny'.*did you mean"
    ) as e:
        paths.find_config("pallava_domain_aligment_tiny")
    assert "pallava_domain_alignment_tiny" in str(e.value)
    assert "list-cfg" in str(e.value)


def test_a_path_is_never_taken_for_a_name() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean pallava_domain_alignment_tiny"):
        paths.find_config("elsewhere/pallava_domain_alignment_tiny.py")


def test_installed_configs_go_before_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "xtuner_add"
    package.mkdir()
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    with pytest.raises(FileNotFoundError, match="reinstall xtuner-add"):
        paths.configs_dir()
    (tmp_path / "configs").mkdir()
    assert paths.configs_dir() == tmp_path / "configs"
    (package / "configs").mkdir()
    assert paths.configs_dir() == package / "configs"


def test_missing_xtuner_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="xtuner-add setup-host"):
        paths.xtuner_dir()
    with pytest.raises(FileNotFoundError, match="xtuner-add setup-host"):
        paths.find_config("llava_of_xtuner")
    # CITE's configs are found where only its extra is installed.
    assert paths.find_config("cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric_tiny").is_file()
