"""Patch tokens of any layer of a plain vision transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathcore.encoders.towers import CLIP_TYPES, VISION_TYPES, EncoderError, Tower


class PatchTokens:
    """Returns the patch tokens of a vision transformer, without class and register tokens.

    Args:
        tower: A vision transformer of timm, open_clip or transformers.

    Attributes:
        hidden_size: Width of the tokens.
        num_heads: Number of attention heads.
        num_layers: Number of blocks.
        patch_px: Side of a patch in pixels.

    Raises:
        EncoderError: If the network has no patch tokens, like a ResNet or Swin.
    """

    def __init__(self, tower: Tower) -> None:
        module: Any = tower.module
        self.module = module
        library = tower.description.get("library")
        if library == "timm" and hasattr(module, "num_prefix_tokens") and hasattr(module, "blocks"):
            self.hidden_size, self.num_layers = int(module.embed_dim), len(module.blocks)
            self.num_heads = int(module.blocks[0].attn.num_heads)
            self.patch_px = int(module.patch_embed.patch_size[0])
            self._read = self._of_timm
        elif library == "open_clip" and hasattr(module, "transformer"):
            blocks = module.transformer.resblocks
            self.hidden_size, self.num_layers = int(module.conv1.out_channels), len(blocks)
            self.num_heads = int(blocks[0].attn.num_heads)
            self.patch_px = int(module.patch_size[0])
            self._read = self._of_open_clip
        elif library == "transformers" and module.config.model_type in VISION_TYPES:
            config = module.config
            self.hidden_size, self.num_layers = int(config.hidden_size), config.num_hidden_layers
            self.num_heads = int(config.num_attention_heads)
            self.patch_px = int(config.patch_size)
            self.num_prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
            self.num_prefix += config.model_type == "deit"
            self._read = self._of_transformers
        else:
            raise EncoderError(
                f"{type(module).__name__} has no patch tokens; expected a vision transformer of "
                "timm, open_clip or transformers, such as virchow2, uni2-h or plip"
            )

    def __call__(self, pixel_values: Tensor, select_layer: int = -2) -> Tensor:
        """Returns the patch tokens of a layer, without the final norm of the network.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            select_layer: Index into the `num_layers + 1` hidden states; 0 is the input of the
                first block, -1 the output of the last.

        Returns:
            `(batch, num_patches, hidden_size)`.

        Raises:
            ValueError: If the layer does not exist.
        """
        num_states = self.num_layers + 1
        if not -num_states <= select_layer < num_states:
            raise ValueError(
                f"select_layer {select_layer}: the encoder has hidden states "
                f"{-num_states}..{num_states - 1}"
            )
        tokens: Tensor = self._read(pixel_values, select_layer % num_states)
        return tokens

    def _of_timm(self, pixel_values: Tensor, state: int) -> Tensor:
        module = self.module
        tokens = module.norm_pre(
            module.patch_drop(module._pos_embed(module.patch_embed(pixel_values)))
        )
        for block in module.blocks[:state]:
            tokens = block(tokens)
        return tokens[:, module.num_prefix_tokens :]

    def _of_open_clip(self, pixel_values: Tensor, state: int) -> Tensor:
        tokens = self.module._embeds(pixel_values)
        for block in self.module.transformer.resblocks[:state]:
            tokens = block(tokens)
        return tokens[:, 1:]

    def _of_transformers(self, pixel_values: Tensor, state: int) -> Tensor:
        if self.module.config.model_type in CLIP_TYPES:
            tower = self.module.vision_model
            tokens = tower.pre_layrnorm(tower.embeddings(pixel_values))
            for layer in tower.encoder.layers[:state]:
                tokens = layer(tokens, None, None)[0]
            return tokens[:, self.num_prefix :]
        tokens = self.module.embeddings(pixel_values)
        for layer in self.module.encoder.layer[:state]:
            found = layer(tokens)
            tokens = found[0] if isinstance(found, tuple) else found
        return tokens[:, self.num_prefix :]
