"""PA-LLaVA's image path in a straightforward implementation, with layers of Hugging Face.

It behaves like the published code: every sub-image and, as padding, copies of the last one go
through all layers of the encoder; a hook makes the encoder's input require a gradient, so that the
frozen encoder keeps a graph and runs a backward pass; layers use re-entrant checkpointing;
attention is eager, and padding is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.models.bert.modeling_bert import BertLayer

from pallava.modeling.plip import PUBLISHED_TO_HF, PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector


class StraightforwardEncoder(nn.Module):
    """Hugging Face's CLIP vision tower with our weights, frozen but with a graph."""

    def __init__(self, encoder: PLIPVisionEncoder) -> None:
        super().__init__()
        config = CLIPVisionConfig(**encoder.config.to_dict(), attn_implementation="eager")
        self.clip = CLIPVisionModel(config)
        self.clip.load_state_dict(_hugging_face_names(encoder.state_dict()))
        self.clip.requires_grad_(False)
        self.clip.gradient_checkpointing_enable({"use_reentrant": True})
        self.clip.vision_model.embeddings.register_forward_hook(_require_gradient)

    def forward(self, stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes stacks `(1 + num_sub_images, 3, S, S)`.

        Returns:
            Thumbnails `(B, T, D)`, sub-images `(B, longest, T, D)`, and a mask `(B, longest)` that
            is False for the copies.
        """
        counts = [len(stack) - 1 for stack in stacks]
        longest = max(counts)
        padded = [
            torch.cat([stack, stack[-1:].expand(longest - count, -1, -1, -1)])
            for stack, count in zip(stacks, counts, strict=True)
        ]
        hidden_states = self.clip(torch.cat(padded), output_hidden_states=True).hidden_states
        features = hidden_states[-2][:, 1:].unflatten(0, (len(stacks), -1))
        return features[:, 0], features[:, 1:], visible_sub_images(counts)


class StraightforwardConnector(nn.Module):
    """A stack of Hugging Face's BERT layers with the weights of our connector.

    Args:
        connector: Connector whose weights to use; its mode determines the cross-attention.
        attention: `eager` as in the original, or `sdpa`.
        attention_dropout: Dropout of attention weights; the original trains with 0.1.
        checkpointing: Whether to use re-entrant checkpointing.
    """

    def __init__(
        self,
        connector: ScaleInvariantConnector,
        attention: str = "eager",
        attention_dropout: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = connector.config
        self.checkpointing = checkpointing
        bert = _bert_config(connector.config, attention, attention_dropout)
        self.layers = nn.ModuleList()
        for ours in connector.model.bert.encoder.layer:
            layer = BertLayer(bert)
            layer.load_state_dict(_bert_names(ours.state_dict()))
            self.layers.append(layer)
        # Modules that both sides share; they are not part of the comparison.
        self.norm, self.mlp = connector.model.norm, connector.model.mlp.model

    def forward(self, thumbnails: Tensor, sub_images: Tensor, visible: Tensor) -> Tensor:
        """Connects `(B, T, D)` thumbnails and `(B, longest, T, D)` sub-images to `(B, T, L)`."""
        config = self.config
        states = F.layer_norm(thumbnails, thumbnails.shape[-1:], eps=config.layer_norm_eps)
        states = F.dropout(states, config.hidden_dropout_prob, self.training)
        keys = mask = None
        if config.cross_attention:
            keys = sub_images.flatten(1, 2)
            shown = visible.repeat_interleave(thumbnails.shape[1], dim=1)[:, None, None]
            lowest = torch.finfo(states.dtype).min
            mask = torch.zeros(shown.shape, dtype=states.dtype).masked_fill(~shown, lowest)
            mask = mask.expand(-1, -1, thumbnails.shape[1], -1)
        for layer in self.layers:
            arguments = (states, None, None, keys, mask)
            if self.checkpointing and self.training:
                states = checkpoint(layer, *arguments, use_reentrant=True)[0]
            else:
                states = layer(*arguments)[0]
        return self.mlp(self.norm(states + thumbnails))


def visible_sub_images(counts: Sequence[int]) -> Tensor:
    """Returns `(B, longest)`, True for sub-images and False for padding."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def pad_sub_images(sub_images: Tensor, counts: Sequence[int]) -> Tensor:
    """Pads packed features `(N, T, D)` to `(B, longest, T, D)` with copies of the last one."""
    longest = max(counts)
    return torch.stack(
        [
            torch.cat([piece, piece[-1:].expand(longest - len(piece), -1, -1)])
            for piece in sub_images.split(list(counts))
        ]
    )


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del module, inputs
    output.requires_grad_(True)


def _hugging_face_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        for ours, theirs in PUBLISHED_TO_HF.items():
            name = name.replace(ours, theirs)
        if not name.endswith("position_ids"):
            renamed[name] = tensor
    return renamed


def _bert_config(config: ConnectorConfig, attention: str, dropout: float) -> BertConfig:
    return BertConfig(
        hidden_size=config.visual_hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=dropout,
        layer_norm_eps=config.layer_norm_eps,
        is_decoder=config.cross_attention,
        add_cross_attention=config.cross_attention,
        attn_implementation=attention,
    )


def _bert_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("intermediate_query", "intermediate").replace("output_query", "output"): tensor
        for name, tensor in state_dict.items()
    }
