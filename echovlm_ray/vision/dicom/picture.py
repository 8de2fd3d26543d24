"""A DICOM object in memory to RGB frames: which frames are decoded, and which part of them is kept.

pydicom parses and imagecodecs decodes. What they report about a file may quote the file, so none of their texts leaves
this package, and pydicom's log and warnings are switched off (P12).
"""

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, config
from pydicom.uid import UID

from echovlm_ray.vision.anatomy import anatomy_terms
from echovlm_ray.vision.codestream import starts_codestream
from echovlm_ray.vision.dicom.attributes import has
from echovlm_ray.vision.dicom.coded import CodedFrames, extended_offsets
from echovlm_ray.vision.dicom.colours import has_palette, palette_tables, palette_to_rgb, sample_bits, samples_to_rgb
from echovlm_ray.vision.dicom.errors import FrameError, InvalidDicomError
from echovlm_ray.vision.dicom.fragments import Encapsulated, Fragment, is_encapsulated, read_items, starts_frame
from echovlm_ray.vision.dicom.grey import grey_frames, padding_ends
from echovlm_ray.vision.dicom.header import FrameLayout, PixelHeader, absent_frames, read_header
from echovlm_ray.vision.dicom.native import NativeFrames, uncompressed
from echovlm_ray.vision.dicom.parsing import ParsedFile, PixelElement, parse
from echovlm_ray.vision.dicom.regions import image_box
from echovlm_ray.vision.dicom.stored import stored_values
from echovlm_ray.vision.dicom_video import decode_dicom_video, stated_kind, video_kind
from echovlm_ray.vision.picture import InvalidPictureError
from echovlm_ray.vision.sampling import sample_frames

logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom\.")
config.settings.reading_validation_mode = config.IGNORE

RGB_BYTES = 3
_ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
# The bytes per pixel that a decoder may need in addition to the RGB result.
WORKING_BYTES = 12


@dataclass(frozen=True, slots=True, eq=False)
class DicomPicture:
    """What a DICOM file shows.

    Attributes:
        frames: height × width × 3, uint8, RGB.
        indices: where in the file they are; the last one may occur twice (see `sample_frames`).
        source_frames: how many frames the file has.
        anatomy_terms: from coded attributes only, because free text may contain names.
        notices: deviations from the file's attributes or the configuration, one sentence each.
        is_partial: whether it is cut off or damaged, so that frames or parts of them are missing.
    """

    frames: tuple[npt.NDArray[np.uint8], ...]
    indices: tuple[int, ...]
    source_frames: int
    anatomy_terms: tuple[str, ...]
    notices: tuple[str, ...] = ()
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class DicomLimits:
    """What one file may take.

    Attributes:
        max_pixels: of the frames that are taken, together.
        max_frames: at least 2.
        crop_to_regions: crops to the box around the ultrasound regions, if there are any.
    """

    max_pixels: int
    max_frames: int
    crop_to_regions: bool


class FrameSource(Protocol):
    """Frames of an object, decoded one by one."""

    layout: FrameLayout
    count: int
    usable: tuple[int, ...]
    is_cut_off: bool

    @property
    def decoded_bytes(self) -> int:
        """Bytes that decoding one frame takes."""

    def decode(self, index: int) -> tuple[npt.NDArray[Any], str]:
        """One frame, rows × columns (× 3), and what its three samples are: RGB, YBR_FULL or YBR_PARTIAL.

        Raises:
            FrameError: it cannot be decoded.
        """


def decode_dicom(content: bytes, *, max_pixels: int, max_frames: int, crop_to_regions: bool) -> DicomPicture:
    """Decodes the sampled frames of a DICOM image; the others are not looked at.

    Args:
        content: the whole file.
        max_pixels: of the sampled frames together; checked before decoding.
        max_frames: at least 2.
        crop_to_regions: crops to the box around the ultrasound regions, if there are any.

    Raises:
        InvalidDicomError: damaged, without a picture, over the limit, or compressed in a way that is not known here.
    """
    limits = DicomLimits(max_pixels, max_frames, crop_to_regions)
    notices: list[str] = []
    try:
        parsed = parse(content, max_bytes=RGB_BYTES * max_pixels, notices=notices)
        return _decode(parsed, limits, notices)
    except InvalidDicomError:
        raise
    except Exception:
        # Any exception: what a parser raises on hostile bytes is not to be foreseen, and all of it means this.
        raise InvalidDicomError("is a DICOM file that is damaged or truncated; export it again") from None


