"""Exports a trained classifier to a folder that can be used without MMEngine."""

from __future__ import annotations

import os
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from cite.classifier import Classifier, LinearScores
from cite.mm.config_file import read_config
from cite.mm.feature_extraction import build_classifier
from cite.mm.heads import TextEmbeddingHead
from cite.preprocessing import Preprocessing
from cite.projection import Projection
from cite.prompted import PromptedEncoder, merge_lora
from cite.text_scores import TextScores
from pathcore.encoders import Transform, find_transform
from pathcore.files import StrPath, sha256_of

_OF_ENCODER = "EncoderDataPreprocessor"
_WITHOUT_PIXELS = ("LoadPatch", "PackPatch", "PackClsInputs", "PackInputs")


def export_classifier(
    config: StrPath,
    checkpoint: str,
    out: StrPath,
    cfg_options: dict[str, Any] | None = None,
) -> Classifier:
    """Writes `classifier.safetensors` and `classifier.json`, with LoRA merged.

    Args:
        config: Config whose model has a backbone of `cite.mm.backbones`.
        checkpoint: Checkpoint of that config.
        out: The folder to write.
        cfg_options: Values that override the config, by dotted name.

    Raises:
        ValueError: If a part cannot be exported, or the checkpoint does not fit.
    """
    cfg = read_config(config, cfg_options)
    model = build_classifier(cfg, checkpoint)
    if not isinstance(model.backbone, PromptedEncoder):
        raise ValueError(
            f"{config}: expected a backbone of cite.mm, found {type(model.backbone).__name__}; "
            "export from the config whose encoder made the features"
        )
    if not model.backbone.encoder.spec:
        raise ValueError(
            f"{config}: {type(model.backbone.encoder.model).__name__} is built by code of its "
            "authors alone, so its classifier cannot be exported; use the config and checkpoint"
        )
    if model.backbone.adapted:
        merge_lora(model.backbone.encoder)
    if not (model.neck is None or isinstance(model.neck, Projection)):
        raise ValueError(f"{config}: expected ProjectionNeck, found {type(model.neck).__name__}")
    head = _head_of(model.head, config)
    classifier = Classifier(
        model.backbone,
        model.neck,
        head,
        read_preprocessing(cfg),
        _class_names(cfg, head),
        {"config": os.path.basename(os.fspath(config)), "checkpoint_sha256": sha256_of(checkpoint)},
    )
    classifier.save(out)
    return classifier


def read_preprocessing(cfg: Config) -> Preprocessing | Transform:
    """Reads size and normalisation from a config's test pipeline and data preprocessor.

    Raises:
        ValueError: If the pipeline has a step that cannot be exported.
    """
    resize: dict[str, Any] | None = None
    normalise = cfg.model.get("data_preprocessor") or {}
    for step in cfg.test_dataloader.dataset.pipeline:
        if step["type"] == "EncoderResize":
            name = step["encoder"]
            if (normalise.get("type"), normalise.get("encoder")) != (_OF_ENCODER, name):
                raise ValueError(
                    f"test pipeline: EncoderResize of {name} goes with data_preprocessor="
                    f"dict(type='{_OF_ENCODER}', encoder='{name}'), found {dict(normalise)}"
                )
            return find_transform(name)
        if step["type"] in ("ResizePatch", "PatchGastricPipeline"):
            resize = {k: v for k, v in step.items() if k in ("size", "interpolation", "keep_ratio")}
        elif step["type"] not in _WITHOUT_PIXELS:
            raise ValueError(f"test pipeline: {step['type']} cannot be exported; use ResizePatch")
    if resize is None or "mean" not in normalise or "std" not in normalise:
        raise ValueError("expected a ResizePatch in the test pipeline, and mean and std")
    if normalise.get("to_rgb"):
        raise ValueError("data_preprocessor.to_rgb: expected False, since LoadPatch gives RGB")
    mean, std = (tuple(map(float, normalise[key])) for key in ("mean", "std"))
    return Preprocessing(**{"size": 224, **resize}, mean=mean, std=std)  # type: ignore[arg-type]


def _head_of(head: Any, config: StrPath) -> TextScores | LinearScores:
    if type(head) in (TextScores, TextEmbeddingHead):  # subclasses have state of their own
        return head
    if type(head).__name__ != "LinearClsHead":
        raise ValueError(
            f"{config}: expected TextEmbeddingHead or LinearClsHead, found {type(head).__name__}"
        )
    linear = LinearScores(head.fc.in_features, head.fc.out_features)
    linear.load_state_dict(head.state_dict())
    return linear


def _class_names(cfg: Config, head: TextScores | LinearScores) -> list[str]:
    settings = cfg.test_dataloader.dataset
    names = settings.get("classes") or (settings.get("metainfo") or {}).get("classes")
    if names is None:
        names = getattr(DATASETS.get(settings.type), "METAINFO", {}).get("classes")
    if names is None and isinstance(head, TextScores):
        names = head.classes
    if names is None:
        raise ValueError("test_dataloader.dataset.classes: expected names of the classes")
    return list(names)
