"""LLaVA model: splices the visual tokens of any number of images into a language model's input.

Shapes: B samples, M images in the batch, T visual tokens per image, L width of the language model,
S side of a tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pallava.modeling.contrast import contrast_loss
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX

SubImageMask = Literal["exact", "published"]
PaddingSide = Literal["left", "right"]


@runtime_checkable
class BagEncoder(Protocol):
    """Vision encoder of inputs other than pixels, for instance bags of tile features."""

    def visual_tokens(self, bags: Sequence[Any]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns thumbnail tokens, tokens of all sub-images, and sub-image counts per bag."""
        ...

    def blank(self) -> Any:
        """Returns a smallest input, with which text-only batches still give gradients."""
        ...


@dataclass(frozen=True)
class SplicedInputs:
    """Inputs of the language model after each image token is replaced by T embeddings."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    label_marks: Tensor | None = None


def splice(
    input_ids: Tensor,
    text_embeds: Tensor,
    image_tokens: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    padding_side: PaddingSide = "right",
    label_marks: Tensor | None = None,
) -> SplicedInputs:
    """Replaces every image token of a batch by the visual tokens of the next image.

    Args:
        input_ids: `(B, length)`; `IMAGE_TOKEN_INDEX` marks the position of an image.
        text_embeds: `(B, length, L)` embeddings of the ids; values at image positions are ignored.
        image_tokens: `(M, T, L)` visual tokens, in reading order over the batch.
        attention_mask: `(B, length)`, False for padding on either side.
        labels: `(B, length)`; image positions are excluded from the loss.
        padding_side: Side on which shorter samples are padded; `left` for batched generation.
        label_marks: `(B, length)`, marks of answers that the loss contrasts.

    Returns:
        Tensors padded to the longest sample after splicing.

    Raises:
        ValueError: If the number of image tokens differs from the number of images.

    Example:
        >>> ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6]])
        >>> splice(ids, torch.zeros(1, 3, 8), torch.zeros(1, 4, 8)).inputs_embeds.shape
        torch.Size([1, 6, 8])
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & mask
    num_places = int(is_image.sum())
    if num_places != len(image_tokens):
        raise ValueError(
            f"{num_places} image token(s) in the text but {len(image_tokens)} image(s) in the batch"
        )
    is_text = mask & ~is_image
    tokens_per_image = image_tokens.shape[1] if len(image_tokens) else 0
    widths = is_text.long() + is_image.long() * tokens_per_image
    lengths = widths.sum(dim=1)
    max_length = int(lengths.max())
    starts = widths.cumsum(dim=1) - widths
    if padding_side == "left":
        starts = starts + (max_length - lengths)[:, None]

    batch, device = len(input_ids), input_ids.device
    embeds = text_embeds.new_zeros(batch, max_length, text_embeds.shape[-1])
    rows, columns = is_text.nonzero(as_tuple=True)
    positions = starts[rows, columns]
    embeds = embeds.index_put((rows, positions), text_embeds[rows, columns])
    if num_places:
        image_rows, image_columns = is_image.nonzero(as_tuple=True)
        places = starts[image_rows, image_columns][:, None] + torch.arange(
            tokens_per_image, device=device
        )
        embeds = embeds.index_put((image_rows[:, None], places), image_tokens.to(embeds.dtype))

    steps = torch.arange(max_length, device=device).expand(batch, -1)
    padding = (max_length - lengths)[:, None]
    new_mask = steps >= padding if padding_side == "left" else steps < lengths[:, None]
    offset = padding if padding_side == "left" else 0

    def place(values: Tensor | None, padding_value: int) -> Tensor | None:
        if values is None:
            return None
        placed = values.new_full((batch, max_length), padding_value)
        placed[rows, positions] = values[rows, columns]
        return placed

    return SplicedInputs(
        inputs_embeds=embeds,
        attention_mask=new_mask,
        position_ids=((steps - offset) * new_mask),
        labels=place(labels, IGNORE_INDEX),
        label_marks=place(label_marks, 0),
    )