def _decode(parsed: ParsedFile, limits: DicomLimits, notices: list[str]) -> DicomPicture:
    dataset, element = parsed.dataset, parsed.pixels
    if element is None or not element.rest:
        if has(dataset, "PixelDataProviderURL"):
            raise InvalidDicomError(
                "has a Pixel Data Provider URL (0028,7FE0) instead of pixel data; send the object with its pixels"
            )
        if has(dataset, "Rows") or not has(dataset, "SOPClassUID"):
            raise InvalidDicomError("ends before its pixel data, or was sent without them; export it again")
        raise InvalidDicomError(
            "is a DICOM object without a picture (a report or a measurement, for example); send an image object"
        )
    encapsulated = _encapsulated(element, parsed.transfer_syntax, notices)
    stream = _stream(element, encapsulated)
    kind = video_kind(stream, parsed.transfer_syntax)
    if (kind is None) != (stated_kind(parsed.transfer_syntax) is None):
        notices.append(
            f"has pixel data that are {'no' if kind is None else 'a'} video, against its Transfer Syntax UID "
            "(0002,0010); the data decide"
        )
    if kind is not None:
        return _decode_video(dataset, stream, kind, encapsulated, limits, notices)
    header = read_header(dataset, notices)
    if encapsulated is not None and (native := uncompressed(encapsulated, header)) is not None:
        if parsed.transfer_syntax != _ENCAPSULATED_UNCOMPRESSED:
            notices.append("has pixel data in fragments that are not compressed, against its Transfer Syntax UID")
        element, encapsulated = replace(element, content=native, start=0, length=len(native)), None
    source: FrameSource
    if encapsulated is None:
        source = NativeFrames(element, header, has_palette(dataset), notices)
    else:
        source = CodedFrames(encapsulated, header, extended_offsets(dataset), has_palette(dataset), notices)
    _compare_frames(dataset, header, source.count, notices)
    indices, decoded, lost = _decoded(source, limits, notices)
    distinct = sorted(decoded)
    rgb = _to_rgb([decoded[index] for index in distinct], distinct, dataset, source.layout, element, notices)
    frames = dict(zip(distinct, rgb, strict=True))
    if limits.crop_to_regions:
        box = image_box(dataset, source.layout.columns, source.layout.rows, notices)
        if box is not None:
            left, top, right, bottom = box
            frames = {index: frame[top:bottom, left:right].copy() for index, frame in frames.items()}
    return DicomPicture(
        frames=tuple(frames[index] for index in indices),
        indices=indices,
        source_frames=source.count,
        anatomy_terms=_anatomy(dataset, notices),
        notices=_sentences(notices),
        is_partial=source.is_cut_off or source.count < (header.frames or 1) or lost > 0,
    )


def _stream(element: PixelElement, encapsulated: Encapsulated | None) -> bytes | memoryview:
    """The pixel data as one stream; empty where they are compressed frames."""
    if encapsulated is None:
        return element.rest
    if starts_frame(bytes(encapsulated.fragments[0].data[:64])):
        return b""
    return b"".join(fragment.data for fragment in encapsulated.fragments)


def _decode_video(
    dataset: Dataset,
    stream: bytes | memoryview,
    kind: str,
    encapsulated: Encapsulated | None,
    limits: DicomLimits,
    notices: list[str],
) -> DicomPicture:
    """The sampled frames of an object whose pixel data are one video stream."""
    is_cut_off = encapsulated is not None and not encapsulated.fragments[-1].is_whole
    if is_cut_off:
        notices.append("is cut off within its video; the frames that are there are taken")
    try:
        video = decode_dicom_video(
            dataset, bytes(stream), kind, max_pixels=limits.max_pixels, max_frames=limits.max_frames
        )
    except InvalidPictureError as error:
        raise InvalidDicomError(str(error)) from None
    notices.extend(video.notices)
    frames = video.frames
    rows, columns, _ = frames[0].shape
    box = image_box(dataset, columns, rows, notices) if limits.crop_to_regions else None
    if box is not None:
        left, top, right, bottom = box
        frames = tuple(frame[top:bottom, left:right].copy() for frame in frames)
    return DicomPicture(
        frames,
        video.indices,
        video.source_frames,
        _anatomy(dataset, notices),
        _sentences(notices),
        is_cut_off or video.is_partial,
    )


def _sentences(notices: Iterable[str]) -> tuple[str, ...]:
    """The notices without repetitions; those that begin with a verb get the file as their subject."""
    return tuple(dict.fromkeys(text if text[0].isupper() else f"It {text.removesuffix('.')}." for text in notices))


