from __future__ import annotations

from pathcore.names import did_you_mean


def test_the_most_similar_name_comes_first() -> None:
    assert did_you_mean("uni2h", ["virchow", "uni", "uni2-h"]) == "; did you mean uni2-h or uni?"


def test_names_are_suggested_in_their_own_spelling() -> None:
    assert did_you_mean("vit-b-32", ["ViT_B-32"]) == "; did you mean ViT_B-32?"


def test_a_part_of_a_name_suggests_it() -> None:
    assert did_you_mean("shot", ["train", "clip-zero-shot"]) == "; did you mean clip-zero-shot?"


def test_without_a_similar_name_few_names_are_listed_and_many_are_not() -> None:
    assert did_you_mean("x", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", map(str, range(100))) == ""
    assert did_you_mean("zzz", []) == ""
