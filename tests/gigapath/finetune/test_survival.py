"""Survival from a simulated cohort: hazards follow a planted feature, some slides are censored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from PIL import Image

from gigapath.finetune.metrics import score_predictions
from gigapath.finetune.mil import MODELS
from gigapath.finetune.run import finetune_slides
from gigapath.finetune.settings import FinetuneSettings
from gigapath.finetune.splits import make_splits
from gigapath.finetune.survival import cox_loss, kaplan_meier_figure
from gigapath.finetune.tasks import read_labels, read_task, survival_task
from pathcore import stats
from wsi.store import write_features
from xtuner_add.cli import main


def simulated(count: int, seed: int = 0, *, whole: bool = True) -> tuple[Any, Any]:
    """Covariates `(N, 2)` and labels with ties (whole months) and about a third censored."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 2))
    times = generator.exponential(12 * np.exp(-(1.2 * x[:, 0] - 0.5 * x[:, 1])))
    ends = generator.uniform(0, 40, count)
    observed = np.minimum(times, ends)
    labels = np.stack([np.ceil(observed) if whole else observed, times <= ends], axis=1)
    return x, labels


@pytest.mark.parametrize("whole", [True, False])
def test_the_loss_is_the_likelihood_of_lifelines(whole: bool) -> None:
    x, labels = simulated(120, whole=whole)
    assert (len(np.unique(labels[:, 0])) < 60) == whole  # ties, or none
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "time": labels[:, 0], "event": labels[:, 1]})
    fitted = CoxPHFitter().fit(table, "time", "event")
    coefficients = torch.tensor(fitted.params_.to_numpy(), requires_grad=True)
    # lifelines centres the covariates, which does not change the partial likelihood.
    loss = cox_loss((torch.from_numpy(x) @ coefficients)[:, None], torch.from_numpy(labels))
    num_events = labels[:, 1].sum()
    assert float(loss.detach()) * num_events == pytest.approx(-fitted.log_likelihood_, rel=1e-6)
    loss.backward()  # the maximum of lifelines is where our gradient vanishes
    assert coefficients.grad is not None
    assert float(coefficients.grad.abs().max()) < 1e-5


def test_loss_of_three_slides_by_hand() -> None:
    risks = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 1], [2, 0], [3, 1]], dtype=torch.float64)
    hazards = [np.exp(0.5), np.exp(-1.0), np.exp(2.0)]
    expected = -(np.log(hazards[0] / sum(hazards)) + np.log(1.0)) / 2
    assert cox_loss(risks, labels).item() == pytest.approx(expected)
    large = cox_loss(risks * 1000, labels)  # exp overflows unless a factor is taken out
    large.backward()
    assert torch.isfinite(large) and torch.isfinite(risks.grad).all()  # type: ignore[arg-type]
    censored = labels * torch.tensor([1.0, 0.0])
    assert cox_loss(risks, censored).item() == 0


@given(seed=st.integers(0, 9999), count=st.integers(1, 30), digits=st.integers(0, 3))
def test_concordance_is_that_of_lifelines(seed: int, count: int, digits: int) -> None:
    """Ties in time and risk, censoring, and draws with repetition."""
    generator = np.random.default_rng(seed)
    times = np.round(generator.random(count) * 5, digits)
    events, risks = generator.random(count) < 0.6, np.round(generator.random(count), digits)
    draws = generator.integers(0, count, (4, count))
    found = stats.concordance(times, events, risks, stats.count_draws(draws, count))
    for value, draw in zip(found, draws, strict=True):
        try:
            expected = concordance_index(times[draw], -risks[draw], events[draw])
        except ZeroDivisionError:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected)


def test_scores_of_risks() -> None:
    x, labels = simulated(150, 1)
    scores = score_predictions(labels, x[:, :1], ["risk"], setting="survival", num_resamples=300)
    entry = scores["c_index"]
    assert entry["value"] == concordance_index(labels[:, 0], -x[:, 0], labels[:, 1])
    assert entry["low"] < entry["value"] < entry["high"] and entry["value"] > 0.7
    assert scores["num_events"] == labels[:, 1].sum()
    none = labels * [1, 0]
    found = score_predictions(none, x[:, :1], ["risk"], setting="survival", num_resamples=20)
    assert found["c_index"] == {"value": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="expected \\(150, 2\\)"):
        score_predictions(labels[:, 0], x[:, :1], ["risk"], setting="survival")