class MultimodalMixin:
    """Connects a vision encoder, a connector and a language model; mixed into an `nn.Module`.

    The module provides the attributes `llm`, `visual_encoder` and `projector`, whose names are also
    the prefixes in published state dicts.

    Attributes:
        visual_select_layer: Index of the encoder's hidden state that the connector reads.
        sub_image_mask: Sub-images that a connector with cross-attention sees: `exact`, each image's
            own, or `published`, which repeats the last sub-image once for every image that has
            fewer than the maximum in the batch. The mask of the original code has this effect in
            training.
    """

    llm: Any
    visual_encoder: Any
    projector: Any
    training: bool
    visual_select_layer: int = -2
    sub_image_mask: SubImageMask = "exact"

    def encode_images(self, pixel_values: Sequence[Any]) -> Tensor:
        """Runs the vision encoder and the connector.

        Args:
            pixel_values: M stacks `(1 + num_sub_images, 3, S, S)`, the thumbnail first; for a
                `BagEncoder`, its own inputs, for instance M `SlideBag`.

        Returns:
            `(M, T, L)` visual tokens.
        """
        thumbnails, sub_images, counts = self._visual_tokens(pixel_values)
        thumbnails = thumbnails.to(self.projector.dtype)
        if not self.projector.uses_sub_images:
            return self.projector(thumbnails)
        sub_images = sub_images.to(self.projector.dtype)
        if self.sub_image_mask == "published":
            sub_images, counts = _repeat_last(sub_images, counts)
        return self.projector(thumbnails, sub_images, counts)

    def _visual_tokens(self, pixel_values: Sequence[Any]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns thumbnail tokens, tokens of all sub-images, and sub-image counts per image."""
        if isinstance(self.visual_encoder, BagEncoder):
            return self.visual_encoder.visual_tokens(pixel_values)
        stacks = [stack if self.projector.uses_sub_images else stack[:1] for stack in pixel_values]
        # Thumbnails first: both halves of the encoder's output are then views, not copies.
        tiles = [stack[:1] for stack in stacks] + [stack[1:] for stack in stacks]
        parameter = next(self.visual_encoder.parameters())
        pixels = torch.cat(tiles).to(parameter.device, parameter.dtype)
        features = self.visual_encoder.features(pixels, self.visual_select_layer)
        counts = [len(stack) - 1 for stack in stacks]
        return features[: len(stacks)], features[len(stacks) :], counts

    def prepare_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Any] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: PaddingSide = "right",
        label_marks: Tensor | None = None,
    ) -> SplicedInputs:
        """Embeds the text, encodes the images and splices them; see `splice`.

        Args:
            input_ids: `(B, length)`.
            pixel_values: Images of the whole batch in reading order; samples without an image have
                no entry.
            attention_mask: `(B, length)`.
            labels: `(B, length)`.
            padding_side: Side on which shorter samples are padded.
            label_marks: `(B, length)`.
        """
        embed = self.llm.get_input_embeddings()
        text_embeds = embed(input_ids.clamp(min=0))  # image tokens have negative ids
        if pixel_values is not None and len(pixel_values):
            image_tokens = self.encode_images(pixel_values).to(text_embeds.dtype)
            if (scale := embedding_scale(self.llm)) != 1.0:
                image_tokens = image_tokens / scale
        else:
            image_tokens = text_embeds.new_zeros(0, 0, text_embeds.shape[-1])
            if self.training and torch.is_grad_enabled():
                # DDP waits for a gradient of every parameter on every rank, and other ranks may
                # have images in this step.
                text_embeds = text_embeds + 0.0 * self._blank_image_tokens().sum()
        return splice(
            input_ids,
            text_embeds,
            image_tokens,
            attention_mask,
            labels,
            padding_side,
            label_marks,
        )

    def language_model_loss(self, inputs: SplicedInputs) -> Tensor:
        """Computes the mean cross-entropy over tokens with labels.

        With `label_marks`, `pallava.modeling.contrast.contrast_loss` is added.

        Logits are computed only at positions where some sample has a label: with Llama-3's
        vocabulary of 128,256, the logits of all visual tokens would take gigabytes.
        """
        assert inputs.labels is not None
        targets = inputs.labels[:, 1:]
        learned = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
        if not len(learned):
            learned = learned.new_zeros(1)  # one position, so that the loss is a zero with a graph
        keeps_logits = accepts(self.llm, "logits_to_keep")
        logits = self.llm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
            **({"logits_to_keep": learned} if keeps_logits else {}),
        ).logits
        logits = (logits if keeps_logits else logits[:, learned]).float()
        targets = targets[:, learned].reshape(-1).to(logits.device)
        total = F.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        loss = total / (targets != IGNORE_INDEX).sum().clamp(min=1)
        if inputs.label_marks is not None:
            marks = inputs.label_marks[:, 1:][:, learned].reshape(-1).to(logits.device)
            loss = loss + contrast_loss(logits.flatten(0, 1), targets, marks)
        return loss

    @torch.no_grad()
    def generate_answer(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Any] | None = None,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Generates for a batch padded on either side; returns only the new ids."""
        inputs = self.prepare_inputs(input_ids, pixel_values, attention_mask, padding_side="left")
        return self.llm.generate(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask.long(),
            **generation_kwargs,
        )

    def _blank_image_tokens(self) -> Tensor:
        if isinstance(self.visual_encoder, BagEncoder):
            return self.encode_images([self.visual_encoder.blank()])
        size = self.visual_encoder.config.image_size
        tiles = 2 if self.projector.uses_sub_images else 1
        parameter = next(self.visual_encoder.parameters())
        return self.encode_images([parameter.new_zeros(tiles, 3, size, size)])


class PALLaVA(MultimodalMixin, nn.Module):
    """Vision encoder, connector and language model as one module.

    Args:
        llm: Hugging Face causal language model, plain or wrapped by PEFT.
        visual_encoder: `PLIPVisionEncoder`, or a module with its `features` and `config`.
        projector: `ScaleInvariantConnector`, or a module with its interface.
        visual_select_layer: Index of the encoder's hidden state that the connector reads.
        sub_image_mask: See `MultimodalMixin`.
    """

    def __init__(
        self,
        llm: nn.Module,
        visual_encoder: nn.Module,
        projector: nn.Module,
        visual_select_layer: int = -2,
        sub_image_mask: SubImageMask = "exact",
    ) -> None:
        super().__init__()
        use_softcap(llm)
        self.llm = llm
        self.visual_encoder = visual_encoder
        self.projector = projector
        self.visual_select_layer = visual_select_layer
        self.sub_image_mask = sub_image_mask

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Any] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns `loss` if labels are given, else `logits` `(B, spliced length, vocab_size)`."""
        inputs = self.prepare_inputs(input_ids, pixel_values, attention_mask, labels)
        if inputs.labels is not None:
            return {"loss": self.language_model_loss(inputs)}
        outputs = self.llm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
        )
        return {"logits": outputs.logits}

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Any] | None = None,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """See `MultimodalMixin.generate_answer`."""
        return self.generate_answer(input_ids, pixel_values, attention_mask, **generation_kwargs)


def embedding_scale(llm: Any) -> float:
    """Returns the factor by which a language model multiplies the embeddings that it is passed.

    The model multiplies its own embeddings by this factor; visual tokens must be divided first.
    Gemma 1 and 2 multiply by the root of their width, Granite by a factor of its config. Gemma 3
    multiplies inside the embedding layer, and later versions of transformers do so for Gemma 1 and
    2 as well.
    """
    config: Any = getattr(llm, "config", None)
    if hasattr(llm.get_input_embeddings(), "embed_scale"):
        return 1.0
    if getattr(config, "model_type", None) in ("gemma", "gemma2"):
        return float(config.hidden_size**0.5)
    return float(getattr(config, "embedding_multiplier", None) or 1.0)


def use_softcap(llm: Any) -> None:
    """Selects the attention that caps its logits for models trained with a cap, such as Gemma 2.

    transformers would take PyTorch's fused attention, which has no cap and silently leaves it out.
    """
    config: Any = getattr(llm, "config", None)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        config._attn_implementation = "eager"


def accepts(llm: Any, argument: str) -> bool:
    """Returns whether the forward method of a language model has an argument, also under PEFT."""
    return argument in inspect.signature(without_adapter(llm).forward).parameters


def without_adapter(llm: Any) -> Any:
    """Returns the language model that PEFT has wrapped, or `llm` itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def _repeat_last(sub_images: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    longest, pieces, new_counts = max(counts), [], []
    for piece in sub_images.split(counts):
        visible = torch.cat([piece, piece[-1:]]) if len(piece) < longest else piece
        pieces.append(visible)
        new_counts.append(len(visible))
    return torch.cat(pieces), new_counts
