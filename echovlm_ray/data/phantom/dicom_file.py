"""A phantom as a DICOM file: still picture or loop, with its ultrasound region and its anatomy, and no patient.

The picture has a border with text, as ultrasound machines write it; the region says which part is image.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from echovlm_ray.data.phantom.anatomy import ANATOMY
from echovlm_ray.data.phantom.phantom import NOTICE, ImageArray
from echovlm_ray.data.phantom.schema import Organ

LEFT, TOP, RIGHT, BOTTOM = 48, 40, 48, 24
FRAME_MILLISECONDS = 50
_BANNER = "SYNTHETIC PHANTOM - NOT A PATIENT"
_TEXT_GREY = 200
# SNOMED CT codes of CID 4 (anatomic region), and their meanings.
_REGIONS: dict[Organ, tuple[str, str]] = {
    "breast": ("76752008", "Breast"),
    "gynaecology": ("35039007", "Uterus"),
    "heart": ("80891009", "Heart"),
    "kidney": ("64033007", "Kidney"),
    "liver": ("10200004", "Liver"),
    "thyroid": ("69748006", "Thyroid"),
    "vessel": ("59820001", "Blood vessel"),
}
_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "SeriesNumber",
    "PatientOrientation",
)
_TISSUE_2D = 1
_TISSUE_DATA = 1
_CENTIMETRES = 3


def dicom_bytes(frames: Sequence[ImageArray], organ: Organ, seed: int, index: int) -> bytes:
    """A DICOM file (PS3.10), the same bytes for the same arguments.

    Args:
        frames: height × width, uint8, all of one size; more than one make a loop.
        organ: for the anatomic region, and for the scale of the ultrasound region.
        seed: of the corpus, for identifiers.
        index: of the phantom, likewise.
    """
    bordered = np.stack([_with_border(frame) for frame in frames])
    loop = len(frames) > 1
    storage = UltrasoundMultiFrameImageStorage if loop else UltrasoundImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = _uid("instance", organ, seed, index, len(frames))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("implementation")
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = _uid("study", organ, seed, index)
    dataset.SeriesInstanceUID = _uid("series", organ, seed, index)
    _describe(dataset, organ)
    _pixels(dataset, bordered)
    if loop:
        dataset.NumberOfFrames = len(frames)
        dataset.FrameTime = FRAME_MILLISECONDS
        dataset.FrameIncrementPointer = 0x00181063
    dataset.SequenceOfUltrasoundRegions = DicomSequence([_region(frames[0], organ)])
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _describe(dataset: Dataset, organ: Organ) -> None:
    dataset.Modality = "US"
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.DerivationDescription = NOTICE
    dataset.Manufacturer = "EchoVLM-Ray phantom"
    dataset.SeriesDescription = "Synthetic ultrasound phantom"
    dataset.ImageComments = NOTICE
    dataset.ContentQualification = "RESEARCH"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.InstanceNumber = 1
    # Type 2: there, and empty. There is no patient, and the same seed gives the same bytes on every day.
    for keyword in _EMPTY:
        setattr(dataset, keyword, "")
    code, meaning = _REGIONS[organ]
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = code, "SCT", meaning
    dataset.AnatomicRegionSequence = DicomSequence([region])


def _pixels(dataset: Dataset, frames: ImageArray) -> None:
    dataset.Rows, dataset.Columns = frames.shape[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    content = frames.tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)


def _region(frame: ImageArray, organ: Organ) -> Dataset:
    """Where the ultrasound is in the picture, and how large a pixel is (PS3.3 C.8.5.5)."""
    height, width = frame.shape
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = _TISSUE_2D, _TISSUE_DATA, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = LEFT, TOP
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = LEFT + width - 1, TOP + height - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = _CENTIMETRES
    region.PhysicalDeltaX = region.PhysicalDeltaY = ANATOMY[organ].optics.depth / height
    return region


def _with_border(frame: ImageArray) -> ImageArray:
    height, width = frame.shape
    picture = Image.new("L", (LEFT + width + RIGHT, TOP + height + BOTTOM))
    picture.paste(Image.fromarray(frame), (LEFT, TOP))
    ImageDraw.Draw(picture).text((LEFT, 12), _BANNER, fill=_TEXT_GREY)
    return np.array(picture)


def _uid(*parts: object) -> UID:
    """An identifier that is a function of its parts."""
    return generate_uid(entropy_srcs=["echovlm_ray.data.phantom", *map(str, parts)])
