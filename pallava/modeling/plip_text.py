"""Text encoder of PLIP pretraining: BERT with optional cross-attention to image tokens.

Shapes: B texts, T tokens, D hidden size, H heads, I images, P image tokens, V image width.

Parameter names follow the text encoders of ALBEF and BLIP, and thus `BlipTextModel` of
`transformers`. That model computes the same values, but has no fused attention and projects an
image again for every text that it is paired with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.activations import ACT2FN

from pathcore.files import StrPath
from pathcore.weights import check_loading_report, load_strict


class _Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer(
            "position_ids", torch.arange(config.max_position_embeddings).expand(1, -1)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + positions))


class _Projections(nn.Module):
    def __init__(self, config: BertConfig, source_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, source: Tensor, mask: Tensor | None, index: Tensor | None
    ) -> Tensor:
        """Attends from `(B, T, D)` to sources `(S, L, E)`; row i has source i, or `index[i]`."""
        query, key, value = self.query(hidden_states), self.key(source), self.value(source)
        if index is not None:  # after the projection, so that each image is projected once
            key, value = key[index], value[index]
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (query, key, value)
        )
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout
        )
        return context.transpose(1, 2).flatten(2)


class _Output(nn.Module):
    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig, source_size: int) -> None:
        super().__init__()
        self.self = _Projections(config, source_size)
        self.output = _Output(config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        source: Tensor,
        mask: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.output(self.self(hidden_states, source, mask, index), hidden_states)


class _Intermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))


class _Layer(nn.Module):
    def __init__(self, config: BertConfig, image_hidden_size: int) -> None:
        super().__init__()
        self.attention = _Attention(config, config.hidden_size)
        self.crossattention = _Attention(config, image_hidden_size)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, mask: Tensor, image: Tensor | None, index: Tensor | None
    ) -> Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, mask)
        if image is not None:
            hidden_states = self.crossattention(hidden_states, image, index=index)
        return self.output(self.intermediate(hidden_states), hidden_states)


class _Encoder(nn.Module):
    def __init__(self, config: BertConfig, image_hidden_size: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(config, image_hidden_size) for _ in range(config.num_hidden_layers)
        )


class PLIPTextEncoder(nn.Module):
    """BERT without segment embeddings and pooler, with cross-attention to images in every layer.

    Args:
        config: BERT config; `vocab_size` includes the added tokens.
        image_hidden_size: Width V of the image tokens.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `num_attention_heads`.

    Example:
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> encoder = PLIPTextEncoder(config, image_hidden_size=6)
        >>> ids = torch.tensor([[2, 5, 3]])
        >>> encoder(ids, torch.ones_like(ids), torch.zeros(1, 4, 6)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: BertConfig, image_hidden_size: int) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"text encoder: hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}"
            )
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config, image_hidden_size)
        self.apply(self._init_weights)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_embeds: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Encodes texts, alone or each together with an image.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, zero for padding.
            image_embeds: `(I, P, V)` image tokens; without them the cross-attention is skipped.
            image_index: `(B,)` index of each text's image. By default text i belongs to image i.

        Returns:
            Hidden states of the last layer, `(B, T, D)`.

        Raises:
            ValueError: If there are more tokens than positions.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the text encoder "
                f"{self.config.max_position_embeddings} positions; shorten the captions "
                "(max_length) or raise max_position_embeddings"
            )
        mask = attention_mask.bool()[:, None, None, :]
        hidden_states = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            hidden_states = layer(hidden_states, mask, image_embeds, image_index)
        return hidden_states

    @classmethod
    def from_bert(
        cls,
        name_or_path: StrPath,
        *,
        vocab_size: int,
        image_hidden_size: int,
        fold_segment: bool = True,
    ) -> PLIPTextEncoder:
        """Initialises from a pretrained BERT; cross-attention and added tokens keep random weights.

        Args:
            name_or_path: Folder, or name on the Hugging Face Hub.
            vocab_size: Number of tokens, including the added ones.
            image_hidden_size: Width V of the image tokens.
            fold_segment: Whether to add BERT's embedding of segment 0 to the position embeddings.
                BERT adds it to every token of a single text; False drops it, as the original code
                does.

        Raises:
            CheckpointError: If weights are missing or do not fit.
            ValueError: If `vocab_size` is smaller than BERT's.
        """
        from transformers import BertModel

        bert, report = BertModel.from_pretrained(
            name_or_path, add_pooling_layer=False, output_loading_info=True
        )
        check_loading_report(report, bert, what="text encoder", source=name_or_path)
        config = BertConfig(**(bert.config.to_dict() | {"vocab_size": vocab_size}))
        encoder = cls(config, image_hidden_size)
        weights = bert.state_dict()
        segment = weights.pop("embeddings.token_type_embeddings.weight")[0]
        if fold_segment:
            weights["embeddings.position_embeddings.weight"] += segment
        own = encoder.state_dict()
        known = weights["embeddings.word_embeddings.weight"]
        if len(known) > vocab_size:
            raise ValueError(
                f"{name_or_path}: {len(known)} tokens in the BERT, {vocab_size} in the tokenizer; "
                "use the tokenizer of the same folder"
            )
        added = own["embeddings.word_embeddings.weight"][len(known) :]
        weights["embeddings.word_embeddings.weight"] = torch.cat([known, added])
        for name, tensor in own.items():
            if ".crossattention." in name or name == "embeddings.position_ids":
                weights[name] = tensor
        weights.pop("embeddings.token_type_ids", None)
        load_strict(encoder, weights, what="text encoder", source=str(name_or_path))
        return encoder

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises weights as BERT does (arXiv:1810.04805, github.com/google-research/bert)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
            padding = getattr(module, "padding_idx", None)
            if padding is not None:
                nn.init.zeros_(module.weight[padding])
