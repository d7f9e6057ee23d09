"""BACH (ICIAR 2018, arXiv:1808.04277): four classes of breast tissue."""

from __future__ import annotations

from pallava.converters.class_sets import ClassConversion, class_conversion
from pallava.registry import CONVERTERS
from pathcore.files import StrPath
from pathcore.image_sets import load_image_set


@CONVERTERS.register("bach")
def bach(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    classes: str = "bach",
) -> ClassConversion:
    """Converts BACH to class folders.

    Args:
        data_path: Folder of the unpacked archive, with `Photos/Normal`, `Benign`, `InSitu` and
            `Invasive`.
        image_folder: Unused; the class config locates the images.
        classes: Alternative class config, for an archive with another layout.
    """
    return class_conversion("BACH", "CC-BY-NC-ND", load_image_set(classes, "question"), data_path)
