from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from gigapath.finetune.attention_maps import attention_grid, ranks
from gigapath.finetune.metrics import score_predictions
from gigapath.finetune.mil import (
    ABMIL,
    ACMIL,
    CLAM,
    DSMIL,
    MIL_SETTINGS,
    MODELS,
    BagModel,
    BagOutput,
    MaxPool,
    MeanPool,
    MILModel,
    NystromAttention,
    PyramidPositions,
    TransMIL,
    pseudo_inverse,
)
from gigapath.finetune.run import finetune_slides
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.splits import read_splits
from gigapath.finetune.tasks import SlideTask, read_labels, survival_task, task_of_table
from gigapath.finetune.trainer import Trainer
from gigapath.published.embedding_zip import class_names
from tests.wsi.qupath import read_valid
from wsi.store import read_features, write_features
from xtuner_add.cli import main

SIZE: dict[str, Any] = {"embed_dim": 16, "hidden_dim": 8}
SMALL = {**MIL_SETTINGS, "epochs": 6, "lr": 0.01, "input_dim": 0}
SMALL |= {"num_workers": 0, "num_resamples": 50}
MARKED = 3  # patches of a positive slide that say so


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Twenty-four slides of 12 patches; the first three patches of a positive one differ."""
    generator = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    (tmp_path / "splits").mkdir()
    coords = np.array([[x * 512, y * 512] for y in range(3) for x in range(4)])
    rows = ["case_id,slide_id,label"]
    for number in range(24):
        positive = number % 2
        features = generator.normal(0, 0.3, (12, 8)).astype(np.float32)
        features[:MARKED, 0] += 3 * positive
        path = tmp_path / f"features/S.{number}.h5"
        attributes = {"patch_size_level0": 512}
        write_features(path, features, coords, encoder="made-up", attributes=attributes)
        rows.append(f"P{number},S.{number},{'tumour' if positive else 'normal'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    for fold in (0, 1):
        order = [(number + 4 * fold) % 24 for number in range(24)]
        parts = [order[:14], order[14:18], order[18:]]
        lines = [",train,val,test"]
        for row in range(14):
            cells = [f"S.{p[row]}" if row < len(p) else "" for p in parts]
            lines.append(f"{row},{','.join(cells)}")
        (tmp_path / f"splits/splits_{fold}.csv").write_text("\n".join(lines))
    return tmp_path


def train(
    folder: Path, out: str, model: str = "abmil", *, seeds: tuple[int, ...] = (0,), **changes: Any
) -> dict[str, Any]:
    names = ("only_folds", "heat_maps", "map_formats")
    arguments = {name: changes.pop(name) for name in names if name in changes}
    results = finetune_slides(
        folder / "features",
        folder / "labels.csv",
        task_of_table(folder / "labels.csv"),
        folder / out,
        splits=folder / "splits",
        settings=FinetuneSettings(**{**SMALL, **changes}),
        methods=(model,),
        models={model: BagModel(MODELS[model].build, options=options_of(model))},
        seeds=seeds,
        device="cpu",
        progress=False,
        **arguments,
    )
    return results["methods"][model]  # type: ignore[no-any-return]


def options_of(model: str) -> dict[str, Any]:
    known = MODELS[model]
    return {**known.options, **{n: v for n, v in SIZE.items() if known.takes(n)}}


@pytest.mark.parametrize("model", ["abmil", "acmil", "clam-sb", "clam-mb", "dsmil", "transmil"])
def test_learns_which_slides_and_which_patches(model: str, slides: Path) -> None:
    folds = (0, 1) if model == "abmil" else (0,)
    metrics = train(
        slides, "out", model, seeds=(2,), epochs=12, lr=0.02, heat_maps=True, only_folds=folds
    )
    assert [run["fold"] for run in metrics["folds"]] == [*folds]
    assert metrics["mean"]["auroc"]["mean"] == 1.0
    folder = slides / f"out/{model}/fold_0_seed_2"
    rows = list(csv.DictReader((folder / "predictions_test.csv").open()))
    assert len(rows) == 6 and all(row["true"] == row["predicted"] for row in rows)
    built = MODELS[model].build(8, 2, **options_of(model)).eval()
    built.load_state_dict(load_file(folder / "model.safetensors"))
    positive = next(row["id"] for row in rows if row["true"] == "tumour")
    features, _ = read_features(slides / f"features/{positive}.h5")
    attention = built.heat(built(torch.from_numpy(features)))
    assert set(attention.topk(MARKED).indices.tolist()) == set(range(MARKED))
    image = np.array(Image.open(folder / f"attention/{positive}.png"))
    assert image.shape == (24, 32, 4) and (image[..., 3] == 255).all()
    bright = image[..., :3].astype(int).sum(-1)
    assert bright[:8, : 8 * MARKED].min() > bright[:, 8 * MARKED :].max()
    name = f"{model} | mean ± std |  | " if len(folds) > 1 else f"{model} | 0 | 2 | 6"
    assert f"| {name} | 1.000" in (slides / "out/results.md").read_text()


def test_a_killed_run_gives_what_an_unbroken_one_gives(
    slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"only_folds": (0,), "seeds": (3,), "bag_size": 8}
    whole = train(slides, "whole", "acmil", **settings)
    real, calls = Trainer.train_epoch, []

    def dies(self: Trainer) -> list[float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "train_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        train(slides, "broken", "acmil", **settings)
    assert not (slides / "broken/results.json").exists()
    broken = train(slides, "broken", "acmil", **settings)
    assert len(calls) == 7
    assert broken["folds"] == whole["folds"]
    left, right = (load_file(slides / f"{n}/acmil/fold_0_seed_3/model.safetensors")
                   for n in ("whole", "broken"))  # fmt: skip
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(ValueError, match="other settings"):
        train(slides, "broken", "acmil", **{**settings, "bag_size": 0})
    monkeypatch.setitem(SIZE, "embed_dim", 12)
    with pytest.raises(ValueError, match="other model"):
        train(slides, "broken", "acmil", **settings)


def test_other_labels_or_features_are_another_run(slides: Path) -> None:
    settings: dict[str, Any] = {"only_folds": (0,), "epochs": 1}
    train(slides, "out", **settings)
    table = slides / "labels.csv"
    first = table.read_text()
    table.write_text(first.replace("S.0,normal", "S.0,tumour"))
    with pytest.raises(ValueError, match="run with other labels; name a new output folder"):
        train(slides, "out", **settings)
    table.write_text(first)
    train(slides, "out", **settings)
    features, coords = read_features(slides / "features/S.1.h5")
    attributes = {"patch_size_level0": 512}
    write_features(slides / "features/S.1.h5", features + 1, coords, encoder="made-up",
                   attributes=attributes)  # fmt: skip
    with pytest.raises(ValueError, match="run with other feature files; name a new"):
        train(slides, "out", **settings)


def test_command_lists_slides_without_features(slides: Path) -> None:
    (slides / "features/S.0.h5").unlink()
    features, coords = read_features(slides / "features/S.1.h5")
    write_features(slides / "features/S.1.h5", features * np.nan, coords, encoder="x")
    found = CliRunner().invoke(
        main,
        ["train-mil", str(slides / "features"), "--labels", str(slides / "labels.csv"), "--splits",
         str(slides / "splits"), "--output", str(slides / "out"), "--epochs", "1", "--fold", "1",
         "--embed-dim", "8", "--hidden-dim", "4", "--seed", "0", "--seed", "1", "--device", "cpu",
         "--option", "num_workers=0", "--option", "num_resamples=20"],
    )  # fmt: skip
    assert found.exit_code == 3, found.output
    assert "2 slides were skipped" in found.output and "| 1 | 1 |" in found.output
    rows = [json.loads(line) for line in (slides / "out/skipped.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert "no S.0.h5" in reasons["S.0"] and "NaN" in reasons["S.1"]


def test_slides_and_patients_in_two_parts_are_refused(slides: Path) -> None:
    table, folder = slides / "labels.csv", slides / "own"
    task = task_of_table(table)
    labels = read_labels(table, task)
    assert task.classes == ("normal", "tumour")
    assert list(read_splits(slides / "splits", labels)[0]) == [0, 1]
    folder.mkdir()
    split = folder / "splits_0.csv"
    split.write_text("train,val,test\nS.0,S.1,S.0\n")
    with pytest.raises(ValueError, match=r"slide S\.0 in train and test"):
        read_splits(folder, labels)
    table.write_text(table.read_text().replace("P2,", "P0,"))
    split.write_text("train,val,test\nS.0,S.1,S.2\n")
    with pytest.raises(ValueError, match="patient P0 in train and test"):
        read_splits(folder, read_labels(table, task))
    split.write_text("train,val,test\nS.0,S.1,S.99\n")
    with pytest.raises(ValueError, match=r"1 slides without label, first S\.99"):
        read_splits(folder, labels)
    table.write_text("slide_id,label\na,0\na,1\n")
    with pytest.raises(ValueError, match="slide a has two labels, 0 and 1"):
        read_labels(table, task_of_table(table))
    table.write_text("slide_id,grade\na,0\n")
    with pytest.raises(ValueError, match=r"no columns \['label'\]"):
        task_of_table(table)
    with pytest.raises(ValueError, match="two classes"):
        task_of_table(table, "grade")


def test_numbered_classes_are_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("slide_id,label\na,10\nb,2\nc,0\n")
    assert task_of_table(tmp_path / "l.csv").classes == ("0", "2", "10")
    (tmp_path / "l.csv").write_text("slide_id,label\na,1.0\nb,-1\nc,10\nd,2.5\ne,other\nf,9\n")
    expected = ("-1", "1", "2.5", "9", "10", "other")
    assert task_of_table(tmp_path / "l.csv").classes == class_names(expected[::-1]) == expected
    assert class_names(("nan", "10", "9")) == ("9", "10", "nan")


def test_a_fold_without_anything_to_learn_is_refused(slides: Path) -> None:
    table = (slides / "labels.csv").read_text()
    lines = (slides / "splits/splits_0.csv").read_text().splitlines()
    trained = [line.split(",")[1] for line in lines[1:]]
    rows = [row.split(",") for row in table.splitlines()[1:]]
    for patient, slide, _ in rows:
        label = "normal" if slide in trained else "tumour"
        table = table.replace(f"{patient},{slide},normal", f"{patient},{slide},{label}")
        table = table.replace(f"{patient},{slide},tumour", f"{patient},{slide},{label}")
    (slides / "labels.csv").write_text(table)
    with pytest.raises(ValueError, match="fold 0: all 14 usable slides of train are normal"):
        train(slides, "out")
    times = [
        f"{slide},{number},{int(slide not in trained)}" for number, (_, slide, _) in enumerate(rows)
    ]
    (slides / "labels.csv").write_text("\n".join(["slide_id,days,dead", *times]))
    with pytest.raises(ValueError, match="fold 0: none of 14 slides of train has an event"):
        finetune_slides(
            slides / "features", slides / "labels.csv", survival_task("os", "days", "dead"),
            slides / "survival", splits=slides / "splits", methods=("abmil",),
            settings=FinetuneSettings(**SMALL), device="cpu", progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "NA", "<NA>"])
def test_a_missing_label_is_no_class(tmp_path: Path, missing: str) -> None:
    (tmp_path / "l.csv").write_text(f"slide_id,label\na,tumor\nb,{missing}\nc,normal\n")
    with pytest.raises(ValueError, match="neither empty cells nor nan or NA"):
        task_of_table(tmp_path / "l.csv")


def test_named_classes_are_in_alphabetical_order(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("slide_id,label\na,tumor\nb,normal\n")
    assert task_of_table(tmp_path / "l.csv").classes == ("normal", "tumor")


def test_gated_attention_is_the_published_formula() -> None:
    torch.manual_seed(0)
    model, features = ABMIL(6, 3, embed_dim=5, hidden_dim=4).eval(), torch.randn(7, 6)
    h = torch.relu(features @ model.project[0].weight.T + model.project[0].bias)
    parts = model.attention
    scores = torch.stack([
        parts.weight.weight[0] @ (torch.tanh(parts.value.weight @ x + parts.value.bias)
                                  * torch.sigmoid(parts.gate.weight @ x + parts.gate.bias))
        for x in h
    ])  # fmt: skip
    a = torch.exp(scores) / torch.exp(scores).sum()
    output = model(features)
    torch.testing.assert_close(output.attention[0], a)
    z = sum(a[k] * h[k] for k in range(7))
    torch.testing.assert_close(output.logits, model.classifier(z))


def test_acmil_masks_in_training_only_and_punishes_branches_that_agree() -> None:
    torch.manual_seed(0)
    model = ACMIL(6, 2, embed_dim=5, hidden_dim=4, num_branches=3, num_masked=5)
    features = torch.randn(20, 6)
    trained = model(features).attention
    assert ((trained == 0).sum(dim=1) == 3).all()  # 0.6 of 5
    plain = model.eval()(features)
    assert (plain.attention > 0).all()
    top = plain.attention.topk(5, dim=-1).indices
    assert all(set(row.nonzero()[:, 0].tolist()) <= set(best.tolist())
               for row, best in zip(trained == 0, top, strict=True))  # fmt: skip
    torch.testing.assert_close(plain.attention.sum(1), torch.ones(3))
    assert torch.isfinite(model.train()(features[:1]).logits).all()

    label, logits = torch.tensor(1), torch.zeros(3, 2)
    apart, same = torch.eye(3, 20), torch.eye(1, 20).expand(3, 20)
    losses = [
        model.loss([BagOutput(logits[0], a, logits)] * 2, label.expand(2)) for a in (apart, same)
    ]
    expected = 2 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(torch.stack(losses), torch.stack([expected, expected + 1]))


@pytest.mark.parametrize("build", [ABMIL, ACMIL, CLAM, DSMIL, MeanPool, MaxPool])
@given(seed=st.integers(0, 99), num_patches=st.integers(1, 30))
def test_order_of_patches_does_not_matter(build: Any, seed: int, num_patches: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = {"hidden_dim": 3} if BagModel(build).takes("hidden_dim") else {}
    model = build(4, 2, embed_dim=6, **width).eval()
    features = torch.randn(num_patches, 4, generator=generator)
    order = torch.randperm(num_patches, generator=generator)
    left, right = model(features), model(features[order])
    torch.testing.assert_close(left.logits, right.logits, atol=1e-5, rtol=1e-4)
    if model.has_attention:
        torch.testing.assert_close(left.attention[:, order], right.attention, atol=1e-5, rtol=1e-4)


def projected(model: Any, features: torch.Tensor) -> torch.Tensor:
    return torch.relu(features @ model.project[0].weight.T + model.project[0].bias)


@pytest.mark.parametrize("build", [MeanPool, MaxPool])
def test_pooling_is_over_each_dimension_of_the_embeddings(build: Any) -> None:
    torch.manual_seed(0)
    model, features = build(6, 3, embed_dim=5).eval(), torch.randn(7, 6)
    rows = projected(model, features).tolist()
    pool = max if build is MaxPool else (lambda column: sum(column) / 7)
    z = torch.tensor([pool(column) for column in zip(*rows, strict=True)])
    output = model(features)
    torch.testing.assert_close(output.logits, model.classifier(z))
    assert output.attention is None
    with pytest.raises(ValueError, match="no attention"):
        model.heat(output)


@pytest.mark.parametrize("several", [False, True])
def test_clam_pools_by_attention_per_class(several: bool) -> None:
    torch.manual_seed(0)
    model = CLAM(6, 3, embed_dim=5, hidden_dim=4, multi_branch=several).eval()
    features = torch.randn(7, 6)
    h, parts = projected(model, features), model.attention
    scores = (torch.tanh(h @ parts.value.weight.T + parts.value.bias)
              * torch.sigmoid(h @ parts.gate.weight.T + parts.gate.bias))  # fmt: skip
    output = model(features)
    for k in range(3):
        branch = k if several else 0
        a = torch.exp(scores @ parts.weight.weight[branch] + parts.weight.bias[branch])
        a = a / a.sum()
        torch.testing.assert_close(output.attention[branch], a)
        slide = sum(a[i] * h[i] for i in range(7))
        logit = model.classifier.weight[k] @ slide + model.classifier.bias[k]
        torch.testing.assert_close(output.logits[k], logit)
        tiles = h @ model.instances[k].weight.T + model.instances[k].bias
        torch.testing.assert_close(output.instance_logits[k], tiles)
    drawn = output.attention[int(output.logits.argmax()) if several else 0]
    assert torch.equal(model.heat(output), drawn)


def smooth_svm(scores: torch.Tensor, true: int) -> float:
    """Equation of the paper for two classes, margin and temperature 1."""
    other = 1 - true
    return float(torch.log(1 + torch.exp(1 + scores[other] - scores[true])))


@pytest.mark.parametrize("several", [False, True])
def test_clam_clusters_the_tiles_at_both_ends_of_the_attention(several: bool) -> None:
    torch.manual_seed(1)
    model = CLAM(6, 3, multi_branch=several, num_instances=2, bag_weight=0.6)
    attention = torch.rand(3 if several else 1, 9)
    instance_logits, logits = torch.randn(3, 9, 2), torch.randn(3)
    output = BagOutput(logits, attention, instance_logits=instance_logits)
    per_class = []
    for k in range(3):
        order = attention[k if several else 0].argsort(descending=True).tolist()
        targets = {order[0]: int(k == 1), order[1]: int(k == 1)}
        if k == 1:
            targets |= {order[-1]: 0, order[-2]: 0}
        found = [smooth_svm(instance_logits[k, i], true) for i, true in targets.items()]
        per_class.append(sum(found) / len(found))
    bag = float(-logits.log_softmax(0)[1])
    expected = 0.6 * bag + 0.4 * sum(per_class) / 3
    assert float(model.loss([output], torch.tensor([1]))) == pytest.approx(expected, rel=1e-5)
    labels = torch.tensor([[0, 1, 0]])  # the same slide in a multi-label task
    bag = float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[0].float()))
    expected = 0.6 * bag + 0.4 * sum(per_class) / 3
    assert float(model.loss([output], labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_tiles", [1, 2, 3])
def test_clam_never_uses_a_tile_for_and_against_its_class(num_tiles: int) -> None:
    model = CLAM(4, 2, embed_dim=6, hidden_dim=3, num_instances=8)
    output = model(torch.randn(num_tiles, 4))
    assert output.instance_logits is not None
    output.instance_logits.retain_grad()
    loss = model.loss([output], torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss)
    used = output.instance_logits.grad[1].abs().sum(-1) > 0  # type: ignore[index]
    assert int(used.sum()) == num_tiles


def test_dsmil_attends_from_the_critical_tile_of_each_class() -> None:
    torch.manual_seed(0)
    model, features = DSMIL(6, 3, embed_dim=5, hidden_dim=4).eval(), torch.randn(7, 6)
    h = projected(model, features)
    instance = torch.stack([model.instance_classifier(x) for x in h])
    q, v = torch.stack([model.query(x) for x in h]), torch.stack([model.value(x) for x in h])
    output = model(features)
    pooled = []
    for k in range(3):
        m = max(range(7), key=lambda i: instance[i, k].item())
        weights = torch.stack([torch.exp(q[i] @ q[m] / 2) for i in range(7)])  # 2 = sqrt(4)
        weights = weights / weights.sum()
        torch.testing.assert_close(output.attention[k], weights)
        pooled.append(sum(weights[i] * v[i] for i in range(7)))
        assert float(output.branch_logits[0, k].detach()) == pytest.approx(float(instance[m, k]))
    bag = model.classifier(torch.cat(pooled))
    torch.testing.assert_close(output.branch_logits[1], bag)
    torch.testing.assert_close(output.logits, (output.branch_logits[0] + bag) / 2)
    label = torch.tensor([2])
    both = [torch.nn.functional.cross_entropy(x[None], label) for x in output.branch_logits]
    torch.testing.assert_close(model.loss([output], label), (both[0] + both[1]) / 2)


def test_nystrom_attention_with_a_landmark_per_token_is_softmax_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then `softmax A^+ softmax` is the softmax itself, if the inverse is."""
    monkeypatch.setattr("gigapath.finetune.mil.pseudo_inverse", torch.linalg.pinv)
    torch.manual_seed(0)
    layer, tokens = NystromAttention(8, num_heads=2, num_landmarks=64).double(), torch.randn(11, 8)
    tokens = tokens.double() * 3
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # keeps the test in double precision
    found, row = layer(tokens)
    q, k, v = (tokens @ layer.qkv.weight.T).split(8, dim=1)
    heads, rows = [], []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        weights = (q[:, own] @ k[:, own].T / 2).softmax(-1)
        kernel = layer.convolution.weight[head, 0, :, 0]
        padded = torch.cat([torch.zeros(16, 4), v[:, own], torch.zeros(16, 4)])
        near = torch.stack([(kernel[:, None] * padded[i : i + 33]).sum(0) for i in range(11)])
        heads.append(weights @ v[:, own] + near)
        rows.append(weights[0])
    torch.testing.assert_close(found, layer.out(torch.cat(heads, dim=1)), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(row, (rows[0] + rows[1]) / 2, atol=1e-8, rtol=1e-6)


def test_landmarks_are_means_of_segments() -> None:
    layer = NystromAttention(4, num_heads=2, num_landmarks=3)
    values = torch.randn(2, 12, 2)
    expected = values.reshape(2, 3, 4, 2).mean(dim=2)
    torch.testing.assert_close(layer._landmarks(values), expected)
    assert layer._landmarks(torch.randn(2, 7, 2)).shape == (2, 3, 2)
    with pytest.raises(ValueError, match="multiple of 8 heads"):
        NystromAttention(12)


def test_the_iteration_approaches_the_inverse() -> None:
    matrix = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0)).softmax(-1)
    exact = torch.linalg.pinv(matrix.double()).float()
    found = [pseudo_inverse(matrix, steps) for steps in (3, 6, 20)]
    errors = [float((matrix @ (z - exact) @ matrix).abs().max()) for z in found]
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.05 and errors[2] < 1e-4
    alone = pseudo_inverse(matrix[1])  # each head by its own norms
    torch.testing.assert_close(found[1][1], alone)


