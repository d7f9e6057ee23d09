from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pallava.converters.cleaning.run import clean
from pallava.converters.cleaning.scores import (
    ClipScorer,
    HFClassifier,
    load_clip_classes,
)
from pallava.converters.cleaning.steps import (
    Candidate,
    classifier_step,
    clip_classes_step,
    clip_score_step,
)
from pathcore.encoders import Encoder, Network, Transform, create_encoder
from tests.pallava.converters.published import CAPTION, read_lines, save_image, write_lines
from tests.pallava.converters.tiny_scorers import save_classifier, save_hf_clip, save_open_clip

IMAGES = [Image.new("RGB", (20, 30), colour) for colour in ("pink", "blue", "black")]
TEXTS = ["a gland", "a graph", "a nerve"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    name, weights = save_open_clip(folder / "open_clip")
    return {
        "open_clip": name,
        "weights": str(weights),
        "hf": str(save_hf_clip(folder / "hf")),
        "classifier": str(save_classifier(folder / "classifier")),
    }


def test_hf_clip_is_what_the_model_computes(models: dict[str, str]) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    scorer = ClipScorer(create_encoder(f"hf:{models['hf']}", device="cpu"))
    model = CLIPModel.from_pretrained(models["hf"]).eval()
    inputs = AutoTokenizer.from_pretrained(models["hf"])(
        TEXTS, return_tensors="pt", return_token_type_ids=False
    )
    pixels = CLIPImageProcessor.from_pretrained(models["hf"])(IMAGES, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs, **pixels).logits_per_image
    expected = logits.softmax(-1)
    found = torch.tensor(scorer.class_probabilities(IMAGES, TEXTS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    cosines = torch.tensor(scorer.similarities(IMAGES, TEXTS))
    scale = float(model.logit_scale.exp())
    torch.testing.assert_close(cosines, logits.diagonal() / scale, atol=1e-5, rtol=1e-4)


def test_open_clip_is_what_the_model_computes(models: dict[str, str]) -> None:
    import open_clip

    scorer = ClipScorer(
        create_encoder(f"open_clip:{models['open_clip']}@{models['weights']}", device="cpu")
    )
    model, _, preprocess = open_clip.create_model_and_transforms(
        models["open_clip"], pretrained=models["weights"]
    )
    model.eval()
    pixels = torch.stack([preprocess(image) for image in IMAGES])
    with torch.inference_mode():
        image, text, scale = model(pixels, open_clip.get_tokenizer(models["open_clip"])(TEXTS))
        expected = (scale * image @ text.T).softmax(-1)
    found = torch.tensor(scorer.class_probabilities(IMAGES, TEXTS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="it would be random"):
        create_encoder(f"open_clip:{models['open_clip']}")


def test_classifier(models: dict[str, str]) -> None:
    classifier = HFClassifier(models["classifier"], device="cpu")
    rows = torch.tensor(classifier.probabilities(IMAGES))
    assert rows.shape == (3, 3)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3))
    assert classifier.indices(["chart", "pathology"]) == [2, 0]
    with pytest.raises(ValueError, match="labels histology asked for, it has pathology"):
        classifier_step(classifier, ["histology"])


def test_steps_keep_what_scores_high_enough(tmp_path: Path, models: dict[str, str]) -> None:
    rows = []
    for number, colour in enumerate(["pink", "blue", "black", "white"]):
        save_image(tmp_path / f"{number}.png", (20, 30), colour)
        rows.append({"id": str(number), "image": f"{number}.png", "caption": CAPTION})
    (tmp_path / "3.png").write_bytes(b"no image")
    classifier = HFClassifier(models["classifier"], device="cpu", batch_size=2)
    scores = [row[0] for row in classifier.probabilities(IMAGES)]
    threshold = sorted(scores)[1]
    candidates = [Candidate(row, (tmp_path / row["image"],)) for row in rows]
    verdicts = classifier_step(classifier, ["pathology"], threshold - 1e-6)(candidates)
    assert [verdict is None for verdict in verdicts] == [s >= threshold for s in scores] + [False]
    assert verdicts[3] is not None and verdicts[3].unusable
    pairs = write_lines(tmp_path / "pairs.jsonl", rows[:3])
    scorer = ClipScorer(create_encoder(f"hf:{models['hf']}", device="cpu"))
    steps = [clip_score_step(scorer, -1.0), clip_classes_step(scorer, TEXTS[:1], TEXTS[1:], 1.1)]
    report = clean(pairs, tmp_path / "out", steps)
    assert report is not None
    assert [step["dropped"] for step in report["steps"]] == [0, 3]
    assert "below 1.1" in read_lines(tmp_path / "out" / "dropped.jsonl")[0]["reason"]


def test_scores_that_are_no_numbers_keep_nothing(tmp_path: Path) -> None:
    network = Network(
        torch.nn.Identity(),
        lambda pixels: torch.full((len(pixels), 4), float("nan")),
        Transform(8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3),
        4,
        texts=lambda texts, device: torch.ones(len(texts), 4),
    )
    encoder = Encoder(
        "broken", network, feature="projected", patch_px=None, mpp=(), precision="float32",
        device=torch.device("cpu"),
    )  # fmt: skip
    broken = ClipScorer(encoder)
    candidate = Candidate({"id": 1, "caption": "x"}, (save_image(tmp_path / "a.png"),))
    (verdict,) = clip_score_step(broken, -1.0)([candidate])
    assert verdict is not None and "nan" in verdict.reason


def test_descriptions(tmp_path: Path) -> None:
    keep, drop = load_clip_classes()
    assert keep and drop and not set(keep) & set(drop)
    (tmp_path / "own.json").write_text('{"keep": ["a"]}')
    with pytest.raises(ValueError, match="keep and drop"):
        load_clip_classes(tmp_path / "own.json")
