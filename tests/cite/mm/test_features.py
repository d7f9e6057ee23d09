"""Features computed once: extraction, resumption, training and testing from the file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from cite.features import FeatureWriter, read_features
from cite.mm.feature_extraction import build_classifier, build_dataset, extract_features
from cite.mm.features import CachedFeatureDataset, PrecomputedFeatures
from tests.cite.goldens import CLIP, CLIP_WEIGHTS, GOLDEN
from tests.cite.mm.gastric import make_gastric
from tests.pathgen.tiny_encoders import save_open_clip
from xtuner_add.cli import main


def make_config(data: Path, scope: str = "mmcls") -> dict[str, Any]:
    pipeline = [dict(type="LoadPatch"), dict(type="ResizePatch", size=32), dict(type="PackPatch")]

    def loader(ann_file: str, **dataset: Any) -> dict[str, Any]:
        return dict(
            batch_size=4,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(
                type="PatchGastric",
                data_root=str(data),
                data_prefix="patches_captions",
                ann_file=f"gastric_cls3_ann/{ann_file}",
                pipeline=pipeline,
                **dataset,
            ),
        )

    return dict(
        custom_imports=dict(imports=["cite.mm"], allow_failed_imports=False),
        default_scope=scope,
        model=dict(
            type="ImageClassifier",
            data_preprocessor=dict(mean=[127.0] * 3, std=[64.0] * 3, to_rgb=False),
            backbone=dict(type="PromptedEncoder", encoder=CLIP, checkpoint=str(CLIP_WEIGHTS)),
            head=dict(type="LinearClsHead", num_classes=3, in_channels=48),
        ),
        train_dataloader=loader("train_all_0.2.txt"),
        test_dataloader=loader("val_0.8.txt", test_mode=True),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gastric(tmp_path_factory.mktemp("gastric"), patches=2)


@pytest.fixture(params=["mmcls", "mmpretrain"])
def config(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Path:
    pytest.importorskip(request.param)
    path = tmp_path / "config.py"
    Config(make_config(data, request.param)).dump(path)
    return path


def test_features_are_those_of_the_encoder(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.safetensors"
    assert extract_features(config, out, batch_size=5, progress=False) == []
    found = read_features(out)
    cfg = Config.fromfile(config)
    dataset, model = build_dataset(cfg, "train"), build_classifier(cfg, None)
    assert len(found.names) == len(dataset) == len(found.features)
    assert found.labels.tolist() == dataset.get_gt_labels()
    item = dataset[3]
    batch = model.data_preprocessor({k: [v] for k, v in item.items()}, False)
    torch.testing.assert_close(found.features[3:4], model.backbone(batch["inputs"])[0])
    assert found.header["backbone"]["type"] == "PromptedEncoder"


def test_training_and_testing_from_the_file(config: Path, data: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        extract_features(config, tmp_path / f"{split}.safetensors", split=split, progress=False)
    cfg = Config.fromfile(config)
    scope = cfg.default_scope

    def cached(split: str, ann_file: str, **dataset: Any) -> dict[str, Any]:
        return dict(
            batch_size=6,
            num_workers=0,
            # MMEngine sleeps for two seconds where a sampler ends.
            sampler=dict(type="InfiniteSampler" if split == "train" else "DefaultSampler"),
            dataset=dict(
                type="CachedFeatureDataset",
                feature_file=str(tmp_path / f"{split}.safetensors"),
                data_root=str(data),
                ann_file=f"gastric_cls3_ann/{ann_file}" if ann_file else "",
                **dataset,
            ),
        )

    cfg.model.backbone = dict(type="PrecomputedFeatures", embed_dim=48)
    cfg.model.data_preprocessor = dict(type="FeatureDataPreprocessor")
    cfg.merge_from_dict(
        dict(
            work_dir=str(tmp_path / "work"),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5)),
            train_cfg=dict(by_epoch=False, max_iters=60),
            test_cfg=dict(),
            test_evaluator=dict(type="SlideMetric"),
        )
    )
    cfg.train_dataloader = cached("train", "train_2_0.2.txt")
    cfg.test_dataloader = cached("test", "", test_mode=True)
    cfg.test_dataloader.sampler.shuffle = False
    cfg.experiment_name = f"{scope}_cached"
    hooks = ("PortableCheckpointHook", "FeaturesAgreeHook")
    cfg.custom_hooks = [dict(type=name) for name in hooks]
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.test()["accuracy"] > 90
    (checkpoint,) = (tmp_path / "work").glob("*.pth")
    other = tmp_path / "other.safetensors"
    options = {"model.backbone.checkpoint": None}  # as wide, but random
    extract_features(config, other, split="test", progress=False, cfg_options=options)
    for name, fits in ((f"{tmp_path}/test.safetensors", True), (str(other), False)):
        cfg.merge_from_dict({"test_dataloader.dataset.feature_file": name})
        cfg.merge_from_dict({"load_from": str(checkpoint), "experiment_name": Path(name).stem})
        runner = Runner.from_cfg(cfg)
        if fits:
            assert runner.test()["accuracy"] > 90
        else:
            with pytest.raises(ValueError, match=r"features of PromptedEncoder \w+, but the class"):
                runner.test()
    init_default_scope("mmengine")


def test_features_say_whose_they_are(data: Path, tmp_path: Path) -> None:
    """The same weights elsewhere are the same encoder; others of the same name are not."""
    found = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_open_clip(tmp_path / place / "clip", seed=seed)
        name = f"open_clip:local-dir:{tmp_path}/{place}/clip"
        settings = make_config(data)
        settings["model"]["backbone"] = dict(type="PromptedEncoder", encoder=name)
        settings["model"]["head"]["in_channels"] = 16
        Config(settings).dump(tmp_path / "config.py")
        out = tmp_path / f"{place}.safetensors"
        extract_features(tmp_path / "config.py", out, split="test", progress=False)
        found.append(read_features(out))
    assert [len(one.header["encoder"]["digest"]) for one in found] == [64] * 3
    origins = [one.origin for one in found]
    assert origins[0].split()[-1] == origins[1].split()[-1] != origins[2].split()[-1]


def test_a_killed_run_continues(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("cite.mm.feature_extraction")
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    arguments = dict(batch_size=4, part_size=8, progress=False)
    extract_features(config, whole, **arguments)
    encode, calls = module.encode_batch, []

    def dies(*args: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(module, "encode_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        extract_features(config, out, **arguments)
    assert not out.exists()
    extract_features(config, out, **arguments)
    number = -(-len(read_features(whole).names) // 4)
    assert len(calls) == 4 + number - 2  # the two batches of the first part are not done again
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name("out.safetensors.partial").exists()


def test_parts_of_something_else_are_dropped(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "f.safetensors", {"checkpoint": "a"})
    writer.write_part(["x"], torch.ones(1, 2), torch.tensor([0]), ["y: broken"])
    assert FeatureWriter(tmp_path / "f.safetensors", {"checkpoint": "a"}).num_done == 2
    nan = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    with pytest.raises(ValueError, match=r"features of d\.png are not finite"):
        writer.write_part(["c.png", "d.png"], nan, torch.zeros(2, dtype=torch.int64))
    other = FeatureWriter(tmp_path / "f.safetensors", {"checkpoint": "b"})
    assert other.num_done == 0
    other.write_part([], torch.empty(0, 2), torch.tensor([]), ["y: broken"])
    with pytest.raises(ValueError, match="no image could be read: y: broken"):
        other.finish()
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_read_are_left_out(data: Path, tmp_path: Path) -> None:
    lines = (data / "gastric_cls3_ann" / "val_0.8.txt").read_text().splitlines()
    broken = data / "patches_captions" / "0000_99.jpg"
    broken.write_bytes(b"not an image")
    ann_file = tmp_path / "ann.txt"
    ann_file.write_text("\n".join([lines[0], "0000_99.jpg 0", lines[-1]]))
    settings = make_config(data)
    settings["test_dataloader"]["dataset"]["ann_file"] = str(ann_file)
    Config(settings).dump(tmp_path / "config.py")
    out = tmp_path / "out.safetensors"
    words = ["cite-features", str(tmp_path / "config.py"), str(out), "--split", "test"]
    options = ["--device", "cpu", "--cfg-options", "model.backbone.precision=bf16"]
    result = CliRunner().invoke(main, [*words, *options])
    assert result.exit_code == 3, result.output
    assert "1 image(s) skipped, for instance 0000_99.jpg" in result.stderr
    found = read_features(out)
    assert found.header["backbone"]["precision"] == "bf16"
    assert list(found.names) == [lines[0].split()[0], lines[-1].split()[0]]
    broken.unlink()


def test_patches_without_features_and_other_labels(tmp_path: Path) -> None:
    init_default_scope("mmcls")
    file, ann_file = tmp_path / "f.safetensors", tmp_path / "ann.txt"
    writer = FeatureWriter(file, {"classes": ["a", "b"]})
    writer.write_part(["s_1.jpg", "t_1.jpg"], torch.ones(2, 4), torch.tensor([0, 1]))
    writer.finish()
    assert len(CachedFeatureDataset(str(file))) == 2
    ann_file.write_text("s_1.jpg 0\nu_1.jpg 1\n")
    with pytest.raises(ValueError, match=r"ann\.txt:2: no features of u_1\.jpg .* has 2 patches"):
        CachedFeatureDataset(str(file), str(ann_file))
    ann_file.write_text("s_1.jpg 0\nt_1.jpg 0\n")
    with pytest.raises(ValueError, match=r"ann\.txt:2: label 0 of t_1\.jpg, but 1 in"):
        CachedFeatureDataset(str(file), str(ann_file))
    with pytest.raises(ValueError, match=r"shape \(batch, 8\), found \(2, 4\)"):
        PrecomputedFeatures(8)(torch.ones(2, 4))


def test_checkpoint_of_another_model(config: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.fc.weight": torch.ones(2, 2)}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth: not a checkpoint of this config"):
        build_classifier(Config.fromfile(config), str(tmp_path / "c.pth"))
    with pytest.raises(ValueError, match="split 'val'"):
        extract_features(config, tmp_path / "o.safetensors", split="val")


def test_untrained_prompts_give_no_features(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has prompts, which are untrained without a checkpoint"):
        extract_features(
            config,
            tmp_path / "o.safetensors",
            cfg_options={"model.backbone.prompt_length": 1},
            progress=False,
        )


def test_text_embeddings_by_command(tmp_path: Path) -> None:
    from cite.text_embeddings import read_text_embeddings

    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"well": "Well differentiated", "poor": ["Poorly", "bad"]}))
    command = ["cite-texts", str(tmp_path / "t.safetensors"), "--classes", str(classes)]
    command += ["--template", "{} x"]
    bert = ["--encoder", "bert", "--model", str(GOLDEN / "tiny_bert")]
    result = CliRunner().invoke(main, [*command, *bert])
    assert "3 texts of 2 classes, width 32" in result.stdout, result.stderr
    content = read_text_embeddings(tmp_path / "t.safetensors", classes=["well", "poor"])
    assert content.texts == ("Well differentiated x", "Poorly x", "bad x")
    assert content.encoder["pooling"] == "pooler"
    clip = save_open_clip(tmp_path / "clip")
    named = CliRunner().invoke(main, [*command, "--encoder", clip])
    assert "3 texts of 2 classes, width 16" in named.stdout, named.stderr
    content = read_text_embeddings(tmp_path / "t.safetensors", classes=["well", "poor"])
    assert content.encoder["encoder"] == clip and len(content.encoder["digest"]) == 64
    missing = CliRunner().invoke(main, command)
    assert missing.exit_code == 2
    assert "--encoder bert requires --model" in missing.stderr