def test_pyramid_positions_are_sums_of_convolutions_over_the_square() -> None:
    torch.manual_seed(0)
    layer, tokens = PyramidPositions(2), torch.randn(9, 2)
    found = layer(tokens).reshape(3, 3, 2)
    for row in range(3):
        for column in range(3):
            expected = tokens.reshape(3, 3, 2)[row, column].clone()
            for convolve, half in zip(layer.convolutions, (3, 2, 1), strict=True):
                expected += convolve.bias
                for i in range(3):
                    for j in range(3):
                        if max(abs(i - row), abs(j - column)) <= half:
                            weight = convolve.weight[:, 0, i - row + half, j - column + half]
                            expected += weight * tokens.reshape(3, 3, 2)[i, j]
            torch.testing.assert_close(found[row, column], expected)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 5, 9, 40])
def test_transmil_fills_the_square_with_the_first_tiles(num_tiles: int) -> None:
    torch.manual_seed(0)
    model = TransMIL(6, 3, embed_dim=16, num_landmarks=4).eval()
    features = torch.randn(num_tiles, 6)
    output = model(features)
    side = 1
    while side * side < num_tiles:
        side += 1
    filled = torch.cat([features, features])[: side * side] if num_tiles > 1 else features
    other = model(filled)
    torch.testing.assert_close(output.logits, other.logits)
    assert output.attention.shape == (1, num_tiles) and (output.attention >= 0).all()
    assert float(output.attention.sum()) == pytest.approx(1, abs=1e-5)
    folded = other.attention[0, :num_tiles].clone()
    folded[: side * side - num_tiles] += other.attention[0, num_tiles:]
    torch.testing.assert_close(output.attention[0], folded)


