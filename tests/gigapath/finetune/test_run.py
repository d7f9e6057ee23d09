from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gigapath import slide_encoder
from gigapath.classification_head import ClassificationHead, get_model, parse_layers
from gigapath.embed.slide_vectors import write_slide_vector
from gigapath.finetune.bags import (
    Bag,
    SlideBags,
    SlideFolder,
    SlideScan,
    choose_tiles,
    stored_vectors,
)
from gigapath.finetune.recipes import read_settings
from gigapath.finetune.run import BagModel, finetune_slides
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.tasks import SlideTask
from gigapath.finetune.trainer import Trainer, learning_rate, parameter_groups, scale_and_decay
from pathcore.ranks import Ranks
from tests.gigapath import golden_recipe
from tests.gigapath.slide_cohort import (
    DIM,
    write_cohort,
    write_published_split,
    write_slide,
    write_table,
    write_task,
)
from wsi.store import write_features
from xtuner_add.paths import configs_dir

GOLDEN = Path(__file__).parents[2] / "golden/gigapath/finetune"
RECORDS = json.loads((GOLDEN / "finetune.json").read_text())
TENSORS = load_file(GOLDEN / "finetune.safetensors")
ARCH = "finetune_test_3l64d"
RECIPES = configs_dir() / "gigapath"
TINY = read_settings(FinetuneSettings, RECIPES / "panda_tiny.yml", others=("task",))


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the golden runs, registered as a user would."""
    monkeypatch.setattr(slide_encoder, "ARCHITECTURES", dict(slide_encoder.ARCHITECTURES))
    slide_encoder.register_architecture(
        ARCH,
        embed_dim=64,
        depth=3,
        num_heads=4,
        slide_ngrids=64,
        segment_lengths=(8, 16, 32, 64, 128),
    )


class TestPublishedProtocol:
    def test_rate_and_decay_of_every_parameter(self) -> None:
        with torch.device("meta"):
            encoder = slide_encoder.LongNetViT(
                1536, **slide_encoder.ARCHITECTURES["gigapath_slide_enc12l768d"]
            )
        model = torch.nn.Module()
        model.slide_encoder = encoder
        model.classifier = torch.nn.Sequential(torch.nn.Linear(768, 6))
        expected = RECORDS["param_groups_lrd_0.95_wd_0.05"]
        assert len(expected) == RECORDS["param_groups_count"] == 249
        found = scale_and_decay(
            model, 12, weight_decay=0.05, layer_decay=0.95, protocol="published"
        )
        assert set(found) == set(expected)
        for name, pair in expected.items():
            assert found[name] == pytest.approx(pair, abs=1e-12), name
        mended = scale_and_decay(model, 12, weight_decay=0.05, layer_decay=0.95)
        changed = {name for name in mended if mended[name] != found[name]}
        assert changed == {
            "slide_encoder.patch_embed.proj.weight",
            "slide_encoder.patch_embed.proj.bias",
        }
        assert {mended[name][0] for name in changed} == {0.95**13}
        groups = parameter_groups(model, mended)
        assert sum(len(group["params"]) for group in groups) == 249
        assert len(groups) == len(set(mended.values()))

    def test_learning_rate(self) -> None:
        record = RECORDS["lr_schedule_panda"]
        rates = [
            learning_rate(epoch + batch / record["n_batches"], lr=record["base_lr"], min_lr=1e-6,
                          warmup_epochs=1, epochs=5)
            for epoch in range(5) for batch in range(0, record["n_batches"], 32)
        ]  # fmt: skip
        assert len(rates) == record["n_points"] and rates[0] == 0
        assert sum(rates) == pytest.approx(record["sum_lr"])
        assert rates[:5] == pytest.approx([row[2] for row in record["first5"]])
        assert rates[-3:] == pytest.approx([row[2] for row in record["last3"]])

    def test_rates_of_a_training(self, tmp_path: Path) -> None:
        record = RECORDS["lr_schedule_small"]
        trainer = golden_trainer(
            "multiclass_cls_feat2", tmp_path, gc=4, lr=0.0, blr=0.004, epochs=4
        )
        rates = []
        for epoch in range(4):
            for step in trainer.plan(epoch):
                trainer._set_rate(epoch + step.first / 10)
                rates.append([epoch, step.first, trainer.rate])
        expected = [row[:3] for row in record["rows_epoch_batch_lr_lrscaled0.5"]]
        np.testing.assert_allclose(rates, expected, atol=1e-15)

    @pytest.mark.parametrize("name", RECORDS["replay"])
    def test_two_epochs(self, name: str, tmp_path: Path) -> None:
        record = RECORDS["replay"][name]
        trainer = golden_trainer(name, tmp_path)
        for number, epoch in enumerate(record["epochs"]):
            trainer.losses, trainer.epoch, trainer.step = [], number, 0
            losses = trainer.train_epoch()
            np.testing.assert_allclose(losses, epoch["per_batch_loss"], atol=1e-5)
            probabilities, loss = trainer.predict(trainer.parts["train"])
            expected = TENSORS[f"{name}.epoch{number}.prob"].numpy()
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)
            assert loss == pytest.approx(epoch["eval_loss"], abs=1e-5)
        parameters = dict(trainer.model.named_parameters())
        for key in [key for key in TENSORS if key.startswith(f"{name}.final.")]:
            parameter = parameters[key.removeprefix(f"{name}.final.")]
            torch.testing.assert_close(parameter.detach(), TENSORS[key], atol=1e-5, rtol=1e-4)
        for key, norm in record["leftover_grad_norm_after_last_epoch"].items():
            gradient = parameters[key].grad
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4)

    def test_left_over_gradients_make_a_step_of_their_own(self, tmp_path: Path) -> None:
        trainer = golden_trainer("multiclass_cls_feat2", tmp_path, protocol="corrected")
        steps: list[int] = []
        trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.step))
        trainer.train_epoch()
        assert steps == [0, 1, 2]
        assert all(parameter.grad is None for parameter in trainer.model.parameters())


def golden_trainer(name: str, folder: Path, **changes: Any) -> Trainer:
    record = RECORDS["replay"][name]
    config = record["config"]
    classes = config["n_classes"]
    several = config["setting"] == "multi_label"
    model = ClassificationHead(
        config["in"], config["dim"], config["feat_layer"], classes, ARCH, "",
        dropout=0.0, drop_path_rate=0.0, global_pool=config["global_pool"],
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(
                torch.from_numpy(golden_recipe.parameter(key, tuple(parameter.shape), "ft"))
            )
    labels = {}
    for number, length in enumerate(config["lens"]):
        write_features(
            folder / f"s{number}.h5",
            golden_recipe.tiles(f"ft{number}", length, config["in"]),
            golden_recipe.coords(
                f"ft{number}", length, ngrids=config["ngrids"], tile=config["tile"]
            ),
            encoder="golden",
        )
        row = TENSORS[f"{name}.epoch0.label"][number].numpy().astype(int)
        labels[f"s{number}"] = row if several else np.array(row.argmax())
    bags = SlideBags(SlideFolder(folder), list(labels), labels, tile_order="published")
    values = {"protocol": "published", "num_workers": 0, "lr": config["lr"], "gc": config["gc"]}
    values |= {"optim_wd": config["wd"], "epochs": config["epochs"], **changes}
    task = SlideTask("golden", config["setting"], tuple(f"c{k}" for k in range(classes)))
    orders = [epoch["order"] for epoch in record["epochs"]]
    return Trainer(model, task, FinetuneSettings(**values), {"train": bags}, folder / "out",
                   Ranks("cpu"), order=lambda epoch: orders[epoch % 2])  # fmt: skip


class TestHead:
    @pytest.mark.parametrize(
        ("layers", "width"), [("3", 64), ("1-3", 128), (2, 64), ((0, 1, 2), 192)]
    )
    def test_layers(self, layers: Any, width: int) -> None:
        head = get_model(
            input_dim=8, feat_layer=layers, n_classes=5, model_arch=ARCH, pretrained=""
        )
        assert tuple(head.classifier[0].weight.shape) == (5, width)
        head.eval()
        x, places = torch.randn(2, 7, 8), torch.randint(0, 5000, (2, 7, 2))
        every = head.slide_encoder(x, places, all_layer_embed=True)
        expected = head.classifier(torch.cat([every[i] for i in head.feat_layer], dim=-1))
        torch.testing.assert_close(head(x, places), expected)

    def test_padding_changes_nothing(self) -> None:
        head = ClassificationHead(8, feat_layer="3", model_arch=ARCH, pretrained="").eval()
        x, places = torch.randn(2, 30, 8), torch.randint(0, 5000, (2, 30, 2))
        both = head(x, places, lengths=[30, 11])
        torch.testing.assert_close(both[1:], head(x[1:, :11], places[1:, :11]))

    def test_frozen_encoder_neither_learns_nor_drops(self) -> None:
        head = ClassificationHead(8, feat_layer="3", model_arch=ARCH, pretrained="", freeze=True,
                                  dropout=0.5)  # fmt: skip
        assert [n for n, p in head.named_parameters() if p.requires_grad] == [
            "classifier.0.weight", "classifier.0.bias",
        ]  # fmt: skip
        x, places = torch.randn(1, 7, 8), torch.randint(0, 5000, (1, 7, 2))
        torch.testing.assert_close(head(x, places), head(x, places))
        head(x, places).sum().backward()

    @pytest.mark.parametrize("layers", ["13", "a", "", "5-", -1])
    def test_layers_that_are_not_there(self, layers: Any) -> None:
        with pytest.raises(ValueError, match="feat_layer"):
            parse_layers(layers, 12)


class TestTiles:
    def bag(self, count: int = 12) -> Bag:
        generator = np.random.default_rng(0)
        places = np.array([[x, y] for y in range(4) for x in range(3)])[generator.permutation(12)]
        return Bag("s", torch.arange(12.0)[:, None].repeat(1, 2), torch.from_numpy(places))

    def test_row_major(self) -> None:
        found = choose_tiles(self.bag(), 0, "row_major")
        assert found.coords.tolist() == [[x, y] for y in range(4) for x in range(3)]
        some = [
            choose_tiles(self.bag(), 5, "row_major", seed=seed).coords.tolist()
            for seed in (1, 1, 2)
        ]
        assert some[0] == some[1] != some[2] and len(some[0]) == 5
        assert some[0] == sorted(some[0], key=lambda place: (place[1], place[0]))

    def test_published(self) -> None:
        assert choose_tiles(self.bag(), 5, "published").features[:, 0].tolist() == [0, 1, 2, 3, 4]
        drawn = (
            choose_tiles(self.bag(), 0, "published", shuffle=True, seed=3).features[:, 0].tolist()
        )
        assert sorted(drawn) == list(range(12)) != drawn


def run(folder: Path, features: Path, table: Path, out: str, **changes: Any) -> dict[str, Any]:
    arguments = {
        n: changes.pop(n) for n in ("methods", "models", "splits", "vectors") if n in changes
    }
    task = changes.pop("task", None) or write_task(folder / "task.yml")
    settings = dataclasses.replace(TINY, **changes)
    return finetune_slides(features, table, task, folder / out, settings=settings, device="cpu",
                           progress=False, **arguments)  # fmt: skip


def test_learns_and_writes_everything(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 36)
    results = run(tmp_path, features, table, "out", methods=("slide_encoder", "knn"),
                  model_select="val", epochs=4, folds=3)  # fmt: skip
    assert results["num_slides"] == 36 and results["num_skipped"] == 0
    for method, found in results["methods"].items():
        assert [fold["fold"] for fold in found["folds"]] == [0, 1, 2]
        assert found["mean"]["auroc"]["mean"] > 0.9, method
    folder = tmp_path / "out/slide_encoder/fold_0"
    rows = list(csv.DictReader((folder / "predictions_test.csv").open()))
    test = list(csv.DictReader((tmp_path / "out/splits/test_0.csv").open()))
    assert [row["id"] for row in rows] == [row["slide_id"] for row in test]
    right = [row["true"] == row["predicted"] for row in rows]
    fold = results["methods"]["slide_encoder"]["folds"][0]
    assert fold["test"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    history = json.loads((folder / "history.json").read_text())
    best = max(history, key=lambda row: (row["auroc"], -row["val_loss"]))
    assert fold["epoch"] == best["epoch"]
    assert fold["val"]["loss"] == pytest.approx(best["val_loss"], abs=1e-6)
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    head = ClassificationHead(DIM, feat_layer="2", n_classes=3, pretrained="", **TINY.encoder)
    head.load_state_dict(load_file(folder / "model.safetensors"))
    table_text = (tmp_path / "out/results.md").read_text()
    assert "| slide_encoder | mean ± std |" in table_text and "| knn | 2 |" in table_text
    summary = list(csv.DictReader((tmp_path / "out/summary.csv").open()))
    assert len(summary) == 6 and float(summary[0]["test_accuracy"]) == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("protocol", "save_steps", "dies_at"), [("corrected", 2, 13), ("published", 0, 17)]
)
def test_a_killed_run_gives_what_an_unbroken_one_gives(
    protocol: str, save_steps: int, dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, table = write_cohort(tmp_path, 24)
    splits = write_published_split(tmp_path / "splits", table)
    changes = {"protocol": protocol, "splits": splits, "dropout": 0.3, "max_tiles": 12, "epochs": 3,
               "save_steps": save_steps}  # fmt: skip
    whole = run(tmp_path, features, table, "whole", **changes)
    real, calls = Trainer._accumulate, []

    def dies(self: Trainer, *arguments: Any) -> None:
        calls.append(self.epoch)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(Trainer, "_accumulate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, features, table, "broken", **changes)
    assert not (tmp_path / "broken/results.json").exists()
    leftover = tmp_path / "broken/slide_encoder/fold_0/.00000000.1.partial"
    leftover.touch()
    broken = run(tmp_path, features, table, "broken", **changes)
    assert len(calls) < 14 * 3 + 14  # 14 slides an epoch: not from the start
    assert broken["methods"] == whole["methods"] and not leftover.exists()
    files = [
        tmp_path / name / "slide_encoder/fold_0/model.safetensors" for name in ("whole", "broken")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = run(tmp_path, features, table, "broken", **changes)
    assert again["methods"] == whole["methods"]
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, features, table, "broken", **{**changes, "gc": 2})


def test_patience_ends_a_training(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 24)
    splits = write_published_split(tmp_path / "splits", table)
    results = run(tmp_path, features, table, "out", splits=splits, epochs=50, lr=1e-12, min_lr=0.0,
                  monitor="accuracy", patience=2, model_select="val")  # fmt: skip
    fold = results["methods"]["slide_encoder"]["folds"][0]
    history = json.loads((tmp_path / "out/slide_encoder/fold_0/history.json").read_text())
    assert fold["num_epochs"] == len(history) < 50
    assert history[-1]["epoch"] - fold["epoch"] == 2


def test_batches_do_not_change_what_is_learned(tmp_path: Path) -> None:
    """Four slides at once, or one after the other, make the same step."""
    features, table = write_cohort(tmp_path, 26)  # 16 train
    splits = write_published_split(tmp_path / "splits", table)
    for name, changes in {"one": {"gc": 4}, "four": {"gc": 1, "batch_size": 4}}.items():
        run(tmp_path, features, table, name, splits=splits, dropout=0.0, epochs=2, **changes)
    files = [tmp_path / name / "slide_encoder/fold_0/model.safetensors" for name in ("one", "four")]
    left, right = map(load_file, files)
    for key, value in left.items():
        if not key.endswith("k_proj.bias"):  # softmax takes no notice: its gradient is rounding
            torch.testing.assert_close(value, right[key], atol=2e-5, rtol=1e-3)


def test_several_labels_and_half_precision(tmp_path: Path) -> None:
    features, _ = write_cohort(tmp_path, 30)
    rows = [{"slide_id": f"S{n:03d}", "b": int(n % 3 == 1), "a": int(n % 3 == 0), "pat_id": n // 5}
            for n in range(30)]  # fmt: skip
    table = write_table(tmp_path / "several.csv", rows)
    task = SlideTask("several", "multi_label", ("a", "b"))
    splits = write_published_split(tmp_path / "splits", table)
    results = run(tmp_path, features, table, "out", task=task, splits=splits, precision="bf16",
                  methods=("slide_encoder", "logistic"))  # fmt: skip
    for method, found in results["methods"].items():
        assert found["mean"]["auroc"]["mean"] > 0.85, method
    rows = list(csv.DictReader((tmp_path / "out/logistic/fold_0/predictions_test.csv").open()))
    assert set(rows[0]) == {"id", "true_a", "true_b", "probability_a", "probability_b"}


def test_stored_slide_embeddings(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 30)
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    for number in range(1, 30):
        vector = torch.zeros(1, 5)
        vector[0, number % 3] = 1
        torch.save(vector, vectors / f"S{number:03d}.pt")
    results = run(tmp_path, features, table, "out", folds=3, methods=("knn",), vectors=vectors)
    assert results["methods"]["knn"]["mean"]["accuracy"]["mean"] == 1.0
    assert results["num_skipped"] == 1
    assert "S000" in (tmp_path / "out/skipped.jsonl").read_text()


def test_stored_slide_embeddings_of_another_encoder(tmp_path: Path) -> None:
    for slide, digest in {"a": "1", "b": "2", "c": "2"}.items():
        attributes = {"encoder": "gigapath", "weights_sha256": digest * 64}
        write_slide_vector(tmp_path / f"{slide}.h5", np.ones(5, np.float32), attributes)
    torch.save(torch.ones(5), tmp_path / "d.pt")
    vectors, skipped = stored_vectors(tmp_path, list("abcd"))
    assert list(vectors) == ["b", "c", "d"]
    assert skipped == [
        {
            "id": "a",
            "reason": "features of encoder gigapath 111111111111; most slides have gigapath "
            "222222222222's",
        }
    ]


def test_faults_are_recorded_and_the_rest_is_used(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 40)
    good = (features / "S002.h5").read_bytes()
    (features / "S000.h5").unlink()
    (features / "S001.h5").write_bytes(good[: len(good) // 2])
    places = np.zeros((3, 2), dtype=np.int64)
    for slide, values, coords in (
        ("S002", np.zeros((3, DIM + 1)), places),
        ("S003", np.full((3, DIM), np.nan), places),
        ("S004", np.zeros((0, DIM)), places[:0]),
        ("S005", np.zeros((3, DIM)), places - 500),
        ("S006", np.zeros((3, DIM)), places + 256 * 1000),
    ):
        write_features(features / f"{slide}.h5", values, coords, encoder="made-up")
    write_slide(features, "S007", 1, seed=0, tiles=1)  # one tile is enough
    write_slide(features, "unnamed", 1, seed=0)
    (features / "S008.h5").unlink()
    torch.save(torch.zeros(4, DIM), features / "S008.pt")
    (features / "S009.h5").write_bytes(b"")
    with table.open("a") as file:
        file.write("../../etc/passwd,1\nS040,9\nS041,\n")
    results = run(tmp_path, features, table, "out", folds=3, epochs=1)
    rows = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert results["num_skipped"] == len(reasons) == 12
    for slide, words in {
        "S000": "no S000.h5 or S000.pt", "S001": "S001.h5", "S002": "width 17",
        "S003": "NaN", "S004": "no tiles", "S005": "x=-500", "S006": "x=256000",
        "S008": "no coords", "S009": "S009.h5", "../../etc/passwd": "'/'",
        "S040": "label '9'", "S041": "label ''",
    }.items():  # fmt: skip
        assert words in reasons[slide], (slide, reasons[slide])
    assert results["num_slides"] == 31 and results["num_without_row"] == 1
    assert "12 slides or rows skipped" in (tmp_path / "out/results.md").read_text()
    # What is not needed is not asked for: the mean over tiles does without places.
    pooled = run(tmp_path, features, table, "pooled", folds=3, methods=("knn",))
    assert pooled["num_slides"] == 34


def test_places_on_the_grid(tmp_path: Path) -> None:
    """Tiles of 512 px at level 0, the first column over the slide's edge."""
    places = np.array([[x * 512 - 100, y * 512] for y in range(2) for x in range(3)])
    values = np.zeros((6, DIM))
    write_features(
        tmp_path / "s.h5", values, places, encoder="x", attributes={"patch_size_level0": 512}
    )
    write_features(tmp_path / "t.h5", values, places, encoder="x")
    shifted = SlideFolder(tmp_path, cell_px=256).read("s").coords
    assert shifted.tolist() == (places + np.array([100, 0])).tolist()
    own = SlideFolder(tmp_path, cell_px=0).read("s").coords // 256
    assert own.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert SlideFolder(tmp_path).read("s").coords.tolist() == places.tolist()
    with pytest.raises(ValueError, match="patch_size_level0"):
        SlideFolder(tmp_path, cell_px=0).read("t")


