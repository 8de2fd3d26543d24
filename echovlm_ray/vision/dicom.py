"""DICOM objects in memory to RGB frames: what file it is, which frames are decoded, which part of them is kept.

pydicom parses and decodes. What it reports about a file may quote the file, so none of its texts leaves this module,
and its log and warnings are switched off (P12). How stored values become RGB is `pixels`.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from echovlm_ray.vision.anatomy import anatomy_terms
from echovlm_ray.vision.codestream import frame_size, says_adobe_ybr
from echovlm_ray.vision.dicom_video import decode_dicom_video, is_video_syntax, joined_fragments
from echovlm_ray.vision.picture import InvalidPictureError
from echovlm_ray.vision.pixels import UnknownPixelsError, to_rgb
from echovlm_ray.vision.regions import image_box
from echovlm_ray.vision.sampling import sample_frames

logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom\.")

DAMAGED = "is a DICOM file that is damaged or truncated; export it again"
# An item of encapsulated pixel data has a header of this many bytes, so a frame cannot take less.
ITEM_HEADER_BYTES = 8
# A compressed frame longer than its pixels and this much is no compression, but something to be expanded.
COMPRESSION_SLACK_BYTES = 64 * 1024


class InvalidDicomError(ValueError):
    """A DICOM file that cannot be shown. The text begins with a verb, its subject being the file."""


@dataclass(frozen=True, slots=True, eq=False)
class DicomPicture:
    """What a DICOM file shows.

    Attributes:
        frames: height × width × 3, uint8, RGB.
        indices: where in the file they are; the last one may occur twice (see `sample_frames`).
        source_frames: how many frames the file has.
        anatomy_terms: from coded attributes only: free text may hold names.
        notices: what was done differently from what the file or the configuration asks for, a sentence each.
    """

    frames: tuple[npt.NDArray[np.uint8], ...]
    indices: tuple[int, ...]
    source_frames: int
    anatomy_terms: tuple[str, ...]
    notices: tuple[str, ...] = ()


def is_dicom(content: bytes) -> bool:
    """Whether the bytes are a DICOM file (PS3.10, with its preamble)."""
    return content[128:132] == b"DICM"


def decode_dicom(content: bytes, *, max_pixels: int, max_frames: int, crop_to_regions: bool) -> DicomPicture:
    """Decodes the sampled frames of a DICOM image; the others are not looked at.

    Args:
        content: the whole file.
        max_pixels: of the sampled frames together; checked before decoding.
        max_frames: at least 2.
        crop_to_regions: keeps only the box around the ultrasound regions, where there are any.

    Raises:
        InvalidDicomError: damaged, without a picture, over the limit, or compressed in a way that is not known here.
    """
    try:
        return _decode(content, max_pixels, max_frames, crop_to_regions)
    except InvalidDicomError:
        raise
    except (InvalidPictureError, UnknownPixelsError) as error:
        raise InvalidDicomError(str(error)) from None
    except Exception:
        # Any exception: what a parser raises on hostile bytes is not to be foreseen, and all of it means this.
        raise InvalidDicomError(DAMAGED) from None


def _decode(content: bytes, max_pixels: int, max_frames: int, crop_to_regions: bool) -> DicomPicture:
    transfer_syntax = _transfer_syntax(content)
    dataset = dcmread(io.BytesIO(content))
    if is_video_syntax(transfer_syntax):
        return _decode_video(dataset, transfer_syntax, max_pixels, max_frames, crop_to_regions)
    num_frames = _check_picture(dataset)
    indices = sample_frames(num_frames, max_frames)
    distinct = sorted(set(indices))
    pixels = dataset.Rows * dataset.Columns * len(distinct)
    if pixels > max_pixels:
        raise InvalidDicomError(
            f"has {dataset.Columns} × {dataset.Rows} pixels in {len(distinct)} frames to look at, and the limit is "
            f"{max_pixels} pixels in all (gateway.max_image_pixels): scale it down before sending"
        )
    codestreams: list[bytes] = []
    if transfer_syntax.is_compressed:
        codestreams = _codestreams(dataset, distinct, num_frames)
        _check_claims(dataset, codestreams, transfer_syntax)
    elif len(dataset.PixelData) < get_expected_length(dataset):
        raise InvalidDicomError(DAMAGED)
    frames = dict(zip(distinct, _rgb_frames(dataset, distinct, transfer_syntax, codestreams), strict=True))
    box = image_box(dataset, dataset.Columns, dataset.Rows) if crop_to_regions else None
    if box is not None:
        left, top, right, bottom = box
        frames = {index: frame[top:bottom, left:right].copy() for index, frame in frames.items()}
    return DicomPicture(tuple(frames[index] for index in indices), indices, num_frames, anatomy_terms(dataset))


def _decode_video(
    dataset: Dataset, transfer_syntax: UID, max_pixels: int, max_frames: int, crop_to_regions: bool
) -> DicomPicture:
    if "PixelData" not in dataset:
        raise InvalidDicomError("is a DICOM object without a picture; send an object with pixel data")
    stream = joined_fragments(dataset.PixelData)
    video = decode_dicom_video(dataset, stream, transfer_syntax, max_pixels=max_pixels, max_frames=max_frames)
    frames = video.frames
    height, width, _ = frames[0].shape
    box = image_box(dataset, width, height) if crop_to_regions else None
    if box is not None:
        left, top, right, bottom = box
        frames = tuple(frame[top:bottom, left:right].copy() for frame in frames)
    return DicomPicture(frames, video.indices, video.source_frames, anatomy_terms(dataset), video.notices)


def _transfer_syntax(content: bytes) -> UID:
    """How the file is encoded, read before the rest is: inflating a deflated file could fill the memory."""
    buffer = io.BytesIO(content)
    read_preamble(buffer, False)
    meta = read_dataset(
        buffer, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag >> 16 != 2
    )
    transfer_syntax = UID(meta.TransferSyntaxUID)
    name = transfer_syntax.name if transfer_syntax.is_transfer_syntax else "a private one"
    convert = "convert it to Explicit VR Little Endian, JPEG or JPEG 2000"
    if transfer_syntax == DeflatedExplicitVRLittleEndian:
        raise InvalidDicomError(f"is deflated as a whole ({name}), which is not accepted; {convert}")
    if is_video_syntax(transfer_syntax):
        return transfer_syntax
    try:
        available = get_decoder(transfer_syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise InvalidDicomError(f"has a transfer syntax that is not accepted ({name}); {convert}")
    return transfer_syntax


def _check_picture(dataset: Dataset) -> int:
    """The number of frames, once it is known that there is a picture."""
    if "PixelData" not in dataset or not dataset.get("Rows") or not dataset.get("Columns"):
        raise InvalidDicomError(
            "is a DICOM object without a picture (a report or a measurement, for example); send an image object"
        )
    stated = dataset.get("NumberOfFrames")
    num_frames = 1 if stated is None else int(stated)
    if num_frames < 1:
        raise InvalidDicomError("says that it has no frames; send an object with at least one")
    if num_frames * ITEM_HEADER_BYTES > max(len(dataset.PixelData), ITEM_HEADER_BYTES) and num_frames > 1:
        raise InvalidDicomError("says that it has more frames than its pixel data can hold; export it again")
    return num_frames


def _codestreams(dataset: Dataset, indices: Sequence[int], num_frames: int) -> list[bytes]:
    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    return [
        get_frame(dataset.PixelData, index, number_of_frames=num_frames, extended_offsets=offsets) for index in indices
    ]


def _check_claims(dataset: Dataset, codestreams: Sequence[bytes], transfer_syntax: UID) -> None:
    """Compares what each frame claims for itself with the header, before a decoder allocates memory for it."""
    size = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * -(-dataset.BitsAllocated // 8)
    for frame in codestreams:
        if len(frame) > 2 * size + COMPRESSION_SLACK_BYTES:
            raise InvalidDicomError("has a compressed frame that is far longer than its pixels; export it again")
        if transfer_syntax == RLELossless:
            continue
        claimed = frame_size(frame)
        if claimed is None:
            raise InvalidDicomError(DAMAGED)
        if (claimed.width, claimed.height, claimed.samples) != (
            dataset.Columns,
            dataset.Rows,
            dataset.SamplesPerPixel,
        ):
            raise InvalidDicomError("has a frame of another size than its header says; export it again")


def _rgb_frames(
    dataset: Dataset, indices: Sequence[int], transfer_syntax: UID, codestreams: Sequence[bytes]
) -> list[npt.NDArray[np.uint8]]:
    # libjpeg-turbo is the fastest and the most tested of the decoders for what ultrasound machines mostly send.
    plugin = "pillow" if transfer_syntax == JPEGBaseline8Bit else ""
    # Where Adobe's marker tells it to, Pillow itself returns RGB, and pydicom would convert a second time.
    converted = bool(plugin) and dataset.SamplesPerPixel == 3 and any(map(says_adobe_ybr, codestreams))
    decoded = get_decoder(transfer_syntax).iter_array(
        dataset, indices=list(indices), raw=converted, decoding_plugin=plugin
    )
    arrays, interpretations = [], set()
    for array, properties in decoded:
        arrays.append(array)
        interpretations.add(str(properties["photometric_interpretation"]))
    (interpretation,) = interpretations
    return to_rgb(arrays, "RGB" if converted else interpretation, dataset)