def test_the_picture_has_the_curves_of_lifelines() -> None:
    x, labels = simulated(80, 2)
    figure = kaplan_meier_figure(labels, x[:, 0])
    (axes,) = figure.axes
    high = x[:, 0] > np.median(x[:, 0])
    own = KaplanMeierFitter().fit(labels[high, 0], labels[high, 1]).survival_function_
    drawn = next(line for line in axes.lines if str(line.get_label()).startswith("higher risk"))
    np.testing.assert_allclose(drawn.get_xdata(), own.index)
    np.testing.assert_allclose(drawn.get_ydata(), own.iloc[:, 0])
    p = logrank_test(labels[high, 0], labels[~high, 0], labels[high, 1], labels[~high, 1]).p_value
    assert axes.get_title() == f"log-rank test: p = {p:.2g}" and p < 0.01
    assert f"higher risk: 40 cases, {int(labels[high, 1].sum())} events" in drawn.get_label()
    same = kaplan_meier_figure(labels, np.zeros(80))
    assert same.axes[0].get_title() == "all risks are equal"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Ninety slides of 10 tiles, of which the hazard raises one feature in the first four."""
    x, labels = simulated(90, 3)
    generator = np.random.default_rng(0)
    coords = np.array([[256 * n, 0] for n in range(10)])
    rows = ["slide_id,case_id,OS_days,OS_event"]
    (tmp_path / "features").mkdir()
    for number, ((risk, _), (time, event)) in enumerate(zip(x, labels, strict=True)):
        features = generator.normal(0, 0.2, (10, 8)).astype(np.float32)
        features[:4, 0] += 2 * risk
        write_features(tmp_path / f"features/S{number}.h5", features, coords, encoder="made-up")
        status = ("0:LIVING", "1:DECEASED")[int(event)] if number % 2 else f"{event:g}"
        rows.append(f"S{number},P{number},{time * 30:g},{status}")
    rows[5] = "S4,P4,,1"  # no time
    rows[6] = "S5,P5,30,lost"
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "task.yml").write_text(
        "name: OS\nsetting: survival\ntime_column: OS_days\nevent_column: OS_event\n"
    )
    order = [f"S{number}" for number in range(90) if number not in (4, 5)]
    (tmp_path / "splits").mkdir()
    parts = {"train": order[:50], "val": order[50:62], "test": order[62:]}
    for part, slides in parts.items():
        (tmp_path / f"splits/{part}_0.csv").write_text("\n".join(["slide_id", *slides]))
    return tmp_path


SMALL = {"input_dim": 0, "num_workers": 0, "num_resamples": 100}


def test_bag_models_and_cox_rank_slides_by_risk(cohort: Path) -> None:
    methods = ("abmil", "clam-mb", "cox")
    quick = {"epochs": 12, "lr": 1e-2}
    x, labels = simulated(90, 3)
    known = concordance_index(labels[64:, 0], -x[64:, 0], labels[64:, 1])
    models = {
        name: type(model)(
            model.build, {**model.settings, **quick}, {**model.options, "embed_dim": 16},
            {**model.survival_settings, "batch_size": 16},
        )
        for name, model in MODELS.items()
    }  # fmt: skip
    results = finetune_slides(
        cohort / "features", cohort / "labels.csv", cohort / "task.yml", cohort / "out",
        splits=cohort / "splits", settings=FinetuneSettings(**SMALL), methods=methods,
        models=models, device="cpu", progress=False,
    )  # fmt: skip
    reasons = [json.loads(line) for line in (cohort / "out/skipped.jsonl").open()]
    found = {row["id"]: row["reason"] for row in reasons}
    assert "OS_days ''" in found["S4"] and "OS_event 'lost'" in found["S5"]
    for method in methods:
        folder = cohort / f"out/{method}/fold_0"
        (scores,) = results["methods"][method]["folds"]
        rows = list(csv.DictReader((folder / "predictions_test.csv").open()))
        assert len(rows) == 26 and set(rows[0]) == {"id", "time", "event", "risk"}
        times, events, risks = (
            np.array([float(row[name]) for row in rows]) for name in ("time", "event", "risk")
        )
        value = scores["test"]["c_index"]["value"]
        assert value == pytest.approx(concordance_index(times, -risks, events), abs=1e-6)
        assert value > known - 0.06 > 0.6, method
        assert Image.open(folder / "kaplan_meier.png").size == (672, 504)
    history = json.loads((cohort / "out/abmil/fold_0/history.json").read_text())
    assert {"c_index", "val_loss"} <= set(history[0])
    chosen = max(history, key=lambda row: (row["c_index"], -row["val_loss"]))
    assert results["methods"]["abmil"]["folds"][0]["epoch"] == chosen["epoch"]
    assert "| method | fold | cases | c_index |" in (cohort / "out/results.md").read_text()


def test_folds_have_events_equally_often(cohort: Path) -> None:
    labelled = read_labels(cohort / "labels.csv", read_task(cohort / "task.yml"))
    share = np.mean([labelled.labels[slide][1] for slide in labelled.labels])
    for split in make_splits(labelled, folds=3).values():
        own = np.mean([labelled.labels[slide][1] for slide in split.test])
        assert abs(own - share) < 0.05


def test_a_batch_of_one_slide_has_no_likelihood(cohort: Path) -> None:
    with pytest.raises(ValueError, match="slide_encoder: batch_size 1: expected 2 or more"):
        finetune_slides(
            cohort / "features", cohort / "labels.csv", cohort / "task.yml", cohort / "out",
            settings=FinetuneSettings(pretrained=""), device="cpu",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"method 'knn'.*known: .*cox"):
        finetune_slides(
            cohort / "features", cohort / "labels.csv", survival_task("OS", "OS_days", "OS_event"),
            cohort / "out", methods=("knn",),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setting: survival\ntime_column: t\n", "expected time_column and event_column"),
        ("setting: binary\nlabel_dict: {a: 0, b: 1}\ntime_column: t\n", "only with setting surv"),
    ],
)
def test_bad_tasks(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "task.yml")


def test_command(cohort: Path) -> None:
    def run(*more: str) -> Any:
        return CliRunner().invoke(
            main,
            ["train-mil", str(cohort / "features"), "--labels", str(cohort / "labels.csv"),
             "--splits", str(cohort / "splits"), "--output", str(cohort / "out"), "--model", "mean",
             "--epochs", "1", "--device", "cpu", "--embed-dim", "8", *more,
             "--option", "num_workers=0", "--option", "num_resamples=20"],
        )  # fmt: skip

    assert "give both or neither" in run("--time", "OS_days").output
    found = run("--time", "OS_days", "--event", "OS_event")
    assert found.exit_code == 3, found.output
    assert "c_index" in found.output
    config = json.loads((cohort / "out/mean/fold_0_seed_0/config.json").read_text())
    assert config["settings"]["batch_size"] == 32 and config["settings"]["bag_size"] == 8192