def _encapsulated(element: PixelElement, transfer_syntax: UID | None, notices: list[str]) -> Encapsulated | None:
    """The items of compressed pixel data, None for native ones: the data decide."""
    start = bytes(element.rest[:64])
    if is_encapsulated(element.content, element.start):
        try:
            encapsulated = read_items(element.content, element.start)
        except FrameError:
            raise InvalidDicomError("has more fragments of pixel data than any cine loop; export it again") from None
        if not encapsulated.fragments:
            raise InvalidDicomError("is cut off before the first frame of its pixel data; export it again")
        found_compressed = True
    elif starts_codestream(start):
        end = len(element.rest) if element.length is None else min(element.length, len(element.rest))
        fragment = Fragment(0, element.rest[:end], is_whole=element.length is None or end == element.length)
        encapsulated, found_compressed = Encapsulated((), (fragment,), True, False), True
    else:
        encapsulated, found_compressed = None, False
    if _is_known(transfer_syntax) and found_compressed != transfer_syntax.is_encapsulated:
        notices.append(
            f"has pixel data that are {'' if found_compressed else 'not '}compressed, against its Transfer Syntax UID "
            "(0002,0010); the data decide"
        )
    return encapsulated


def _is_known(transfer_syntax: UID | None) -> TypeGuard[UID]:
    return transfer_syntax is not None and transfer_syntax.is_transfer_syntax and not transfer_syntax.is_private


def _compare_frames(dataset: Dataset, header: PixelHeader, count: int, notices: list[str]) -> None:
    if header.frames is None:
        if count > 1 or has(dataset, "NumberOfFrames"):
            notices.append(f"{absent_frames(dataset)}; its pixel data hold {count}, which are taken")
    elif header.frames != count:
        notices.append(
            f"has a Number of Frames (0028,0008) that is not that of its pixel data; they hold {count}, which are taken"
        )


def _decoded(
    source: FrameSource, limits: DicomLimits, notices: list[str]
) -> tuple[tuple[int, ...], dict[int, tuple[npt.NDArray[Any], str]], int]:
    """The sampled frames by their index, once their size is known to be within the limits, and how many were lost.

    Where one cannot be decoded, frames are sampled again from the others.
    """
    usable = list(source.usable)
    decoded: dict[int, tuple[npt.NDArray[Any], str]] = {}
    failures: list[str] = []
    while usable:
        indices = tuple(usable[place] for place in sample_frames(len(usable), limits.max_frames))
        if source.count > 1 and len(indices) == 1:
            # A loop is shown in pairs of frames.
            indices *= 2
        _check_size(source, len(set(indices)), limits)
        missing = next((index for index in sorted(set(indices)) if index not in decoded), None)
        if missing is None:
            lost = source.count - len(usable)
            if lost:
                notices.append(f"has {source.count} frames, of which {lost} cannot be decoded and are left out")
            return indices, {index: decoded[index] for index in set(indices)}, lost
        try:
            decoded[missing] = source.decode(missing)
        except FrameError as error:
            usable.remove(missing)
            failures.append(str(error))
            if len(failures) > limits.max_frames:
                break
    raise InvalidDicomError(failures[0])


def _check_size(source: FrameSource, frames: int, limits: DicomLimits) -> None:
    layout = source.layout
    if layout.rows * layout.columns * frames > limits.max_pixels:
        raise InvalidDicomError(
            f"has {layout.columns} × {layout.rows} pixels in {frames} frames to look at, and the limit is "
            f"{limits.max_pixels} pixels in all (gateway.max_image_pixels): scale it down before sending"
        )
    decoded_bytes = source.decoded_bytes + frames * layout.decoded_bytes
    if decoded_bytes > WORKING_BYTES * limits.max_pixels:
        raise InvalidDicomError(
            f"takes {decoded_bytes} bytes to decode, and the limit is {WORKING_BYTES * limits.max_pixels} "
            f"({WORKING_BYTES} for each of gateway.max_image_pixels): convert it to 8 bits before sending"
        )


def _to_rgb(
    decoded: list[tuple[npt.NDArray[Any], str]],
    indices: list[int],
    dataset: Dataset,
    layout: FrameLayout,
    element: PixelElement,
    notices: list[str],
) -> list[npt.NDArray[np.uint8]]:
    """RGB of the frames of one object, all treated alike."""
    frames, layout = stored_values([values for values, _ in decoded], layout, notices, padding_ends(dataset))
    if layout.photometric == "PALETTE COLOR":
        tables = palette_tables(dataset, signed=layout.signed, little_endian=element.little_endian, notices=notices)
        return [palette_to_rgb(frame, tables) for frame in frames]
    if layout.samples == 3:
        bits = sample_bits(frames, layout)
        return [
            samples_to_rgb(frame, colours, layout, bits) for frame, (_, colours) in zip(frames, decoded, strict=True)
        ]
    greys = grey_frames(frames, indices, dataset, layout, little_endian=element.little_endian, notices=notices)
    return [np.repeat(grey[..., None], 3, axis=-1) for grey in greys]


def _anatomy(dataset: Dataset, notices: list[str]) -> tuple[str, ...]:
    try:
        return anatomy_terms(dataset)
    except Exception:
        # Any exception: text in a character set that is not the declared one must not prevent the picture.
        notices.append("has coded anatomy that cannot be read, which is left out")
        return ()
