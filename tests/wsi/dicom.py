"""Whole-slide DICOM files written by pydicom, as scanners and converters store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid


def write_series(
    folder: Path, pixels: NDArray[Any], *, mpp: float = 0.5, downsamples: tuple[int, ...] = (1, 2)
) -> str:
    """Writes one series with an instance per level, and returns its SeriesInstanceUID."""
    folder.mkdir(parents=True, exist_ok=True)
    series, frame, study = generate_uid(), generate_uid(), generate_uid()
    for number, step in enumerate(downsamples):
        _write_instance(folder, pixels[::step, ::step], mpp * step, number, series, frame, study)
    return str(series)


def _write_instance(
    folder: Path, pixels: NDArray[Any], mpp: float, number: int, series: str, frame: str, study: str
) -> None:
    tile = 256
    height, width = pixels.shape[:2]
    frames = []
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            square = np.full((tile, tile, 3), 255, np.uint8)
            part = pixels[y : y + tile, x : x + tile]
            square[: part.shape[0], : part.shape[1]] = part
            frames.append(imagecodecs.jpeg8_encode(square, level=85, subsampling="444"))
    uid = generate_uid()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    data = Dataset()
    data.file_meta = meta
    values: dict[str, Any] = dict(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        SOPInstanceUID=uid,
        StudyInstanceUID=study,
        SeriesInstanceUID=series,
        FrameOfReferenceUID=frame,
        Modality="SM",
        InstanceNumber=number + 1,
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if number == 0 else "RESAMPLED"],
        Rows=tile,
        Columns=tile,
        NumberOfFrames=len(frames),
        TotalPixelMatrixColumns=width,
        TotalPixelMatrixRows=height,
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        ImagedVolumeWidth=width * mpp / 1000,
        ImagedVolumeHeight=height * mpp / 1000,
        ImagedVolumeDepth=0.001,
        DimensionOrganizationType="TILED_FULL",
        SamplesPerPixel=3,
        PhotometricInterpretation="YBR_FULL_422",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
    )
    for name, value in values.items():
        setattr(data, name, value)
    measures = Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    path = Dataset()
    path.OpticalPathIdentifier = "1"
    data.OpticalPathSequence = Sequence([path])
    data.PixelData = encapsulate([bytes(f) + b"\0" * (len(f) % 2) for f in frames])
    data["PixelData"].VR = "OB"
    data.save_as(folder / f"{uid}.dcm", enforce_file_format=True)
