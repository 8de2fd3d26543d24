"""Image files from callers: PNG, JPEG or DICOM in memory to RGB frames. Nothing touches the disk.

The bytes come from outside, so limits are checked before anything is decoded, and whatever a decoder says about broken
bytes is replaced by our own words: its text may quote the file (P12).
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.dicom import InvalidDicomError, decode_dicom, is_dicom

ACCEPTED = "send a PNG, JPEG or DICOM file"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHER_KINDS = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"NRRD", "NRRD"),
)

FrameArray = npt.NDArray[np.uint8]


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
        notices: what was done differently from what the file or the configuration asks for, a sentence each.
    """

    frames: tuple[FrameArray, ...]
    frames_taken: int = 1
    source_frames: int = 1
    anatomy_terms: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether the file is a cine loop."""
        return self.source_frames > 1


def decode_image_file(content: bytes, *, limits: ImageLimits, field: str) -> DecodedImage:
    """Decodes a PNG, JPEG or DICOM file; the content decides which it is.

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
    if content.startswith(_PNG_SIGNATURE):
        return DecodedImage((_decode_still(content, "PNG", limits, field),))
    if content.startswith(b"\xff\xd8\xff"):
        return DecodedImage((_decode_still(content, "JPEG", limits, field),))
    kind = next((kind for signature, kind in _OTHER_KINDS if content.startswith(signature)), None)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        kind = "WebP"
    what = "is not an image file that is known here" if kind is None else f"is a {kind} file"
    raise InvalidRequestError(field, f"{what}; {ACCEPTED}")


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
    return DecodedImage(picture.frames, frames_taken, picture.source_frames, picture.anatomy_terms, picture.notices)


def _decode_still(content: bytes, kind: str, limits: ImageLimits, field: str) -> FrameArray:
    broken = InvalidRequestError(field, f"is a {kind} file that is damaged or truncated; export it again")
    try:
        image = Image.open(io.BytesIO(content), formats=(kind,))
    except Image.DecompressionBombError:
        raise InvalidRequestError(field, _too_many_pixels(limits)) from None
    except Exception:
        # Any exception: what a decoder raises on hostile bytes is not to be foreseen, and all of it means this.
        raise broken from None
    with image:
        if image.width * image.height > limits.max_image_pixels:
            raise InvalidRequestError(field, _too_many_pixels(limits, f"{image.width} × {image.height} pixels"))
        if getattr(image, "is_animated", False) and kind == "PNG":
            raise InvalidRequestError(field, "is an animated PNG; send its frames as separate images, or as DICOM")
        if kind == "PNG" and not _png_is_complete(content):
            raise broken
        try:
            return _to_rgb(ImageOps.exif_transpose(image))
        except Exception:
            raise broken from None


def _too_many_pixels(limits: ImageLimits, size: str = "far more pixels") -> str:
    return (
        f"has {size} and the limit is {limits.max_image_pixels} pixels (gateway.max_image_pixels): "
        "scale it down before sending"
    )


def _png_is_complete(content: bytes) -> bool:
    """Whether the chunks reach to the end mark. Pillow is content when the pixels end early but cleanly."""
    offset = len(_PNG_SIGNATURE)
    while offset + 12 <= len(content):
        if content[offset + 4 : offset + 8] == b"IEND":
            return True
        offset += 12 + int.from_bytes(content[offset : offset + 4], "big")
    return False


def _to_rgb(image: Image.Image) -> FrameArray:
    """Any mode of PNG and JPEG as RGB; what is transparent becomes black, the background of ultrasound."""
    if image.mode.startswith("I"):
        # 16-bit greyscale, which Pillow's own conversion would clip at 255.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return np.repeat(np.rint(grey.clip(0, 255)).astype(np.uint8)[..., None], 3, axis=-1)
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB"))
