"""PLIP pretraining: aligns images and captions by contrast (ITC) and matching (ITM).

ALBEF's objectives (arXiv:2107.07651) with BLIP's fused text encoder (arXiv:2201.12086) and without
a language-modelling loss, as PA-LLaVA's PLIP encoder was trained. Parameters and buffers have their
published names.

Shapes: B pairs on this rank, W ranks, N = W * B, Q queue slots, E embed_dim, T tokens, P image
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.plip_text import PLIPTextEncoder
from pallava.plip.losses import contrastive_loss, hard_negatives
from pathcore.ranks import all_gather, all_gather_with_grad, rank_and_world_size

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5
"""Bounds of the learned temperature, as in ALBEF (github.com/salesforce/ALBEF)."""

EMPTY_SLOT = -100
"""Value of `idx_queue` for slots that still hold random initial vectors, as in ALBEF."""

_MOMENTUM_SUFFIX = "_m"
_IGNORED_LABEL = -100


@dataclass
class PLIPPretrainingOutput:
    """Losses and accuracies of one step.

    Attributes:
        loss_ita: Contrastive loss, averaged over image-to-text and text-to-image.
        loss_itm: Matching loss over one positive and two hard negatives per pair.
        itm_accuracy: Fraction of pairs and hard negatives that are classified correctly.
        itc_accuracy: Fraction of images whose nearest caption within the step is a positive.
    """

    loss_ita: Tensor
    loss_itm: Tensor
    itm_accuracy: Tensor
    itc_accuracy: Tensor

    @property
    def loss(self) -> Tensor:
        """Total loss to be minimised."""
        return self.loss_ita + self.loss_itm


class PLIPPretrainingModel(nn.Module):
    """Image and text encoder, their momentum copies and queues, and the two losses.

    With several processes, each rank contrasts its pairs with the momentum features of all ranks,
    and all ranks keep identical queues. The gradient averaged over ranks then equals that of a
    single process with the combined batch; for the matching loss, this requires `gather_negatives`.

    Args:
        visual_encoder: Image encoder; all its layers are trained.
        text_encoder: Text encoder with cross-attention to the image encoder's width.
        enc_token_id: Id of `[ENC]`, which replaces the first token for matching.
        embed_dim: Width of the shared space.
        queue_size: Number of slots per queue.
        momentum: Decay of the moving average of the momentum copies.
        alpha: Weight of the momentum model's soft targets; see also `ramped_alpha`.
        temperature: Initial value of the learned temperature.
        positives: With `same_sample`, as in the original, only a sample's own caption is positive.
            With `same_caption_id`, as in ALBEF's retrieval training, all samples of the step and
            the queue with the same id are positive and excluded from hard negatives.
        empty_slots: Whether the random vectors of a queue that is not yet full count as
            `negatives`, as in the original, or are `ignored`.
        gather_negatives: Whether to draw hard negatives from all ranks, at the cost of
            communicating the image tokens.

    Raises:
        ValueError: If an argument is out of range.
    """

    temp: nn.Parameter
    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor
    ptr_queue: Tensor

    def __init__(
        self,
        visual_encoder: PLIPVisionEncoder,
        text_encoder: PLIPTextEncoder,
        *,
        enc_token_id: int,
        embed_dim: int = 256,
        queue_size: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        temperature: float = 0.07,
        positives: Literal["same_sample", "same_caption_id"] = "same_caption_id",
        empty_slots: Literal["negatives", "ignored"] = "ignored",
        gather_negatives: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("positives", positives, ("same_sample", "same_caption_id"))
        _check_choice("empty_slots", empty_slots, ("negatives", "ignored"))
        for name, value in (("momentum", momentum), ("alpha", alpha)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: expected a fraction between 0 and 1")
        if queue_size < 1:
            raise ValueError(f"queue_size {queue_size}: expected at least one slot")
        if not 0 <= enc_token_id < text_encoder.config.vocab_size:
            raise ValueError(
                f"enc_token_id {enc_token_id} is outside the text encoder's vocabulary of "
                f"{text_encoder.config.vocab_size}; count the added tokens in vocab_size"
            )
        self.enc_token_id = enc_token_id
        self.momentum = momentum
        self.alpha = alpha
        self.positives = positives
        self.empty_slots = empty_slots
        self.gather_negatives = gather_negatives
        self._rank_batch_size: int | None = None

        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        text_hidden_size = text_encoder.config.hidden_size
        self.vision_proj = nn.Linear(visual_encoder.config.hidden_size, embed_dim)
        self.text_proj = nn.Linear(text_hidden_size, embed_dim)
        self.itm_head = nn.Linear(text_hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(float(temperature)))

        self.visual_encoder_m = copy.deepcopy(visual_encoder)
        self.text_encoder_m = copy.deepcopy(text_encoder)
        self.vision_proj_m = copy.deepcopy(self.vision_proj)
        self.text_proj_m = copy.deepcopy(self.text_proj)
        for _, copied in self._momentum_pairs():
            copied.requires_grad_(False)

        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), EMPTY_SLOT))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        caption_ids: Tensor | None = None,
    ) -> PLIPPretrainingOutput:
        """Computes both losses; in training mode, also updates momentum copies and queues.

        Args:
            pixel_values: `(B, 3, S, S)`, normalised.
            input_ids: `(B, T)`, padded on the right to the longest caption of the batch.
            attention_mask: `(B, T)`.
            caption_ids: `(B,)` non-negative integers, equal for equal captions. Required for
                `positives="same_caption_id"`.

        Raises:
            ValueError: If caption ids are required but missing, or, with several processes, if the
                batch size differs between ranks or from earlier steps.
        """
        caption_ids = self._check_caption_ids(caption_ids, pixel_values)
        self._check_ranks(len(pixel_values))
        with torch.no_grad():
            self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
            if self.training:
                self.update_momentum_copies()
            image_feats_m = self._features(pixel_values, momentum=True)
            text_feats_m = self._features(input_ids, attention_mask, momentum=True)
            gathered_image = all_gather(image_feats_m)
            gathered_text = all_gather(text_feats_m)
            gathered_ids = all_gather(caption_ids)

        image_embeds = self.visual_encoder(pixel_values).last_hidden_state
        image_feats = self._project(self.vision_proj, image_embeds)
        text_feats = self._features(input_ids, attention_mask)

        all_ids = torch.cat([gathered_ids, self.idx_queue[0]])
        positive = self._positives(caption_ids, all_ids)
        ignored = all_ids == EMPTY_SLOT if self.empty_slots == "ignored" else None
        contrast = partial(
            contrastive_loss,
            positive=positive,
            temperature=self.temp,
            alpha=self.alpha,
            ignored=ignored,
        )
        loss_i2t, sim_i2t = contrast(
            image_feats, image_feats_m, torch.cat([gathered_text.T, self.text_queue], dim=1)
        )
        loss_t2i, sim_t2i = contrast(
            text_feats, text_feats_m, torch.cat([gathered_image.T, self.image_queue], dim=1)
        )
        if self.training:
            self.enqueue(gathered_image, gathered_text, gathered_ids)

        sim_i2t, sim_t2i, positive = (
            part[:, : len(gathered_ids)] for part in (sim_i2t, sim_t2i, positive)
        )
        loss_itm, itm_accuracy = self._match(
            image_embeds, input_ids, attention_mask, sim_i2t, sim_t2i, positive
        )
        nearest = sim_i2t.argmax(dim=1, keepdim=True)
        itc_accuracy = positive.gather(1, nearest).float().mean()
        return PLIPPretrainingOutput(
            (loss_i2t + loss_t2i) / 2, loss_itm, itm_accuracy, itc_accuracy
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Returns unit vectors of images in the shared space, `(B, E)`."""
        return self._features(pixel_values)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns unit vectors of captions in the shared space, `(B, E)`."""
        return self._features(input_ids, attention_mask)

    @torch.no_grad()
    def update_momentum_copies(self) -> None:
        """Updates the moving averages: `copy = m * copy + (1 - m) * model`."""
        pairs = list(self._momentum_parameters())
        copies = [copied for _, copied in pairs]
        models = [model.to(copied.dtype) for model, copied in pairs]
        torch._foreach_lerp_(copies, models, 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image_feats: Tensor, text_feats: Tensor, caption_ids: Tensor) -> None:
        """Overwrites the oldest slots of the ring buffers.

        Args:
            image_feats: `(N, E)` features of all ranks, in rank order.
            text_feats: `(N, E)` features of all ranks, in rank order.
            caption_ids: `(N,)` caption ids.
        """
        queue_size = self.image_queue.shape[1]
        # If there are more features than slots, the last ones are kept.
        dropped = max(0, len(caption_ids) - queue_size)
        offsets = torch.arange(dropped, len(caption_ids), device=self.ptr_queue.device)
        slots = (self.ptr_queue + offsets) % queue_size
        self.image_queue[:, slots] = image_feats[dropped:].T.to(self.image_queue.dtype)
        self.text_queue[:, slots] = text_feats[dropped:].T.to(self.text_queue.dtype)
        self.idx_queue[0, slots] = caption_ids[dropped:]
        self.ptr_queue.copy_((self.ptr_queue + len(caption_ids)) % queue_size)

    def _features(
        self, inputs: Tensor, attention_mask: Tensor | None = None, momentum: bool = False
    ) -> Tensor:
        suffix = _MOMENTUM_SUFFIX if momentum else ""
        if attention_mask is None:
            hidden = getattr(self, f"visual_encoder{suffix}")(inputs).last_hidden_state
            return self._project(getattr(self, f"vision_proj{suffix}"), hidden)
        hidden = getattr(self, f"text_encoder{suffix}")(inputs, attention_mask)
        return self._project(getattr(self, f"text_proj{suffix}"), hidden)

    def _positives(self, caption_ids: Tensor, all_ids: Tensor) -> Tensor:
        """Returns the mask of positives for each pair, `(B, N + Q)`."""
        rank, _ = rank_and_world_size()
        own = torch.arange(len(caption_ids), device=all_ids.device) + rank * len(caption_ids)
        positive = F.one_hot(own, len(all_ids)).bool()
        if self.positives == "same_caption_id":
            positive |= caption_ids[:, None] == all_ids[None]
        return positive

    @staticmethod
    def _project(projection: nn.Module, hidden_states: Tensor) -> Tensor:
        return F.normalize(projection(hidden_states[:, 0]).float(), dim=-1)

    def _match(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        sim_i2t: Tensor,
        sim_t2i: Tensor,
        positive: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Computes matching loss and accuracy with hard negatives for each image and each text.

        `sim_i2t`, `sim_t2i` and `positive` are `(B, N)`. Negatives are drawn with probabilities
        from the contrastive similarities.
        """
        batch_size = len(input_ids)
        rank, world_size = rank_and_world_size()
        input_ids = input_ids.clone()
        input_ids[:, 0] = self.enc_token_id
        own = torch.arange(batch_size, device=input_ids.device)
        if self.gather_negatives and world_size > 1:
            image_pool = all_gather_with_grad(image_embeds)
            ids_pool, mask_pool = _gather_texts(input_ids, attention_mask, self._pad_id)
            input_ids, attention_mask = (
                pool[rank * batch_size : (rank + 1) * batch_size] for pool in (ids_pool, mask_pool)
            )
        else:
            image_pool, ids_pool, mask_pool = image_embeds, input_ids, attention_mask
            columns = slice(rank * batch_size, (rank + 1) * batch_size)
            sim_i2t, sim_t2i, positive = (part[:, columns] for part in (sim_i2t, sim_t2i, positive))
        text_negative, text_found = hard_negatives(sim_i2t, positive)
        image_negative, image_found = hard_negatives(sim_t2i, positive)
        if image_pool is not image_embeds:
            # Keys and values are projected only for images that are used.
            image_pool = torch.cat([image_embeds, image_pool[image_negative]])
            image_negative = own + batch_size

        hidden_states = self.text_encoder(
            torch.cat([input_ids, input_ids, ids_pool[text_negative]]),
            torch.cat([attention_mask, attention_mask, mask_pool[text_negative]]),
            image_pool,
            torch.cat([own, image_negative, own]),
        )
        logits = self.itm_head(hidden_states[:, 0]).float()
        labels = torch.cat(
            [
                torch.ones_like(own),
                torch.where(image_found, 0, _IGNORED_LABEL),
                torch.where(text_found, 0, _IGNORED_LABEL),
            ]
        )
        counted = labels != _IGNORED_LABEL
        correct = (logits.argmax(dim=1) == labels)[counted].float().mean()
        return F.cross_entropy(logits, labels, ignore_index=_IGNORED_LABEL), correct

    @property
    def _pad_id(self) -> int:
        return self.text_encoder.config.pad_token_id or 0

    def _momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            yield getattr(self, name), getattr(self, name + _MOMENTUM_SUFFIX)

    def _momentum_parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        for model, copied in self._momentum_pairs():
            yield from zip(model.parameters(), copied.parameters(), strict=True)

    def _check_caption_ids(self, caption_ids: Tensor | None, like: Tensor) -> Tensor:
        if caption_ids is not None:
            return caption_ids
        if self.positives == "same_caption_id":
            raise ValueError(
                'caption_ids: positives="same_caption_id" needs one for every sample; '
                'give them, or set positives="same_sample"'
            )
        return torch.zeros(len(like), dtype=torch.long, device=like.device)

    @torch.no_grad()
    def _check_ranks(self, batch_size: int) -> None:
        """Checks that no rank would wait forever for another, without communicating every step."""
        _, world_size = rank_and_world_size()
        if world_size == 1:
            return
        if self._rank_batch_size is None:
            self._rank_batch_size = batch_size
            sizes = all_gather(torch.tensor([batch_size], device=self.ptr_queue.device)).tolist()
            if len(set(sizes)) > 1:
                raise ValueError(f"the ranks have batches of {sizes} pairs; expected equal sizes")
            for queue in (self.image_queue, self.text_queue, self.idx_queue, self.ptr_queue):
                torch.distributed.broadcast(queue, src=0)
        if batch_size != self._rank_batch_size:
            raise ValueError(
                f"batch of {batch_size} pairs after batches of {self._rank_batch_size}: several "
                "processes need equal batches in every step; set drop_last=True in the data loader"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves queues and momentum copies with the model, but keeps their dtype.

        In bfloat16, an update by `1 - momentum` would be smaller than the spacing of values, and
        the copies would never change.
        """
        before = [tensor.data for tensor in self._kept_tensors()]
        super()._apply(fn, recurse)
        for tensor, old in zip(self._kept_tensors(), before, strict=True):
            if tensor.dtype != old.dtype:
                tensor.data = old.to(tensor.device)
        return self

    def _kept_tensors(self) -> list[Tensor]:
        copies = [copied for _, copied in self._momentum_parameters()]
        return [self.image_queue, self.text_queue, *copies]


def _gather_texts(input_ids: Tensor, mask: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Gathers texts of all ranks, `(N, T)` each, padded to the longest text of all ranks."""
    length = torch.tensor([input_ids.shape[1]], device=input_ids.device)
    longest = int(all_gather(length).max())
    extra = (0, longest - input_ids.shape[1])
    return all_gather(F.pad(input_ids, extra, value=pad_id)), all_gather(F.pad(mask, extra))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, choices))}")
