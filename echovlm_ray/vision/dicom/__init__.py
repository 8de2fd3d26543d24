"""DICOM objects in memory to RGB frames. The data decide, not their labels; every departure is a notice."""

from echovlm_ray.vision.dicom.errors import InvalidDicomError
from echovlm_ray.vision.dicom.parsing import is_dicom
from echovlm_ray.vision.dicom.picture import DicomPicture, decode_dicom

__all__ = ["DicomPicture", "InvalidDicomError", "decode_dicom", "is_dicom"]
