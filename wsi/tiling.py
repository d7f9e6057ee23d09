"""Places patches on a slide in a regular grid and keeps those with enough tissue."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi.reader import MAX_SIDE_PX, Region, Slide, SlideError
from wsi.tissue import TissueMask

_ENLARGEMENT = 1.05
"""Factor by which a slide may be coarser than requested, since scanners of the same magnification
differ in resolution."""


@dataclass(frozen=True)
class PatchSpec:
    """Size, resolution and selection of patches.

    Attributes:
        patch_px: Side of a patch in pixels at `mpp`.
        mpp: Micrometres per pixel of the patches.
        overlap_px: Overlap of neighbouring patches in pixels at `mpp`.
        min_tissue: Minimum fraction of tissue in a patch.
        over_edge: Whether to keep patches that extend beyond the edge; they are white outside.
    """

    patch_px: int
    mpp: float
    overlap_px: int = 0
    min_tissue: float = 0.5
    over_edge: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.patch_px <= MAX_SIDE_PX:
            raise ValueError(f"patch_px: expected 1 to {MAX_SIDE_PX}, found {self.patch_px}")
        if not 0 < self.mpp < 1000:
            raise ValueError(f"mpp: expected a positive number of micrometres, found {self.mpp}")
        if not 0 <= self.overlap_px < self.patch_px:
            raise ValueError(
                f"overlap_px: expected 0 to {self.patch_px - 1}, found {self.overlap_px}"
            )
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(
                f"min_tissue: expected a fraction from 0 to 1, found {self.min_tissue}"
            )

    def to_level0(self, length_px: int, slide: Slide) -> int:
        """Converts a length at `mpp` to level-0 pixels of a slide.

        Raises:
            ValueError: If the slide is coarser than `mpp`, so that patches would be enlarged.
            ResolutionError: If the resolution of the slide is unknown.
        """
        if slide.mpp > self.mpp * _ENLARGEMENT:
            raise ValueError(
                f"{slide.path.name}: its pixels span {slide.mpp:g} micrometres, {self.mpp:g} were "
                f"asked for: patches would be enlarged. Ask for --mpp {slide.mpp:g} or more"
            )
        return max(1, round(length_px * self.mpp / slide.mpp))


@dataclass(frozen=True)
class Tiling:
    """The patches of a slide.

    Attributes:
        coords: int64 `(N, 2)`, left and top in level-0 pixels, row by row.
        size_level0: Side of a patch in level-0 pixels.
        spec: The specification that they fulfil.
        damaged: Left, top and error of each patch with enough tissue that cannot be read.
    """

    coords: NDArray[np.int64]
    size_level0: int
    spec: PatchSpec
    damaged: list[tuple[int, int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.coords)


def tile(
    slide: Slide,
    spec: PatchSpec,
    mask: TissueMask | None = None,
    *,
    damaged: NDArray[np.bool_] | None = None,
) -> Tiling:
    """Places a grid on a slide and keeps the patches with enough tissue.

    Args:
        slide: The slide.
        spec: Size, resolution, overlap and minimum tissue of the patches.
        mask: Tissue of the slide; by default every patch is kept.
        damaged: bool `(height, width)`, true where an overview of the slide could not be read; by
            default that of the mask. Patches there are read to find out which ones are damaged.

    Raises:
        ResolutionError: If the resolution of the slide is unknown.
        ValueError: If the slide is coarser than the requested resolution.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> file = Path(tempfile.mkdtemp()) / "slide.png"
        >>> Image.new("RGB", (700, 520)).save(file)
        >>> with Slide(file, mpp=0.25) as slide:
        ...     tiling = tile(slide, PatchSpec(patch_px=128, mpp=0.5))
        >>> tiling.size_level0, tiling.coords.tolist()
        (256, [[0, 0], [256, 0], [0, 256], [256, 256]])
    """
    size = spec.to_level0(spec.patch_px, slide)
    step = max(1, spec.to_level0(spec.patch_px - spec.overlap_px, slide))
    ends = [length if spec.over_edge else length - size + 1 for length in slide.dimensions]
    columns, rows = (np.arange(0, max(end, 0), step, dtype=np.int64) for end in ends)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    coords = np.stack([x.ravel(), y.ravel()], 1)
    if mask is not None and len(coords):
        fractions = mask.fractions(coords, size)
        # `min_tissue` 0 means any amount of tissue, not none.
        coords = coords[(fractions >= spec.min_tissue) & (fractions > 0)]
    if damaged is None and mask is not None:
        damaged = mask.damaged
    if damaged is None or not damaged.any() or not len(coords):
        return Tiling(coords, size, spec)
    # The overview locates damage only roughly, and may use another level than the patches.
    suspect = np.flatnonzero(TissueMask(damaged, slide.dimensions).fractions(coords, size) > 0)
    regions = [Region(int(x), int(y), size, spec.patch_px) for x, y in coords[suspect]]
    faults = {
        int(index): str(pixels)
        for index, pixels in zip(suspect, slide.read_many(regions), strict=True)
        if isinstance(pixels, SlideError)
    }
    lost = [(int(coords[n, 0]), int(coords[n, 1]), fault) for n, fault in faults.items()]
    return Tiling(np.delete(coords, list(faults), axis=0), size, spec, lost)
