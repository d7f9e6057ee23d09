"""Image towers of CTransPath and KEEP, which no library provides, built from timm's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def uninitialised(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network without initialising its weights, if possible, on the meta device.

    Initialising a billion parameters that are overwritten anyway takes half a minute and twice the
    memory. Buffers that checkpoints do not contain, such as the relative positions of a Swin, must
    be computed; a network with such buffers is built normally.
    """
    with torch.device("meta"):
        network = build()
    stored = network.state_dict()
    return network if all(name in stored for name, _ in network.named_buffers()) else build()


class ConvStem(nn.Module):
    """Patch embedding of CTransPath: three convolutions instead of one.

    Two 3x3 convolutions of stride 2, each with batch norm and ReLU, then a 1x1 convolution
    (Wang et al. 2022, doi:10.1016/j.media.2022.102559, section 3.2).

    Args:
        img_size: Side of the images in pixels.
        patch_size: Must be 4.
        in_chans: Number of input channels.
        embed_dim: Number of output channels.
        norm_layer: Norm of the output.
        **_: Further arguments of timm's patch embedding, ignored.

    Example:
        >>> ConvStem(embed_dim=96)(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 56, 56, 96])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"ConvStem: patch_size {patch_size}, expected 4")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        first, second = embed_dim // 8, embed_dim // 4
        # The order gives the published names: convolutions 0, 3 and 6, batch norms 1 and 4.
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, in_chans, H, W)` to `(batch, H / 4, W / 4, embed_dim)`."""
        # Channels last, as timm's Swin expects.
        features: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return features


def ctranspath(**arguments: Any) -> nn.Module:
    """Builds CTransPath: a Swin-T whose patch embedding is a `ConvStem`.

    timm 0.9 moved each downsampling layer to the next stage; its filter renames the published
    tensors, so the authors' fork of timm 0.5.4 is not needed.

    Args:
        **arguments: Arguments of timm's `SwinTransformer` that override those of Swin-T.
    """
    import timm

    settings = {"num_classes": 0, "embed_layer": ConvStem, **arguments}
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, **settings
    )
    return model


class KeepImageTower(nn.Module):
    """Image tower of KEEP: a ViT-L/16 with a two-layer head and normalised output.

    Args:
        **arguments: Arguments of timm's `vit_large_patch16_224` that override those of KEEP, and
            `projection_dim`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        import timm

        projected = self.num_features = int(arguments.pop("projection_dim", 768))
        settings = {"num_classes": 0, "init_values": 1e-5, "dynamic_img_size": True, **arguments}
        self.visual = timm.create_model("vit_large_patch16_224", pretrained=False, **settings)
        self.visual_head = nn.Sequential(
            nn.Linear(self.visual.num_features, projected),
            nn.GELU(),
            nn.Linear(projected, projected),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, 3, height, width)` to `(batch, projection_dim)` of unit length."""
        return nn.functional.normalize(self.visual_head(self.visual(x)), dim=-1)


NETWORKS = {"ctranspath": ctranspath, "keep": KeepImageTower}
"""Constructor by the `architecture` of a preset."""
