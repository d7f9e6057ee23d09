"""Sizes and mode of the scale-invariant connector, stated or read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pallava.modeling.checkpoint import CheckpointError

_LAYER = "model.bert.encoder.layer."
_BERT_HEAD_WIDTH = 64


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of the connector; the defaults are those of the released weights.

    Args:
        visual_hidden_size: Width D of the visual tokens.
        llm_hidden_size: Width L of the language model.
        num_hidden_layers: Depth of the stack.
        num_attention_heads: Heads of every attention; not visible in a checkpoint's shapes.
        intermediate_size: Width of the feed-forward part.
        cross_attention: True for the connector of the paper, False for released mode.
        cross_attention_freq: Every how many layers the sub-images are attended to.
        depth: Linear layers of the final projection, GELU between them.
        hidden_dropout_prob: Dropout behind every dense layer.
        attention_probs_dropout_prob: Dropout of attention weights. The original trains with 0.1;
            0 lets SDPA run without keeping the weights (a third of the memory on CPU).
        layer_norm_eps: Epsilon of every LayerNorm, BERT's.

    Raises:
        ValueError: Sizes that do not fit each other.
    """

    visual_hidden_size: int = 768
    llm_hidden_size: int = 4096
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention: bool = True
    cross_attention_freq: int = 1
    depth: int = 1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "cross_attention_freq", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"connector {name}: at least 1 expected, got {getattr(self, name)}"
                )
        if self.visual_hidden_size % self.num_attention_heads:
            raise ValueError(
                f"connector visual_hidden_size {self.visual_hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, num_attention_heads: int | None = None
    ) -> ConnectorConfig:
        """Reads the sizes and the mode from a connector checkpoint's names and shapes.

        Args:
            state_dict: Names without the prefix `projector.`.
            num_attention_heads: Not visible in the shapes; by default BERT's 64 channels a head,
                which gives the 12 heads of the released weights.

        Raises:
            CheckpointError: These are not the tensors of a connector.
        """
        layers = {_layer_index(name) for name in state_dict if name.startswith(_LAYER)}
        try:
            width, ffn = (
                state_dict[f"{_LAYER}0.intermediate_query.dense.weight"].shape[dim]
                for dim in (1, 0)
            )
            projections = [n for n in state_dict if n.startswith("model.mlp.model.")]
            llm_hidden_size = state_dict["model.mlp.model.0.weight"].shape[0]
        except KeyError as error:
            raise CheckpointError(
                f"no connector checkpoint: {error} is missing; found "
                f"{', '.join(sorted(state_dict)[:5])} ..."
            ) from error
        crossed = sorted({_layer_index(n) for n in state_dict if ".crossattention." in n})
        frequency = len(layers) if crossed else 1  # a single one: no second within the depth
        if len(crossed) > 1:
            frequency = crossed[1] - crossed[0]
        return cls(
            visual_hidden_size=width,
            llm_hidden_size=llm_hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=num_attention_heads or max(1, width // _BERT_HEAD_WIDTH),
            intermediate_size=ffn,
            cross_attention=bool(crossed),
            cross_attention_freq=frequency,
            depth=len(projections) // 2,
        )


def _layer_index(name: str) -> int:
    return int(name.removeprefix(_LAYER).split(".", 1)[0])
