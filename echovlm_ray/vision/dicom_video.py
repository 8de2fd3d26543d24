"""Videos inside DICOM: MPEG-2, H.264 and HEVC as one stream in the pixel data (PS3.5 8.2.7 to 8.2.12, A.4.5 to A.4.11).

The fragments of a video are no frames: together they make one stream, which may be bare, in MP4, or in MPEG's program
or transport stream. What it is, the stream itself says.
"""

from typing import Any

from echovlm_ray.vision.kinds import VIDEOS, file_kind
from echovlm_ray.vision.picture import Picture
from echovlm_ray.vision.video import decode_video

# The transfer syntaxes of PS3.6, and what a stream is taken for that says nothing; "fragmentable" ones end in .1.
_SYNTAXES = {
    **dict.fromkeys((100, 101), "MPEG video"),
    **dict.fromkeys((102, 103, 104, 105, 106), "H.264"),
    **dict.fromkeys((107, 108), "HEVC"),
}
_ROOT = "1.2.840.10008.1.2.4."


def video_kind(stream: bytes | memoryview, transfer_syntax: str | None) -> str | None:
    """What kind of video pixel data are, or None where they are none.

    Args:
        stream: the pixel data as one stream: joined fragments (bytes), or a value without fragments (memoryview), which
            is a video only if the transfer syntax says so; empty where they are compressed frames.
        transfer_syntax: decides if the stream's kind cannot be detected.
    """
    if not stream:
        return None
    stated = stated_kind(transfer_syntax)
    if stated is None and isinstance(stream, memoryview):
        return None
    found = file_kind(bytes(stream[:4096]))
    return found if found in VIDEOS else stated


def stated_kind(transfer_syntax: str | None) -> str | None:
    """The kind of video that a transfer syntax means, or None."""
    if transfer_syntax is None:
        return None
    number = transfer_syntax.removeprefix(_ROOT).removesuffix(".1")
    return _SYNTAXES.get(int(number)) if transfer_syntax.startswith(_ROOT) and number.isdecimal() else None


def decode_dicom_video(dataset: Any, stream: bytes, kind: str, *, max_pixels: int, max_frames: int) -> Picture:
    """Frames of the video in an object, evenly spread, not cropped and of the pixels as they are stored.

    Regions are given in stored pixels, so frames of pixels that are not square are not stretched.

    Args:
        dataset: a pydicom dataset.
        stream: all fragments of its pixel data behind the offset table, joined.
        kind: of the stream, from `video_kind`.
        max_pixels: of the frames taken together.
        max_frames: at least 2.

    Raises:
        InvalidPictureError: no frame can be decoded, or over the limits.
    """
    picture = decode_video(stream, kind, max_pixels=max_pixels, max_frames=max_frames, square_pixels=False)
    notices, is_partial = picture.notices, picture.is_partial
    height, width, _ = picture.frames[0].shape
    if (width, height) != (dataset.get("Columns"), dataset.get("Rows")):
        notices = (*notices, "Its frames have another size than Rows and Columns say; the size of the frames counts.")
    stated = dataset.get("NumberOfFrames")
    if stated is None or str(stated) != str(picture.source_frames):
        notices = (*notices, f"NumberOfFrames is missing or wrong: the video has {picture.source_frames} frames.")
        is_partial = is_partial or (str(stated).isdecimal() and int(str(stated)) > picture.source_frames)
    return Picture(picture.frames, picture.indices, picture.source_frames, notices, is_partial)
