"""Config of an exported PA-LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig


class PALLaVAConfig(PretrainedConfig):
    """Configs of the three parts, and how they are connected.

    Args:
        text_config: Config of the language model, or its values with `model_type`.
        vision_config: Config of the CLIP vision tower, or its values.
        connector_config: Fields of `pallava.modeling.qformer.ConnectorConfig`.
        visual_select_layer: Index of the encoder's hidden state that the connector reads.
        sub_image_mask: See `pallava.modeling.llava.MultimodalMixin`.
        image_token_id: Token id that marks the position of an image. The processor inserts it, and
            it is replaced before the language model runs.
    """

    model_type = "pallava"
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        vision_config: PretrainedConfig | Mapping[str, Any] | None = None,
        connector_config: Mapping[str, Any] | None = None,
        visual_select_layer: int = -2,
        sub_image_mask: str = "exact",
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PretrainedConfig):
            values = dict(text_config or {"model_type": "llama"})
            text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = CLIPVisionConfig(**dict(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.connector_config = dict(connector_config or {})
        self.visual_select_layer = visual_select_layer
        self.sub_image_mask = sub_image_mask
        self.image_token_id = image_token_id
        # Exported folders store both embeddings, even if the base model ties them.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