def test_transmil_is_its_blocks_in_the_order_of_the_paper() -> None:
    torch.manual_seed(0)
    model, features = TransMIL(6, 3, embed_dim=16, num_landmarks=4).eval(), torch.randn(16, 6)
    norm = torch.nn.functional.layer_norm
    x = torch.cat([model.class_token, projected(model, features)])
    for block in range(2):
        weights = model.norms[block]
        x = x + model.attentions[block](norm(x, (16,), weights.weight, weights.bias))[0]
        if block == 0:
            x = torch.cat([x[:1], model.positions(x[1:])])
    last = norm(x[0], (16,), model.norm.weight, model.norm.bias)
    expected = last @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(features).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_bag_model_gives_each_parameter_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name].build(8, 3, **options_of(name))
    assert isinstance(model, MILModel)
    labels = torch.tensor([0, 1, 2])  # CLAM's classifier of tiles of a class learns from its slides
    loss = model.loss([model(torch.randn(n, 8)) for n in (5, 30, 40)], labels)
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # A bias before the softmax over tiles shifts all scores alike.
    assert silent == [] or set(silent) == {"attention.weight.bias"}, silent


def test_scores_of_slides() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet([1, 1, 1], 60)
    probabilities[np.arange(60), true] += 0.8
    scores = score_predictions(true, probabilities / probabilities.sum(1, keepdims=True), "abc")
    for name in ("auroc", "macro_f1", "balanced_accuracy", "accuracy"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
    single = score_predictions(np.zeros(4, dtype=int), np.full((4, 2), 0.5), "ab")
    assert single["auroc"] == {"value": None, "low": None, "high": None}
    assert single["accuracy"]["value"] == 1.0


def test_slides_of_another_encoder_are_skipped(slides: Path) -> None:
    """Same width, other encoder: nothing but the files' attribute tells them apart."""
    features, coords = read_features(slides / "features/S.0.h5")
    write_features(slides / "features/S.0.h5", features, coords, encoder="uni")
    train(slides, "out", only_folds=(0,), epochs=1)
    rows = [json.loads(line) for line in (slides / "out/skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["S.0"] and "encoder uni" in rows[0]["reason"]
    assert json.loads((slides / "out/results.json").read_text())["encoder"] == "made-up"
    assert "Tile encoder of the features: made-up" in (slides / "out/results.md").read_text()
    for path in (slides / "features").iterdir():  # the same run over features made anew
        features, coords = read_features(path)
        write_features(path, features, coords, encoder="uni")
    with pytest.raises(ValueError, match="other encoder"):
        train(slides, "out", only_folds=(0,), epochs=1)


def test_heat_maps_for_other_software(slides: Path) -> None:
    """QuPath gets the attention itself, where the tiles are; more formats come by running again."""
    options: dict[str, Any] = dict(only_folds=(0,), epochs=1, heat_maps=True)
    train(slides, "out", **options)
    folder = slides / "out/abmil/fold_0_seed_0/attention"
    assert {path.suffix for path in folder.iterdir()} == {".png"}
    train(slides, "out", **options, map_formats=("png", "geojson", "ome-tiff"))
    slide = next(folder.glob("*.geojson")).stem
    _, coords = read_features(slides / f"features/{slide}.h5")
    squares = read_valid(folder / f"{slide}.geojson")
    corners = [square["geometry"]["coordinates"][0][0] for square in squares]
    assert corners == coords.tolist()
    found = [square["properties"]["measurements"] for square in squares]
    assert sum(row["attention"] for row in found) == pytest.approx(1, abs=1e-4)
    assert max(row["attention rank"] for row in found) == 1
    image = tifffile.imread(folder / f"{slide}.ome.tif")
    for (x, y), row in zip(coords, found, strict=True):
        assert image[0, y * 8 // 512, x * 8 // 512] == np.float32(row["attention"])


def test_heat_maps_need_attention(slides: Path) -> None:
    with pytest.raises(ValueError, match="knn has attention"):
        finetune_slides(
            slides / "features",
            slides / "labels.csv",
            SlideTask("t", "binary", ("normal", "tumour")),
            slides / "out",
            methods=("knn",),
            heat_maps=True,
        )


def test_bags_of_several_labels(slides: Path) -> None:
    """Every bag model trains on a multi-label task, where a slide has one 0/1 label per class."""
    rows = (slides / "labels.csv").read_text().splitlines()[1:]
    table = [f"{row.split(',')[1]},{int('tum' in row)},{int('nor' in row)}" for row in rows]
    (slides / "both.csv").write_text("\n".join(["slide_id,tumour,normal", *table]))
    results = finetune_slides(
        slides / "features",
        slides / "both.csv",
        SlideTask("both", "multi_label", ("tumour", "normal")),
        slides / "out",
        splits=slides / "splits",
        settings=FinetuneSettings(**SMALL),
        methods=("acmil",),
        models={"acmil": BagModel(ACMIL, options=SIZE)},
        only_folds=(0,),
        device="cpu",
        progress=False,
    )
    assert results["methods"]["acmil"]["mean"]["auroc"]["mean"] == 1.0


def test_overlapping_patches_are_averaged() -> None:
    values, covered = attention_grid(np.array([[0, 0], [50, 0]]), np.array([0.0, 1.0]), 100)
    assert values.shape == (8, 12) and covered.all()
    assert values[0].tolist() == [0] * 4 + [0.5] * 4 + [1] * 4
    assert ranks(np.array([0.2, 0.9, 0.2])).tolist() == [0.25, 1.0, 0.25]


def test_a_huge_slide_is_drawn_small() -> None:
    coords = np.array([[0, 0], [512 * 4000, 512]])
    values, covered = attention_grid(coords, np.array([0.0, 1.0]), 512)
    assert max(values.shape) <= 4096 and covered.sum() >= 2
