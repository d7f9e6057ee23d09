"""Files of text embeddings are complete and checked against the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cite.text_embeddings import (
    TextEmbeddings,
    read_text_embeddings,
    texts_by_class,
    write_text_embeddings,
)

CLASSES = ("well differentiated", "poorly differentiated")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.safetensors"
    torch.manual_seed(0)
    write_text_embeddings(
        path,
        TextEmbeddings(
            torch.randn(3, 8), torch.tensor([0, 1, 1]), CLASSES, ("a", "b", "c"), {"type": "bert"}
        ),
    )
    return path


def test_read_back(file: Path) -> None:
    content = read_text_embeddings(file, classes=CLASSES, width=8)
    torch.manual_seed(0)
    assert torch.equal(content.embeddings, torch.randn(3, 8))
    assert content.class_ids.tolist() == [0, 1, 1]
    assert (content.classes, content.texts) == (CLASSES, ("a", "b", "c"))
    assert content.encoder == {"type": "bert"}
    assert [path.name for path in file.parent.iterdir()] == ["texts.safetensors"]


def test_disagreements_name_file_and_both_numbers(file: Path) -> None:
    with pytest.raises(ValueError, match=r"texts\.safetensors: embeddings of width 8, .* have 16"):
        read_text_embeddings(file, width=16)
    with pytest.raises(ValueError, match=r"texts\.safetensors: has 2 classes, the model has 3"):
        read_text_embeddings(file, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"names and order must agree"):
        read_text_embeddings(file, classes=CLASSES[::-1])


def test_other_and_damaged_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="xtuner-add cite-texts"):
        read_text_embeddings(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file(load_file(file), other)
    with pytest.raises(ValueError, match=r"other\.safetensors: not a file of"):
        read_text_embeddings(other)
    damaged = bytearray(file.read_bytes())
    damaged[-30] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        read_text_embeddings(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a file of"):
        read_text_embeddings(file)


def test_parts_that_do_not_belong_together() -> None:
    ones = torch.ones(2, 4)
    with pytest.raises(ValueError, match="3 class numbers and 2 texts"):
        TextEmbeddings(ones, torch.tensor([0, 1, 1]), ("a", "b"), ("x", "y"))
    with pytest.raises(ValueError, match=r"texts of classes \[0\], but there are 2 classes"):
        TextEmbeddings(ones, torch.tensor([0, 0]), ("a", "b"), ("x", "y"))
    with pytest.raises(ValueError, match="not finite"):
        TextEmbeddings(ones / 0, torch.tensor([0, 1]), ("a", "b"), ("x", "y"))


@given(
    st.dictionaries(
        st.text(min_size=1), st.lists(st.text("ab", min_size=1), min_size=1), min_size=1, max_size=5
    ),
    st.lists(st.sampled_from(["{}", "an image of {}.", "{} tissue"]), min_size=1, max_size=3),
)
def test_every_description_in_every_template(
    descriptions: dict[str, list[str]], templates: list[str]
) -> None:
    texts, class_ids = texts_by_class(descriptions, templates)
    assert len(texts) == sum(map(len, descriptions.values())) * len(templates)
    assert class_ids == sorted(class_ids)
    for index, given_texts in enumerate(descriptions.values()):
        own = {text for text, number in zip(texts, class_ids, strict=True) if number == index}
        assert own == {template.format(text) for template in templates for text in given_texts}


def test_templates_and_descriptions_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="template 'image'"):
        texts_by_class({"a": "b"}, ["image"])
    for wrong in ([], 3, None, {"text": "b"}, ["b", 2]):
        with pytest.raises(ValueError, match=r"class 'a': expected a description .*, found"):
            texts_by_class({"a": wrong})  # type: ignore[dict-item]
    assert texts_by_class({"a": "{x}"}, ["{y} {}", "{{}}"])[0] == ["{y} {x}", "{{x}}"]