def test_a_second_look_reads_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, _ = write_cohort(tmp_path, 6)
    slides = [f"S{number:03d}" for number in range(6)]
    read = []
    real = SlideFolder.read
    monkeypatch.setattr(SlideFolder, "read", lambda self, s: (read.append(s), real(self, s))[1])

    def look(width: int = DIM) -> Any:
        scan = SlideScan(SlideFolder(features), slides, width, (256, 1000))
        return scan.run(tmp_path / "slides.json")

    first = look()
    assert read == slides and look() == first and read == slides
    write_slide(features, "S003", 0, seed=9, tiles=3)
    assert look()[0]["S003"] == 3 and read == [*slides, "S003"]
    assert not look(DIM + 1)[0]


def test_a_class_that_a_fold_lacks(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 24)
    splits = write_published_split(tmp_path / "splits", table)
    rows = [row for row in csv.DictReader((splits / "test_0.csv").open()) if row["label"] != "2"]
    write_table(splits / "test_0.csv", rows)
    train = [row for row in csv.DictReader((splits / "train_0.csv").open()) if row["label"] != "1"]
    write_table(splits / "train_0.csv", train)
    results = run(tmp_path, features, table, "out", splits=splits, epochs=1,
                  methods=("slide_encoder", "knn", "logistic"))  # fmt: skip
    for found in results["methods"].values():
        assert found["folds"][0]["test"]["undefined"] == ["2"]
        assert found["folds"][0]["test"]["auroc"]["value"] is not None
    assert "fold 0: 2" in (tmp_path / "out/results.md").read_text()
    assert results["untrained"] == {"0": ["1"]}
    assert "could not be learned: fold 0: 1." in (tmp_path / "out/results.md").read_text()


