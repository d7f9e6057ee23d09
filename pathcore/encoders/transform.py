"""Image transforms as data, which can be printed, stored and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_PILLOW_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class TransformError(ValueError):
    """Raised if the description of a transform is incomplete or not supported."""


@dataclass(frozen=True)
class Transform:
    """Resizes, crops and normalises an RGB image, as torchvision does with Pillow images.

    Attributes:
        resize_px: Length of the shorter side, or `(height, width)`, which changes the aspect ratio.
            None keeps the size.
        crop_px: Side of the centre crop in pixels; None does not crop.
        interpolation: `bilinear`, `bicubic`, `nearest` or `lanczos`, with antialiasing.
        mean: Mean of each channel, on a scale from 0 to 1.
        std: Standard deviation of each channel.

    Example:
        >>> from PIL import Image
        >>> transform = Transform(224, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> tuple(transform(Image.new("RGB", (256, 300))).shape)
        (3, 224, 224)
        >>> transform.to_dict()["resize_px"]
        224
    """

    resize_px: int | tuple[int, int] | None
    crop_px: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise TransformError(
                f"transform: interpolation {self.interpolation!r}, expected one of "
                f"{', '.join(_INTERPOLATIONS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise TransformError(
                f"transform: mean {self.mean} and std {self.std}, expected three numbers each, "
                "and positive deviations"
            )

    @property
    def output_px(self) -> int | None:
        """Side of the resulting square images; None if the size depends on the input."""
        if self.crop_px is not None:
            return self.crop_px
        if isinstance(self.resize_px, tuple):
            return self.resize_px[0] if self.resize_px[0] == self.resize_px[1] else None
        return self.resize_px

    def __call__(self, image: Image) -> Tensor:
        """Maps an image of any mode to float32 `(3, height, width)`."""
        from torchvision.transforms.functional import pil_to_tensor

        return self.normalise(pil_to_tensor(self.resize(image)))

    def resize(self, image: Image) -> Image:
        """Returns the image resized and cropped, converted to RGB as `pathcore.images` does."""
        from pathcore.rgb import to_rgb  # imports Pillow, which presets do not need

        resized: Image = self._compiled(to_rgb(image))
        return resized

    def normalise(self, pixels: Tensor) -> Tensor:
        """Maps resized pixels `(..., 3, height, width)`, uint8, to float32 as torchvision does."""
        values = pixels.float().div_(255)
        mean, std = (values.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return values.sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        fields = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Transform:
        """Builds a transform from the result of `to_dict`, or from the `transform` of a preset.

        Raises:
            TransformError: If a field is missing, unknown or of the wrong type.
        """
        known = {"resize_px", "crop_px", "interpolation", "mean", "std"}
        if missing := known - set(fields):
            raise TransformError(f"transform: {', '.join(sorted(missing))} missing")
        if unknown := set(fields) - known:
            raise TransformError(f"transform: {', '.join(sorted(unknown))} not known")
        resize = fields["resize_px"]
        try:
            return cls(
                (int(resize[0]), int(resize[1])) if isinstance(resize, (list, tuple)) else resize,
                fields["crop_px"],
                fields["interpolation"],
                tuple(map(float, fields["mean"])),  # type: ignore[arg-type]
                tuple(map(float, fields["std"])),  # type: ignore[arg-type]
            )
        except (TypeError, IndexError, ValueError) as error:
            raise TransformError(f"transform {dict(fields)}: {error}") from error

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping[str, Any], *, source: str) -> Transform:
        """Builds the evaluation transform of `timm.data.create_transform` from a `pretrained_cfg`.

        Args:
            pretrained_cfg: Mapping with `input_size`, `mean`, `std` and `interpolation`, and
                optionally `crop_pct` and `crop_mode`.
            source: Origin of the config, for error messages.

        Raises:
            TransformError: If a field is missing, images are not square, or the crop mode is
                neither `center` nor `squash`.

        Example:
            >>> config = dict(
            ...     input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3,
            ...     interpolation="bicubic", crop_pct=0.9,
            ... )
            >>> Transform.from_timm(config, source="example").resize_px
            248
        """
        needed = ("input_size", "mean", "std", "interpolation")
        if missing := [name for name in needed if not pretrained_cfg.get(name)]:
            raise TransformError(
                f"{source}: pretrained_cfg lacks {', '.join(missing)}, so the images that the "
                "model expects are not known"
            )
        _, height, width = pretrained_cfg["input_size"]
        mode = pretrained_cfg.get("crop_mode") or "center"
        if height != width or mode not in ("center", "squash"):
            raise TransformError(
                f"{source}: input_size {pretrained_cfg['input_size']} with crop_mode {mode!r}, "
                "expected square images with crop_mode center or squash"
            )
        # timm resizes to floor(input size / crop_pct); the default of crop_pct, 0.875, also applies
        # if the config has 0.
        crop_pct = float(pretrained_cfg.get("crop_pct") or 0.875)
        scaled = int(height / crop_pct)
        return cls.from_dict(
            {
                "resize_px": [scaled, scaled] if mode == "squash" else scaled,
                "crop_px": int(height),
                "interpolation": pretrained_cfg["interpolation"],
                "mean": pretrained_cfg["mean"],
                "std": pretrained_cfg["std"],
            }
        )

    @classmethod
    def from_open_clip(cls, preprocess_cfg: Mapping[str, Any], *, source: str) -> Transform:
        """Builds the evaluation transform of open_clip from a `preprocess_cfg`.

        Raises:
            TransformError: If a field is missing, images are not square, or the resize mode is
                `longest`, which pads.
        """
        size, mode = preprocess_cfg.get("size"), preprocess_cfg.get("resize_mode") or "shortest"
        side = size[0] if isinstance(size, (tuple, list)) else size
        square = not isinstance(size, (tuple, list)) or size[0] == size[1]
        if side is None or not square or mode not in ("shortest", "squash"):
            raise TransformError(
                f"{source}: preprocess_cfg with size {size} and resize_mode {mode!r}, expected "
                "square images with resize_mode shortest or squash"
            )
        return cls.from_dict(
            {
                "resize_px": [side, side] if mode == "squash" else side,
                "crop_px": None if mode == "squash" else side,
                "interpolation": preprocess_cfg.get("interpolation") or "bicubic",
                "mean": preprocess_cfg.get("mean"),
                "std": preprocess_cfg.get("std"),
            }
        )

    @classmethod
    def from_hugging_face(cls, processor: Mapping[str, Any], *, source: str) -> Transform:
        """Builds a transform from the fields of a `preprocessor_config.json`.

        Raises:
            TransformError: If the config does not normalise, or has unsupported steps.
        """
        if not processor.get("do_normalize", True) or not processor.get("image_mean"):
            raise TransformError(
                f"{source}: no image_mean and image_std, so the images that the model expects "
                "are not known"
            )
        if not processor.get("do_rescale", True) or not _is_1_of_255(processor):
            raise TransformError(
                f"{source}: rescale_factor {processor.get('rescale_factor')}, expected 1/255"
            )
        size = processor.get("size") if processor.get("do_resize", True) else None
        crop = processor.get("crop_size") if processor.get("do_center_crop", False) else None
        if isinstance(size, Mapping):
            resize: Any = size.get("shortest_edge") or [size.get("height"), size.get("width")]
        else:  # a number before transformers 4.27: the shorter side if a crop follows, else both
            resize = size if crop is not None or size is None else [size, size]
        if isinstance(crop, Mapping):
            if crop.get("height") != crop.get("width"):
                raise TransformError(f"{source}: crop_size {dict(crop)}, expected a square")
            crop = crop.get("height")
        kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
        if kind.startswith("ConvNext") and resize is not None:
            # It resizes and crops by itself, below 384 px as timm does and above without a crop.
            side = resize[0] if isinstance(resize, list) else resize
            scaled = int(side / (processor.get("crop_pct") or 224 / 256))
            resize, crop = (scaled, side) if side < 384 else ([side, side], None)
        resample = processor.get("resample", 3)
        if resample not in _PILLOW_FILTERS:
            raise TransformError(
                f"{source}: resample {resample}, expected one of {sorted(_PILLOW_FILTERS)}"
            )
        return cls.from_dict(
            {
                "resize_px": resize,
                "crop_px": crop,
                "interpolation": _PILLOW_FILTERS[resample],
                "mean": processor["image_mean"],
                "std": processor.get("image_std"),
            }
        )

    @cached_property
    def _compiled(self) -> Any:
        from torchvision import transforms  # imports torch, which presets do not need

        mode = transforms.InterpolationMode(self.interpolation)
        steps: list[Any] = []
        if self.resize_px is not None:
            steps.append(transforms.Resize(self.resize_px, interpolation=mode))
        if self.crop_px is not None:
            steps.append(transforms.CenterCrop(self.crop_px))
        return transforms.Compose(steps)


def _is_1_of_255(processor: Mapping[str, Any]) -> bool:
    return abs(float(processor.get("rescale_factor") or 1 / 255) - 1 / 255) < 1e-6
