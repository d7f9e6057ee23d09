from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallava.converters.cleaning.keywords import KeywordRule, load_rule

PATHOLOGY = {
    "H&E-stained section of a breast core with invasive ductal carcinoma": True,
    "Histological image of skin with a lymphocytic infiltrate": True,
    "Axial CT scan of the abdomen with a hypodense lesion of the liver": False,
    "Chest X-ray and gland": False,
    "Biopsy taken at colonoscopy: photomicrograph of villous adenoma": True,
    "Kaplan-Meier curves of carcinoma patients": False,
    "A lovely sunset over a lake": False,
    "Direct section of nothing": False,
}
HUMAN = {
    "Photomicrograph of a colon adenoma": True,
    "Liver of a C57BL/6 mouse, H&E": False,
    "Mice were fed for three weeks": False,
    "Stained with mouse monoclonal antibody and goat anti-rabbit serum": True,
    "Kidney of a 34-year-old man who was bitten by a rat": True,
    "Histology of canine mast cell tumour": False,
    "Starry sky pattern and chicken-wire vessels": True,
    "Patient-derived xenograft in a mouse": False,
    "Rational concatenation of catalogues": True,
    "Lambda light chains by FISH; board-certified reading; monkeypox": True,
    "Leaf-like fronds of a phyllodes tumour, salmon-pink": True,
    "Kidney of a monkey, PAS": False,
}


@pytest.mark.parametrize(("name", "cases"), [("pathology", PATHOLOGY), ("human", HUMAN)])
def test_rules_of_ours(name: str, cases: dict[str, bool]) -> None:
    rule = load_rule(name)
    assert {text: rule.fault(text) is None for text in cases} == cases


@given(st.text(max_size=80), st.sampled_from(["mouse", "Mice", "H&E", "ct"]))
def test_case_and_blanks_do_not_count(text: str, word: str) -> None:
    rule = load_rule("human")
    words = f"{text} {word}".split()
    plain = rule.fault(" ".join(words))
    assert (rule.fault("\n\t".join(words)) is None) == (plain is None)
    ascii_text = " ".join(words).encode("ascii", "ignore").decode()
    assert (rule.fault(ascii_text.upper()) is None) == (rule.fault(ascii_text.lower()) is None)


def test_rules_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"keep": ["gleason *", "c++"]}))
    rule = load_rule(path)
    assert rule == KeywordRule(keep=("gleason *", "c++"))
    assert rule.fault("Gleason  pattern") is None and rule.fault("c++ code") is None
    assert rule.fault("glee") == "none of the words that are needed"
    for content, message in (
        ('{"want": []}', "lists decisive"), ('{"keep": [1]}', "list of words"),
        ("{", "no JSON"), ("{}", "every text passes"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_rule(path)
    with pytest.raises(FileNotFoundError, match="neither a file nor"):
        load_rule("animals")
