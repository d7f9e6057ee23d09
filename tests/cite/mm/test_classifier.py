"""`ImageClassifier` of MMClassification and MMPreTrain with our modules: three recorded steps."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import cite.mm  # noqa: F401
from cite.mm.backbones import PromptedEncoderBackbone
from cite.mm.heads import ProjectionNeck
from cite.text_embeddings import TextEmbeddings, write_text_embeddings
from tests.cite.goldens import CLIP, CLIP_WEIGHTS, FP32, VIT_ARCH, read_arrays

HOSTS = {"mmcls": "ClsDataSample", "mmpretrain": "DataSample"}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Any:
    library = pytest.importorskip(f"{request.param}")
    importlib.import_module(f"{request.param}.models")
    init_default_scope(request.param)
    yield library
    init_default_scope("mmengine")


def samples_of(host: Any, labels: list[int]) -> list[Any]:
    structures = importlib.import_module(f"{host.__name__}.structures")
    kind = getattr(structures, HOSTS[host.__name__])
    return [kind().set_gt_label(label) for label in labels]


def model_config(text_file: Path, **backbone: Any) -> dict[str, Any]:
    return dict(
        type="ImageClassifier",
        backbone=dict(
            type="PromptedEncoder",
            encoder=CLIP,
            checkpoint=str(CLIP_WEIGHTS),
            **(dict(prompt_length=1) | backbone),
        ),
        neck=dict(type="ProjectionNeck", in_features=48, out_features=64),
        head=dict(type="TextEmbeddingHead", text_embeddings=str(text_file)),
    )


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.safetensors"
    embeddings = read_arrays("train3.npz")["text_embeddings"]
    content = TextEmbeddings(embeddings, torch.arange(3), tuple("abc"), tuple("abc"))
    write_text_embeddings(path, content)
    return path


def test_three_recorded_steps(host: Any, text_file: Path) -> None:
    golden = read_arrays("train3.npz")
    model = MODELS.build(model_config(text_file))
    model.init_weights()  # as the runner does; loaded weights must survive it
    model.neck.load_state_dict(
        {"weight": golden["neck.weight.init"], "bias": golden["neck.bias.init"]}
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"backbone.prompts.prompt", "neck.weight", "neck.bias"}
    optimizer = torch.optim.SGD(trained.values(), lr=0.03)
    model.train()
    images = golden["imgs"].float()
    for step in range(3):
        optimizer.zero_grad()
        samples = samples_of(host, golden["labels"][step].tolist())
        loss = model(images[step], samples, mode="loss")["loss"]
        torch.testing.assert_close(loss.double(), golden["losses"][step], rtol=1e-4, atol=0)
        loss.backward()
        if step == 0:
            for ours, theirs in (("backbone.prompts.prompt", "prompt"), ("neck.weight",) * 2):
                torch.testing.assert_close(
                    trained[ours].grad, golden[f"{theirs}.grad.step0"], rtol=1e-3, atol=1e-4
                )
        optimizer.step()
        state = model.state_dict()
        for ours, theirs in (
            ("backbone.prompt", "prompt"),
            ("neck.weight",) * 2,
            ("neck.bias",) * 2,
        ):
            expected = golden[f"{theirs}.after_step{step}"]
            torch.testing.assert_close(state[ours], expected, **FP32)
    model.eval()
    predicted = model(images[3], samples_of(host, [0] * 6), mode="predict")
    scores = [s.pred_score if "pred_score" in s else s.pred_label.score for s in predicted]
    torch.testing.assert_close(
        torch.stack(scores).detach(), golden["softmax_eval_batch3"], rtol=1e-3, atol=1e-4
    )


def test_predictions_without_samples_and_soft_labels(host: Any, text_file: Path) -> None:
    model = MODELS.build(model_config(text_file)).eval()
    images = read_arrays("train3.npz")["imgs"][0].float()
    predicted = model(images, mode="predict")
    assert type(predicted[0]).__name__ == HOSTS[host.__name__]
    labels = read_arrays("train3.npz")["labels"][0]
    hard = model(images, samples_of(host, labels.tolist()), mode="loss")["loss"]
    soft = samples_of(host, labels.tolist())
    for sample, row in zip(soft, nn.functional.one_hot(labels, 3).float(), strict=True):
        sample.set_gt_score(row)
    torch.testing.assert_close(model(images, soft, mode="loss")["loss"], hard)


def test_a_label_that_is_no_class_is_named(host: Any, text_file: Path) -> None:
    model = MODELS.build(model_config(text_file))
    samples = samples_of(host, [0, 3])
    samples[1].set_metainfo({"img_path": "patches/x_1.jpg"})
    with pytest.raises(ValueError, match=r"patches/x_1\.jpg: label 3, .* 3 classes, 0 to 2"):
        model(torch.zeros(2, 3, 32, 32), samples, mode="loss")


def test_baselines_are_built_from_the_same_backbone(host: Any, text_file: Path) -> None:
    linear = dict(type="LinearClsHead", num_classes=3, in_channels=48)
    trained = {}
    for name, backbone in {
        "linear": dict(prompt_length=0),
        "vpt": dict(prompt_length=2),
        "finetune": dict(prompt_length=0, frozen=False),
        "lora": dict(prompt_length=0, lora=dict(r=2)),
    }.items():
        config = model_config(text_file, **backbone) | {"neck": None, "head": linear}
        model = MODELS.build(config)
        loss = model(torch.zeros(2, 3, 32, 32), samples_of(host, [0, 1]), mode="loss")["loss"]
        loss.backward()
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained["linear"] == 3 * 49
    assert trained["vpt"] == 3 * 49 + 2 * 128
    assert trained["linear"] < trained["lora"] < trained["finetune"] / 10
    zero_shot = model_config(text_file, prompt_length=0) | {"neck": None}
    model = MODELS.build(zero_shot)
    with pytest.raises(ValueError, match="width 48 meet text embeddings of width 64"):
        model(torch.zeros(1, 3, 32, 32), samples_of(host, [0]), mode="loss")


def test_neck_takes_what_backbones_give() -> None:
    neck, features = ProjectionNeck(4, 2), torch.randn(3, 4)
    (expected,) = neck(features)
    patches = torch.randn(3, 4, 2, 2)
    for form in ((features,), [patches, features], ([patches, features],)):
        assert torch.equal(neck(form)[0], expected)
    assert not any(p.requires_grad for p in ProjectionNeck(4, 2, fix=True).parameters())


def test_text_encoder_in_the_config(text_file: Path) -> None:
    from tests.cite.goldens import GOLDEN

    encoder = dict(type="bert", model=str(GOLDEN / "tiny_bert"))
    head = MODELS.build(
        dict(
            type="TextEmbeddingHead",
            text_encoder=encoder,
            texts=dict(well=["well differentiated", "tubular"], poor="poorly differentiated"),
            classes=["well", "poor"],
            templates=["{}", "{} adenocarcinoma"],
            several="max",
        )
    )
    assert head.text_embeddings.shape == (6, 32)
    with pytest.raises(ValueError, match="either `text_embeddings`"):
        MODELS.build(dict(type="TextEmbeddingHead"))
    with pytest.raises(ValueError, match="needs `texts`"):
        MODELS.build(dict(type="TextEmbeddingHead", text_encoder=encoder))


SIZES = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, intermediate_size=48)


@pytest.mark.parametrize(
    "config",
    [
        dict(type="PromptedViT", arch=VIT_ARCH, img_size=32, patch_size=8),
        dict(
            type="PromptedEncoder",
            encoder=dict(
                library="timm",
                architecture="vit_large_patch16_224",
                arguments=dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
            ),
        ),
        dict(
            type="PromptedEncoder",
            encoder=dict(library="transformers", config=dict(model_type="dinov2", **SIZES)),
        ),
        dict(type="PromptedEncoder", encoder="PLIP"),
    ],
    ids=["ViT", "timm", "DINOv2", "PLIP"],
)
def test_every_backbone_by_its_registered_name(config: dict[str, Any], tmp_path: Path) -> None:
    if config.get("encoder") == "PLIP":
        CLIPVisionModel(CLIPVisionConfig(**SIZES)).save_pretrained(tmp_path)
        CLIPImageProcessor().save_pretrained(tmp_path)
        config = config | {"encoder": str(tmp_path)}
    backbone = MODELS.build(dict(config, prompt_length=2))
    (features,) = backbone(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, backbone.embed_dim)
    assert [n for n, p in backbone.named_parameters() if p.requires_grad] == ["prompts.prompt"]
    assert not hasattr(backbone, "init_weights")


def test_names_and_descriptions_that_are_none() -> None:
    with pytest.raises(TypeError, match="encoder"):
        PromptedEncoderBackbone()
    with pytest.raises(FileNotFoundError, match=r"hf:no/such/x: no such folder"):
        PromptedEncoderBackbone("hf:no/such/x")
    with pytest.raises(ValueError, match="are for a name; put them into the description"):
        PromptedEncoderBackbone(CLIP, feature="class")


def test_order_of_described_classes_is_stated() -> None:
    """MMEngine sorts the keys of a config that it writes: a mapping alone has no order."""
    from cite.mm.heads import _in_order

    texts = {"well": ["a", "b"], "poor": "c"}
    assert list(_in_order(texts, ["well", "poor"])) == ["well", "poor"]
    assert list(_in_order(dict(sorted(texts.items())), ["well", "poor"])) == ["well", "poor"]
    assert _in_order([["a", "b"], "c"], None) == {"a": ["a", "b"], "c": "c"}
    for wrong, classes, message in (
        (texts, None, "need `classes`"),
        (texts, ["well"], "need `classes`"),
        (["a", "a"], None, "as many different classes"),
        (["a", "b"], ["x"], "as many different classes"),
        (None, None, "needs `texts`"),
    ):
        with pytest.raises(ValueError, match=message):
            _in_order(wrong, classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tuned", [False, True])
def test_checkpoints_of_the_published_code_land_entirely(
    host: Any, text_file: Path, tuned: bool
) -> None:
    """They name the tower `backbone.model.*` and have no text embeddings."""
    torch.manual_seed(1)
    config = model_config(text_file, **(dict(frozen=False, prompt_length=0) if tuned else {}))
    source, target = MODELS.build(config), MODELS.build(config)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    ours = source.state_dict()
    published = {}
    for name, tensor in ours.items():
        rest = name.removeprefix("backbone.")
        is_tower = name.startswith("backbone.") and not rest.startswith("prompt")
        if not name.startswith("head.") and rest != "prompt_initialised":
            published[f"backbone.model.{rest}" if is_tower else name] = tensor
    assert sum(name.startswith("backbone.model.") for name in published) > 20
    target.load_state_dict(published, strict=True)
    found = target.state_dict()
    for name, tensor in ours.items():
        if name.endswith("prompt_initialised"):
            assert bool(found[name])  # a loaded prompt is not replaced by the mean token
        elif not name.startswith("head."):
            assert torch.equal(found[name], tensor), name
    torch.save({"state_dict": published}, text_file.parent / "published.pth")
    config["backbone"]["checkpoint"] = str(text_file.parent / "published.pth")
    again = MODELS.build(config)
    for name, tensor in again.backbone.encoder.model.state_dict().items():
        assert torch.equal(tensor, source.backbone.encoder.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(type="PromptedCLIPImageBackbone", arch="ViT-B/16"), "is PromptedEncoder with "),
        (dict(type="CLIPImageBackbone"), "PromptedEncoder without prompts"),
        (dict(type="MyLinearClsHead", num_classes=3), "is LinearClsHead"),
        (dict(type="PromptedEncoder", encoder="uni", float16=True), "precision='fp16'"),
        (dict(type="ProjectionNeck", in_features=2, out_features=2, float16=True), "'float16'"),
        (dict(type="TextEmbeddingHead", learnable_t=True), "learnable_temperature"),
        (
            dict(type="PromptedEncoder", encoder="open_clip:ViT-B/16@x"),
            "OpenAI's CLIP is 'ViT-B-16-quickgelu'",
        ),
    ],
)
def test_published_names_and_arguments_are_answered(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MODELS.build(config)
    assert len(str(error.value).splitlines()) == 1


def test_published_transform_and_balance_are_answered() -> None:
    with pytest.raises(ValueError, match="CLIPPreprocess of the published code is LoadPatch"):
        TRANSFORMS.build(dict(type="CLIPPreprocess"))
    with pytest.raises(ValueError, match=r"patch_balance.*PatchBalancedSampler"):
        DATASETS.build(dict(type="PatchGastric", ann_file="a.txt", patch_balance=True))


TIMM_TINY = dict(library="timm", architecture="vit_tiny_patch16_224", arguments=dict(img_size=32))


def test_images_of_another_size(text_file: Path) -> None:
    for config in (
        dict(type="PromptedEncoder", encoder=CLIP),
        dict(type="PromptedEncoder", encoder=TIMM_TINY),
        dict(type="PromptedViT", arch="deit-tiny", img_size=32),
    ):
        backbone = MODELS.build(config)
        height, width = backbone.encoder.image_size
        for size in ((height, 2 * width), (height + 6, width + 6)):
            with pytest.raises(ValueError, match=rf"takes images of {height} x {width} px, found"):
                backbone(torch.zeros(1, 3, *size))


def test_ctranspath_as_a_linear_baseline(host: Any) -> None:
    """Features of a network that takes no prompts; only the head is trained."""
    swin = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4], img_size=56)
    encoder = dict(library="own", architecture="ctranspath", arguments=swin)
    backbone = dict(type="PromptedEncoder", encoder=encoder)
    head = dict(type="LinearClsHead", num_classes=3, in_channels=48)
    model = MODELS.build(dict(type="ImageClassifier", backbone=backbone, head=head)).train()
    samples = samples_of(host, [0, 1, 2])
    model(torch.randn(3, 3, 56, 56), samples, mode="loss")["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"head.fc.weight", "head.fc.bias"}
