"""Real ultrasound out of pydicom's test data, and DICOM files made for one purpose."""

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import Dataset, FileDataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundImageStorage

REAL = (
    "examples_ybr_color.dcm",
    "examples_rgb_color.dcm",
    "examples_jpeg2k.dcm",
    "examples_palette.dcm",
    "ExplVR_BigEnd.dcm",
    "color3d_jpeg_baseline.dcm",
    "JPGLosslessP14SV1_1s_1f_8b.dcm",
    "gdcm-US-ALOKA-16.dcm",
    "OBXXXX1A.dcm",
    "OBXXXX1A_2frame.dcm",
    "OBXXXX1A_expb.dcm",
    "OBXXXX1A_expb_2frame.dcm",
    "OBXXXX1A_rle.dcm",
    "OBXXXX1A_rle_2frame.dcm",
    "US1_J2KI.dcm",
    "US1_J2KR.dcm",
    "US1_UNCI.dcm",
    "US1_UNCR.dcm",
)


def real(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, f"{name} is neither in pydicom nor in pydicom-data"
    return Path(str(path)).read_bytes()


def made(
    pixels: np.ndarray[Any, Any],
    *,
    transfer_syntax: str = ExplicitVRLittleEndian,
    frames: Any = None,
    **attributes: Any,
) -> bytes:
    """A DICOM file of rows × columns (× 3) pixels, frames × … with `frames`; `attributes` are set last."""
    dataset = FileDataset("", {}, preamble=b"\0" * 128)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    dataset.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    dataset.SOPClassUID = UltrasoundImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Modality = "US"
    shape = pixels.shape[1:] if frames is not None else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = 0
    if frames is not None:
        dataset.NumberOfFrames = frames
    dataset.PixelData = pixels.tobytes()
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def made_compressed(
    codestreams: list[bytes], transfer_syntax: str, rows: int, columns: int, **attributes: Any
) -> bytes:
    """A DICOM file around ready codestreams, RGB of eight bits unless `attributes` say otherwise."""
    return made(
        np.zeros((rows, columns, 3), np.uint8),
        transfer_syntax=transfer_syntax,
        PixelData=encapsulate(codestreams),
        NumberOfFrames=len(codestreams),
        **attributes,
    )


def region(left: int, top: int, right: int, bottom: int, spatial_format: int = 1) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat = spatial_format
    item.RegionDataType = 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item


def picture(rows: int, columns: int) -> np.ndarray[Any, Any]:
    """A smooth grey picture from 0 to 250 without two equal rows or columns, uint8."""
    y, x = np.mgrid[:rows, :columns]
    waves: np.ndarray[Any, Any] = np.sin(x / columns * 5) + np.cos(y / rows * 4) + 0.3 * np.sin(x * y / 400)
    grey: np.ndarray[Any, Any] = (waves - waves.min()) / np.ptp(waves) * 250
    return grey.astype(np.uint8)


def colour_picture(rows: int, columns: int) -> np.ndarray[Any, Any]:
    """A mostly grey picture with a coloured box, as a Doppler image is; uint8."""
    rgb = np.repeat(picture(rows, columns)[..., None], 3, axis=-1)
    rgb[rows // 4 : rows // 2, columns // 4 : columns // 2] = (220, 60, 20)
    return rgb


def encoded(codec: str, pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    """A codestream of imagecodecs, by the name of its codec."""
    return bytes(getattr(imagecodecs, f"{codec}_encode")(pixels, **options))
