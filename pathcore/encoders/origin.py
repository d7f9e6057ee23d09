"""Which tiles features were computed from, and by which encoder, as features files state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcore.encoders.presets import known_encoder

if TYPE_CHECKING:
    import h5py

_DATASETS = ("features", "feats", "coords")
_MPP_TOLERANCE = 0.02  # relative; scanners state 0.4991 or 0.503 for what is called 0.5


@dataclass(frozen=True)
class TileOrigin:
    """Tiles that features were computed from, and the encoder that computed them.

    Attributes:
        encoder: Name for `pathcore.encoders`; empty if unknown.
        patch_px: Side of a tile in pixels, as the encoder receives it; 0 if unknown.
        mpp: Micrometres per pixel of a tile; 0 if unknown.
        digest: SHA-256 of the encoder's weights; empty if unknown.
        stated: Names of the fields that the user stated because the file does not.
    """

    encoder: str = ""
    patch_px: int = 0
    mpp: float = 0.0
    digest: str = ""
    stated: tuple[str, ...] = ()

    def __str__(self) -> str:
        px = self.patch_px or "an unknown number of"
        mpp = f"{self.mpp:g}" if self.mpp else "an unknown number of"
        return f"{self.encoder or 'an unknown encoder'}, {px} px at {mpp} µm per pixel"

    @classmethod
    def read(cls, attributes: Mapping[str, Any]) -> TileOrigin:
        """Reads the attributes of a features file; names of unknown encoders are kept."""
        written = attributes.get("encoder_name") or attributes.get("encoder", "")
        name = str(written).partition("@")[0]
        if name == "prov-gigapath-flash":  # the folder of the published weights
            name = "gigapath-flash"
        name = known_encoder(name) or name
        is_scaled = "patch_size_level0" in attributes or "target_magnification" in attributes
        if name == "ctranspath" and is_scaled and "mpp_level0" not in attributes:
            name = "chief-ctp"  # TRIDENT loads CHIEF's weights under this name
        # CLAM's patch_size counts pixels of a level, before scaling.
        px = attributes.get("patch_px") or (is_scaled and attributes.get("patch_size")) or 0
        digest = str(attributes.get("encoder_digest", attributes.get("weights_sha256", "")))
        # select-patches writes the description of its encoder as JSON, in quotes.
        return cls(name, round(float(px)), stated_mpp(attributes), digest.strip('"'))

    @property
    def unknown(self) -> list[str]:
        """Names of the facts that are unknown."""
        return [name for name in ("encoder", "patch_px", "mpp") if not getattr(self, name)]

    def fits_mpp(self, mpp: float) -> bool:
        """Returns whether the tiles have this resolution; True if one of them is unknown."""
        return not (self.mpp and mpp) or abs(self.mpp / mpp - 1) <= _MPP_TOLERANCE


def feature_attributes(file: h5py.File) -> dict[str, Any]:
    """Returns the attributes of a features file and of its datasets, as Python values.

    TRIDENT names the encoder at the features, and describes the patches at the coordinates, which
    take precedence. h5py gives some attributes as arrays or bytes, depending on who wrote them.
    """
    holders = [file, *(file[name] for name in _DATASETS if name in file)]
    return {name: _plain(value) for holder in holders for name, value in holder.attrs.items()}


def _plain(value: Any) -> Any:
    value = (
        value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    )
    return value.decode() if isinstance(value, bytes) else value


def stated_mpp(attributes: Mapping[str, Any]) -> float:
    """Returns the micrometres per pixel of a file's tiles, 0 if unknown; TRIDENT's 10x is 1 µm."""
    magnification = float(attributes.get("target_magnification") or 0)
    return float(attributes.get("mpp") or (10 / magnification if magnification else 0))
