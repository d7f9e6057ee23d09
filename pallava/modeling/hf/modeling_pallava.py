"""PA-LLaVA under Hugging Face's model interface, built from the parts used in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pallava.modeling.hf.configuration_pallava import PALLaVAConfig
from pallava.modeling.llava import MultimodalMixin, use_softcap
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.text.encoding import IMAGE_TOKEN_INDEX


class PALLaVAForConditionalGeneration(MultimodalMixin, PreTrainedModel, GenerationMixin):
    """Vision encoder, connector and language model of an exported folder.

    Args:
        config: Configs of the three parts.

    Example:
        >>> import pallava.modeling.hf  # doctest: +SKIP
        >>> model = AutoModelForImageTextToText.from_pretrained("model")  # doctest: +SKIP
        >>> processor = AutoProcessor.from_pretrained("model")  # doctest: +SKIP
        >>> inputs = processor(images=image, text=prompt)  # doctest: +SKIP
        >>> ids = model.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
    """

    config_class = PALLaVAConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual_select_layer = config.visual_select_layer
        self.sub_image_mask = config.sub_image_mask
        self.visual_encoder = PLIPVisionEncoder(config.vision_config)
        self.projector = ScaleInvariantConnector(ConnectorConfig(**config.connector_config))
        self.llm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config)
        use_softcap(self.llm)
        self._no_split_modules = [*(getattr(self.llm, "_no_split_modules", None) or [])]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the input embeddings of the language model."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the input embeddings of the language model."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output layer of the language model."""
        return self.llm.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs one batch.

        Args:
            input_ids: `(B, length)`, with one `image_token_id` per image.
            pixel_values: `(N, 3, S, S)` tiles of all images, the thumbnail of each image first.
            num_tiles: `(M,)` number of tiles per image.
            attention_mask: `(B, length)`.
            labels: `(B, length)`, -100 for tokens excluded from the loss.
            kwargs: Unused.

        Returns:
            `logits` `(B, spliced length, vocab_size)` and, with labels, `loss`.
        """
        del kwargs
        inputs = self.prepare_inputs(
            self._mark_images(input_ids),
            self._stacks(pixel_values, num_tiles),
            attention_mask,
            labels,
        )
        outputs = self.llm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
        )
        loss = None
        if inputs.labels is not None:
            logits, targets = outputs.logits[:, :-1].float(), inputs.labels[:, 1:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates answers for a batch padded on either side.

        Args:
            input_ids: `(B, length)`, with one `image_token_id` per image.
            pixel_values: `(N, 3, S, S)` tiles of all images; see `forward`.
            num_tiles: `(M,)` number of tiles per image.
            attention_mask: `(B, length)`.
            kwargs: Keyword arguments for the language model's `generate`.

        Returns:
            The ids of prompt and answer, or a generation output, as Hugging Face's `generate`
            returns.
        """
        self.llm.generation_config = self.generation_config
        new = self.generate_answer(
            self._mark_images(input_ids),
            self._stacks(pixel_values, num_tiles),
            attention_mask,
            **kwargs,
        )
        ids = new if isinstance(new, Tensor) else new.sequences
        repeated = input_ids.repeat_interleave(len(ids) // len(input_ids), dim=0)
        ids = torch.cat([repeated.to(ids.device), ids], dim=1)
        if isinstance(new, Tensor):
            return ids
        new.sequences = ids
        return new

    def _mark_images(self, input_ids: Tensor) -> Tensor:
        if self.config.image_token_id is None:
            return input_ids
        return input_ids.masked_fill(input_ids == self.config.image_token_id, IMAGE_TOKEN_INDEX)

    @staticmethod
    def _stacks(pixel_values: Tensor | None, num_tiles: Tensor | None) -> list[Tensor] | None:
        if pixel_values is None:
            return None
        if num_tiles is None or int(num_tiles.sum()) != len(pixel_values):
            raise ValueError(
                f"num_tiles {num_tiles}: how many of the {len(pixel_values)} tiles belong to each "
                "image; the processor returns it beside pixel_values"
            )
        return list(pixel_values.split(num_tiles.tolist()))
