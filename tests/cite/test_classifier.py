"""Classifiers that only need torch: saving, loading, and errors for mismatches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cite
from cite.classifier import Classifier, LinearScores, load_classifier, open_image
from cite.encoders import build_encoder
from cite.preprocessing import Preprocessing
from cite.projection import Projection
from cite.prompted import PromptedEncoder
from cite.text_embeddings import TextEmbeddings
from cite.text_scores import TextScores
from pathcore.weights import CheckpointError
from tests.cite.goldens import GOLDEN, VIT

NORM = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


def make(head: str, precision: str = "fp32") -> Classifier:
    torch.manual_seed(0)
    encoder = build_encoder(VIT)
    backbone = PromptedEncoder(
        encoder, prompt_length=2, prompt_layers=[0, 1], prompt_init="normal", precision=precision
    )
    classes = ("well", "poor")
    if head == "linear":
        parts = None, LinearScores(64, 2)
    else:
        texts = TextEmbeddings(
            torch.randn(3, 16), torch.tensor([0, 1, 1]), classes, ("a", "b", "c")
        )
        parts = Projection(64, 16), TextScores(texts, temperature=1.0, several=head)
    preprocessing = Preprocessing(32, **NORM)
    return Classifier(backbone, *parts, preprocessing, classes, {"config": "x.py"}).eval()


def pictures(number: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        for _ in range(number)
    ]


@pytest.mark.parametrize("head", ["linear", "mean", "max"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_read_back(head: str, precision: str, tmp_path: Path) -> None:
    classifier = make(head, precision)
    expected = classifier.predict(pictures(), batch_size=2)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(3))
    classifier.save(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["classifier.json", "classifier.safetensors"]
    again = cite.load_classifier(tmp_path / "out")
    assert torch.equal(again.predict(pictures(), batch_size=2), expected)
    assert again.classes == ("well", "poor")
    assert again.provenance == {"config": "x.py"}


def test_every_kind_of_picture(tmp_path: Path) -> None:
    classifier, picture = make("mean"), pictures()[0]
    picture.save(tmp_path / "p.png")
    forms = [picture, np.asarray(picture), tmp_path / "p.png", str(tmp_path / "p.png")]
    rows = classifier.predict(forms)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    assert classifier.predict([]).shape == (0, 2)
    (tmp_path / "q.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"q\.png.*: not a readable image"):
        classifier.predict([tmp_path / "q.png"])


def test_preprocessing_is_the_recorded_one() -> None:
    found = Preprocessing(224, **NORM)(Image.open(GOLDEN / "pipeline_300x300.png"))
    with np.load(GOLDEN / "pipeline.npz") as golden:
        np.testing.assert_allclose(found[:, ::7, ::7], golden["img_0_7"], rtol=1e-4, atol=2e-5)
    white, clear = Image.new("RGB", (40, 40), "white"), Image.new("RGBA", (40, 40), (9, 9, 9, 0))
    assert torch.equal(Preprocessing(32, **NORM)(clear), Preprocessing(32, **NORM)(white))
    cut = Preprocessing(32, **NORM, keep_ratio=True)(pictures()[0])
    assert cut.shape == (3, 32, 32)
    with pytest.raises(ValueError, match="interpolation 'area'"):
        Preprocessing(32, **NORM, interpolation="area")
    with pytest.raises(ValueError, match="three numbers each"):
        Preprocessing(32, mean=(1.0,), std=(1.0,))  # type: ignore[arg-type]


def test_what_does_not_fit(tmp_path: Path) -> None:
    classifier = make("mean")
    with pytest.raises(ValueError, match="3 names of classes, but the head scores 2"):
        Classifier(classifier.backbone, None, classifier.head, classifier.preprocessing, "abc")
    with pytest.raises(FileNotFoundError, match=r"classifier\.json: no such file"):
        load_classifier(tmp_path)
    classifier.save(tmp_path)
    config = json.loads((tmp_path / "classifier.json").read_text())
    changed = config | {"encoder": config["encoder"] | {"patch_size": 4}}
    (tmp_path / "classifier.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"(?s)of another shape.*: backbone\.pos_embed"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(config | {"format": 9}))
    with pytest.raises(ValueError, match="expected format 2, found 9"):
        load_classifier(tmp_path)


def test_forms_of_images_that_are_refused(tmp_path: Path) -> None:
    for image in (torch.zeros(3, 8, 8), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(ValueError, match="uint8 pixels"):
            open_image(image)
    with pytest.raises(FileNotFoundError, match="no such image"):
        open_image(tmp_path / "absent.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png")).max() == 156
