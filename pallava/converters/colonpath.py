"""ColonPath (MedFMC, doi:10.1038/s41597-023-02460-0): colon tissue with or without tumour.

Published as `colon/colon_train.csv` and `colon_val.csv` with columns `img_id, study_id, tumor`,
beside a folder of images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pallava.converters.class_sets import ClassConversion, class_conversion
from pallava.registry import CONVERTERS
from pathcore.files import StrPath
from pathcore.image_sets import load_image_set

TABLES = ("colon_train.csv", "colon_val.csv", "colon_test.csv")
IMAGE_FOLDERS = ("images", "image")


@CONVERTERS.register("colonpath")
def colonpath(
    data_path: StrPath,
    image_folder: StrPath | None = None,
    *,
    classes: str = "colonpath",
) -> ClassConversion:
    """Converts ColonPath to class folders.

    Args:
        data_path: Folder `colon` of the archive, or one of its CSV files.
        image_folder: Image folder. Defaults to `images/` or `image/` beside the CSV.
        classes: Alternative class config, with `table`.
    """
    class_set, path = load_image_set(classes, "question"), Path(data_path)
    folder, names = (path.parent, (path.name,)) if path.is_file() else (path, TABLES)
    table = dict(class_set.layout)
    table["file"] = next((name for name in names if (folder / name).is_file()), table["file"])
    if image_folder is not None:
        table["folder"] = str(Path(image_folder).absolute())
    else:
        beside = (name for name in IMAGE_FOLDERS if (folder / name).is_dir())
        table["folder"] = next(beside, table.get("folder", ""))
    class_set = replace(class_set, layout=table)
    return class_conversion("ColonPath", "CC-BY-4.0", class_set, folder)
