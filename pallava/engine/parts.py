"""Registers PA-LLaVA's parts in MMEngine's registries and XTuner's `BUILDER`.

Encoders and connectors of `pallava.registry`, including plug-ins, are also registered under their
short names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.registry import DATASETS, HOOKS, MODELS, Registry
from torch import nn
from xtuner.registry import BUILDER

from pallava.engine.runtime import prepare_host

prepare_host()  # before XTuner's hooks import DeepSpeed

from pallava.dataset import LLaVADataset  # noqa: E402
from pallava.engine.plip_pretraining import PLIPPretrainingModel  # noqa: E402
from pallava.evaluate_chat_hook import EvaluateChatHook  # noqa: E402
from pallava.model import LLaVAModel  # noqa: E402
from pallava.modeling import plip  # noqa: E402
from pallava.modeling.folders import load_connector, load_vision_encoder  # noqa: E402
from pallava.modeling.qformer import ConnectorConfig  # noqa: E402
from pallava.modeling.qformer import ScaleInvariantConnector as Connector  # noqa: E402
from pallava.modeling.slide_tokens import SlideTokenEncoder  # noqa: E402
from pallava.named_encoder import NamedVisionEncoder, image_processor  # noqa: E402
from pallava.registry import CONNECTORS, ENCODERS  # noqa: E402


def build_vision_encoder(folder: str | None = None, **sizes: Any) -> plip.PLIPVisionEncoder:
    """Loads a CLIP folder, or builds a randomly initialised encoder from `CLIPVisionConfig` fields.

    Example:
        >>> encoder = MODELS.build(dict(type="PLIPVisionEncoder", folder="plip"))  # doctest: +SKIP
    """
    if folder is not None:
        return load_vision_encoder(folder)
    from transformers import CLIPVisionConfig

    return plip.PLIPVisionEncoder(CLIPVisionConfig(**sizes))


def build_connector(folder: str | None = None, **sizes: Any) -> Connector:
    """Loads a `projector/` folder, or builds a connector from `ConnectorConfig` fields."""
    return Connector(ConnectorConfig(**sizes)) if folder is None else load_connector(folder)


def _from_sizes(connector: Callable[[ConnectorConfig], nn.Module]) -> Callable[..., nn.Module]:
    """Returns a function of `ConnectorConfig` fields that builds the connector."""

    def build(**sizes: Any) -> nn.Module:
        return connector(ConnectorConfig(**sizes))

    return build


def _register(name: str, part: Any, *registries: Registry) -> None:
    for registry in registries:
        if name not in registry.module_dict:
            registry.register_module(name=name, module=part)


for _part in (LLaVAModel, PLIPPretrainingModel, SlideTokenEncoder, NamedVisionEncoder):
    _register(_part.__name__, _part, MODELS, BUILDER)
_register("PLIPVisionEncoder", build_vision_encoder, MODELS, BUILDER)
_register("ScaleInvariantConnector", build_connector, MODELS, BUILDER)
_register("EncoderImageProcessor", image_processor, BUILDER)
_register("LLaVADataset", LLaVADataset, DATASETS, BUILDER)
_register("EvaluateChatHook", EvaluateChatHook, HOOKS, BUILDER)
for _name in ENCODERS.names():
    _register(_name, ENCODERS.get(_name), MODELS, BUILDER)
for _name in CONNECTORS.names():
    _register(_name, _from_sizes(CONNECTORS.get(_name)), MODELS, BUILDER)
