"""Files from callers, stills, videos and DICOM in memory, to RGB frames. Nothing touches the disk.

The bytes come from outside, so limits are checked before anything is decoded, and whatever a decoder says about broken
bytes is replaced by our own words: its text may quote the file (P12).
"""

from dataclasses import dataclass

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom, is_dicom
from echovlm_ray.vision.kinds import STILLS, VIDEOS, file_kind
from echovlm_ray.vision.picture import FrameArray, InvalidPictureError, Picture
from echovlm_ray.vision.stills import decode_still
from echovlm_ray.vision.video import decode_video

ACCEPTED = (
    "send a PNG, JPEG or DICOM file, another still (TIFF, BMP, GIF, WebP, JPEG 2000, JPEG-LS) or a video (MP4, MOV, "
    "AVI, MPEG, Matroska, WMV)"
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image file may take; the names are those of the configuration's `gateway` section."""

    max_image_bytes: int
    # Of all the frames that are taken, together.
    max_image_pixels: int
    # At least 2.
    max_frames: int
    crop_to_regions: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """One image file as the processor takes it.

    Attributes:
        frames: height × width × 3, uint8, RGB, all of one size. One for a still image, an even number for a video.
        frames_taken: how many different frames of the file those are.
        source_frames: how many frames the file has.
        anatomy_terms: DICOM's coded names of the body part shown.
        notices: deviations from the file's attributes or the configuration, one sentence each.
        is_partial: whether the file is cut off or damaged, so that frames or parts of them are missing. A request is
            answered from what is there; data sets refuse such files.
    """

    frames: tuple[FrameArray, ...]
    frames_taken: int = 1
    source_frames: int = 1
    anatomy_terms: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    is_partial: bool = False

    @property
    def is_video(self) -> bool:
        """Whether the file is a cine loop."""
        return self.source_frames > 1


def decode_image_file(content: bytes, *, limits: ImageLimits, field: str) -> DecodedImage:
    """Decodes a still image, a video or a DICOM file; the content decides which it is.

    Args:
        content: the whole file.
        limits: checked before decoding.
        field: the file's place in the request, for example "images[1].content".

    Raises:
        InvalidRequestError: the file is empty, too large, of another kind, truncated, broken, or without a picture.
    """
    if not content:
        raise InvalidRequestError(field, f"is empty; {ACCEPTED}")
    if len(content) > limits.max_image_bytes:
        raise InvalidRequestError(
            field,
            f"has {len(content)} bytes and the limit is {limits.max_image_bytes} (gateway.max_image_bytes): "
            "send a smaller or a compressed file",
        )
    if is_dicom(content):
        return _decode_dicom(content, limits, field)
    kind = file_kind(content)
    try:
        if kind in STILLS:
            return _decoded(
                decode_still(content, kind, max_pixels=limits.max_image_pixels, max_frames=limits.max_frames)
            )
        if kind in VIDEOS:
            return _decoded(
                decode_video(content, kind, max_pixels=limits.max_image_pixels, max_frames=limits.max_frames)
            )
    except InvalidPictureError as error:
        raise InvalidRequestError(field, str(error)) from None
    what = "is not an image file that is known here" if kind is None else f"is a {kind} file"
    raise InvalidRequestError(field, f"{what}; {ACCEPTED}")


def _decoded(picture: Picture) -> DecodedImage:
    return DecodedImage(
        picture.frames,
        len(set(picture.indices)),
        picture.source_frames,
        notices=picture.notices,
        is_partial=picture.is_partial,
    )


def _decode_dicom(content: bytes, limits: ImageLimits, field: str) -> DecodedImage:
    try:
        picture = decode_dicom(
            content,
            max_pixels=limits.max_image_pixels,
            max_frames=limits.max_frames,
            crop_to_regions=limits.crop_to_regions,
        )
    except InvalidDicomError as error:
        raise InvalidRequestError(field, str(error)) from None
    frames_taken = len(set(picture.indices))
    return DecodedImage(
        picture.frames,
        frames_taken,
        picture.source_frames,
        picture.anatomy_terms,
        picture.notices,
        picture.is_partial,
    )