def test_what_cannot_be_run_is_said_before_slides_are_read(tmp_path: Path) -> None:
    features, table = write_cohort(tmp_path, 15)
    for changes, message in (
        ({"model_arch": "gigapath_slide_enc"}, "model_arch"),
        ({"feat_layer": "3"}, "feat_layer"),
        ({"monitor": "f1"}, "monitor"),
        ({"methods": ("forest",)}, "forest"),
        ({"pretrained": str(tmp_path / "absent.pth")}, "absent.pth"),
        ({"folds": 2}, "3 folds"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(tmp_path, features, table, "out", **changes)
    assert not (tmp_path / "out/slides.json").exists()
    with pytest.raises(ValueError, match="width 16; input_dim is 1536"):
        run(tmp_path, features, table, "out", folds=3, input_dim=1536)
    splits = write_published_split(tmp_path / "splits", table)
    (splits / "val_0.csv").unlink()
    with pytest.raises(ValueError, match="no slide of val"):
        run(tmp_path, features, table, "out", splits=splits, model_select="val")


@pytest.mark.parametrize(
    "values",
    [{"protocol": "new"}, {"gc": 0}, {"layer_decay": 0.0}, {"val_r": 0.9}, {"precision": "fp8"}],
)
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        FinetuneSettings(**values)


class TestRecipes:
    @pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yml")), ids=lambda path: path.stem)
    def test_every_recipe_is_read(self, path: Path) -> None:
        from gigapath.finetune.probe import ProbeSettings

        probe = path.stem.startswith("pcam")
        settings = read_settings(
            ProbeSettings if probe else FinetuneSettings, path, others=("task",)
        )
        if path.stem.endswith("_tiny"):
            assert (path.parent / f"{path.stem.removesuffix('_tiny')}.yml").is_file()
        elif not probe:
            assert settings.model_arch in slide_encoder.ARCHITECTURES
            parse_layers(settings.feat_layer, 12)

    def test_published_settings(self) -> None:
        panda = read_settings(FinetuneSettings, RECIPES / "panda.yml", others=("task",))
        for name, value in RECORDS["panda_script"].items():
            if name not in ("latent_dim", "fp16"):  # the encoder's own; bf16 here
                assert getattr(panda, name) == value, name
        assert panda.peak_lr == pytest.approx(RECORDS["lr_schedule_panda"]["base_lr"])
        defaults = RECORDS["params_defaults"]
        own = FinetuneSettings()
        for name in (
            "epochs",
            "gc",
            "blr",
            "optim_wd",
            "layer_decay",
            "dropout",
            "min_lr",
            "val_r",
        ):
            assert getattr(own, name) == defaults[name], name

    def test_published_segments(self) -> None:
        panda = read_settings(FinetuneSettings, RECIPES / "panda.yml", others=("task",))
        with torch.device("meta"):
            encoder = slide_encoder.LongNetViT(max_wsi_size=panda.max_wsi_size, depth=1)
        found = encoder.encoder.config.segment_lengths
        assert list(found) == RECORDS["panda_segment_length"]

    def test_bad_recipes(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yml"
        for text, message in {
            "epoch: 3": "did you mean epochs",
            "epochs: many": "epochs: expected int",
            "blr: fast": "blr: expected a number",
            "- a": "mapping",
            "_base_: recipe.yml": "inherits from itself",
            "encoder: [1]": "encoder: expected a mapping",
            "a: [": "cannot be read",
        }.items():
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                read_settings(FinetuneSettings, path)
        with pytest.raises(FileNotFoundError, match=r"absent\.yml"):
            read_settings(FinetuneSettings, tmp_path / "absent.yml")


def test_models_of_others_train_as_the_encoder_does(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def __init__(self, in_dim: int, num_classes: int) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(in_dim, num_classes)

        def forward(self, x: torch.Tensor, coords: torch.Tensor, lengths: Any) -> torch.Tensor:
            return torch.stack(
                [self.linear(bag[:n].mean(0)) for bag, n in zip(x, lengths, strict=True)]
            )

    features, table = write_cohort(tmp_path, 30)
    splits = write_published_split(tmp_path / "splits", table)
    model = BagModel(Mean, {"epochs": 8, "lr": 0.1, "gc": 2, "model_select": "val"})
    results = run(tmp_path, features, table, "out", splits=splits, methods=("mean",),
                  models={"mean": model}, weighted_sample=True)  # fmt: skip
    assert results["methods"]["mean"]["mean"]["auroc"]["mean"] > 0.9
