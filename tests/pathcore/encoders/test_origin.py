from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from pathcore.encoders.origin import TileOrigin, feature_attributes


def test_attributes_are_python_values_whoever_wrote_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["encoder"] = "of the file"
        features = file.create_dataset("features", data=np.zeros((2, 4), np.float32))
        features.attrs["encoder"] = np.bytes_(b"uni")  # as C programs write text
        coords = file.create_dataset("coords", data=np.zeros((2, 2), np.int64))
        coords.attrs["patch_size_level0"] = np.array([512])
        coords.attrs["patch_size"] = np.int64(256)
        coords.attrs["target_magnification"] = np.array([20.0])
        attributes = feature_attributes(file)
    assert attributes == {
        "encoder": "uni",
        "patch_size_level0": 512,
        "patch_size": 256,
        "target_magnification": 20.0,
    }
    assert all(type(value) in (str, int, float) for value in attributes.values())
    assert TileOrigin.read(attributes) == TileOrigin("uni", 256, 0.5)


def test_files_of_slide_features_have_no_coordinates(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("feats", data=np.zeros(4, np.float32)).attrs["encoder"] = "titan"
        assert feature_attributes(file) == {"encoder": "titan"}
