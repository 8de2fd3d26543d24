"""Decodes DICOM files in the process of the test, builds their attributes, and says what the pixels should be."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset

from echovlm_ray.vision.dicom import DicomPicture, InvalidDicomError, decode_dicom
from tests.vision.dicom_samples import colour_picture

COLOURS = colour_picture(48, 64)
WINDOW_12: dict[str, Any] = {"WindowCenter": 2048, "WindowWidth": 4096}


def decode(content: bytes) -> DicomPicture:
    return decode_dicom(content, max_pixels=10**6, max_frames=8, crop_to_regions=False)


def grey(content: bytes) -> np.ndarray[Any, Any]:
    frame = decode(content).frames[0]
    assert (frame == frame[..., :1]).all()
    return frame[..., 0].astype(int)


def refused(content: bytes) -> str:
    with pytest.raises(InvalidDicomError) as caught:
        decode(content)
    return str(caught.value)


def noticed(content: bytes, text: str) -> bool:
    return any(text in notice for notice in decode(content).notices)


def item(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def bits(stored: int, high: int | None = None, allocated: int = 16) -> dict[str, Any]:
    return {"BitsAllocated": allocated, "BitsStored": stored, "HighBit": stored - 1 if high is None else high}


def in_window(values: Any) -> Any:
    return np.rint((np.asarray(values, dtype=float) / 4095).clip(0, 1) * 255)


def near(content: bytes, expected: Any = COLOURS, tolerance: float = 2) -> bool:
    return bool(np.abs(decode(content).frames[0].astype(int) - expected).mean() <= tolerance)


def ybr(colours: Any = COLOURS) -> Any:
    return np.array(Image.fromarray(colours).convert("YCbCr"))
