"""OSCC (doi:10.17632/ftmp4cvtmb): normal oral epithelium or squamous cell carcinoma."""

from __future__ import annotations

from pallava.converters.class_sets import ClassConversion, class_conversion
from pallava.registry import CONVERTERS
from pathcore.files import StrPath
from pathcore.image_sets import load_image_set


@CONVERTERS.register("oscc")
def oscc(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    classes: str = "oscc",
) -> ClassConversion:
    """Converts OSCC to class folders.

    Args:
        data_path: Folder of the unpacked archive, with its first and second set.
        image_folder: Unused; the class config locates the images.
        classes: Alternative class config, for an archive with another layout.
    """
    return class_conversion("OSCC", "CC-BY-4.0", load_image_set(classes, "question"), data_path)
