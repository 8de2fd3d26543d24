"""Still images in memory to RGB frames: PNG, JPEG and JPEG-LS, WebP, TIFF, BMP, GIF and JPEG 2000.

Pillow decodes what has eight bits a value, imagecodecs what has more and what Pillow does not know. What they say about
broken bytes may quote the file, so none of their texts leaves this module (P12). Colour profiles are left out: they
describe a screen, and the model was trained on pictures as they are stored.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from echovlm_ray.vision import jpeg_file, png_file, webp_file
from echovlm_ray.vision.animation import count_gif_frames, decode_animation
from echovlm_ray.vision.depth import to_eight_bits
from echovlm_ray.vision.jpeg2000_file import read_jpeg2000
from echovlm_ray.vision.jpeg_file import JpegFile
from echovlm_ray.vision.opaque import opaque_array, opaque_rgb
from echovlm_ray.vision.orientation import oriented, read_orientation
from echovlm_ray.vision.picture import FrameArray, InvalidPictureError, Picture, check_pixels
from echovlm_ray.vision.tiff_pages import decode_tiff

# Pillow decodes run lengths of BMP in Python, and slowly.
_MAX_BMP_RUN_BYTES = 4 * 1024 * 1024
# Whatever a picture without the mark of its end still lacks is read as these bytes.
_FILLING = b"\xaa" * 4096
_NO_END = "The mark of the file's end is missing; its pixels are complete."

_Array = npt.NDArray[np.generic]


def decode_still(content: bytes, kind: str, *, max_pixels: int, max_frames: int) -> Picture:
    """Decodes a file of one of the kinds in `kinds.STILLS`; an animation or many pages come as a cine loop.

    Args:
        content: the whole file.
        kind: as `kinds.file_kind` names it.
        max_pixels: of the frames taken together; checked before decoding.
        max_frames: at least 2.

    Raises:
        InvalidPictureError: truncated, damaged, over a limit, or unsupported.
    """
    try:
        return _DECODERS[kind](content, max_pixels, max_frames)
    except InvalidPictureError:
        raise
    except Exception:
        # Any exception: what a decoder raises on hostile bytes is not to be foreseen, and all of it means this.
        raise InvalidPictureError(f"is a {kind} file that is damaged or truncated; export it again") from None


def _opened(content: bytes, kind: str) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=(kind,))


def _png(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    png = png_file.read_png(content)
    check_pixels(png.width, png.height, 1, max_pixels, png.pixel_bytes)
    notices = png_file.check_pixels_sound(png)
    if png.animation_frames > 1:
        return decode_animation(
            png.body, "PNG", png.animation_frames, max_pixels=max_pixels, max_frames=max_frames, notices=notices
        )
    orientation, unread = read_orientation(png.exif, png.xmp)
    if png.bits == 16 and png.colour != 0:
        frame, assumed = _deep_colours(_imagecodecs("png_decode", png.body), 16, png.significant)
    else:
        with _opened(png.body, "PNG") as image:
            if png.bits == 16:
                frame, assumed = _deep_colours(np.asarray(image), 16, png.significant)
            else:
                frame, assumed = opaque_rgb(image)
    return Picture((oriented(frame, orientation),), notices=(*notices, *unread, *assumed))


def _jpeg(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    jpeg = jpeg_file.read_jpeg(content)
    check_pixels(jpeg.width, jpeg.height, 1, max_pixels, jpeg.samples * (1 + (jpeg.precision > 8)))
    jpeg_file.check_cost(jpeg, max_pixels)
    if jpeg.samples not in (1, 3) and (jpeg.samples, jpeg.precision) != (4, 8):
        raise InvalidPictureError(
            f"is a JPEG of {jpeg.samples} components of {jpeg.precision} bits; save it as RGB or greyscale"
        )
    decode: Callable[[bytes], _Array] = _pillow_jpeg
    if jpeg.process == jpeg_file.JPEG_LS:
        decode = partial(_imagecodecs, "jpegls_decode")
    elif jpeg.precision != 8:
        decode = partial(_imagecodecs, "jpeg8_decode")
    notices: tuple[str, ...] = ()
    if jpeg.has_end:
        values = decode(jpeg.body)
    else:
        values = _without_end(jpeg, decode)
        notices = (_NO_END,)
    if jpeg.holds_several:
        notices = (*notices, "It holds several pictures; the first is shown.")
    if jpeg.precision == 8 and values.ndim == 3 and values.shape[2] == 3:
        frame = np.ascontiguousarray(values.astype(np.uint8, copy=False))
    else:
        frame, assumed = _deep_colours(values, jpeg.precision)
        notices = (*notices, *assumed)
    orientation, unread = read_orientation(jpeg.exif, jpeg.xmp)
    return Picture((oriented(frame, orientation),), notices=(*notices, *unread))


def _pillow_jpeg(content: bytes) -> FrameArray:
    with _opened(content, "JPEG") as image:
        return np.array(image.convert("RGB"))


def _without_end(jpeg: JpegFile, decode: Callable[[bytes], _Array]) -> _Array:
    """Decodes a JPEG in which only the end marker is missing.

    Decoders fill what is missing without a word. So it is decoded with two different fillings: where the pixels are
    complete, neither is looked at.
    """
    cut = InvalidPictureError("is a JPEG file that is truncated: a part of its picture is missing; export it again")
    body = jpeg.body.removesuffix(b"\xff")
    if jpeg.process == jpeg_file.JPEG_LS:
        return decode(body + jpeg_file.END)
    if not jpeg_file.may_be_complete(jpeg):
        raise cut
    values = decode(body + jpeg_file.END)
    if not np.array_equal(values, decode(body + _FILLING + jpeg_file.END)):
        raise cut
    return values


def _jpeg2000(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    header = read_jpeg2000(content)
    check_pixels(header.width, header.height, 1, max_pixels, header.samples * (1 + (header.bits > 8)))
    if header.samples > 4:
        raise InvalidPictureError("is a JPEG 2000 file with more than four components; save it as RGB or greyscale")
    notices: tuple[str, ...] = ()
    if not header.has_end:
        content = content.removesuffix(b"\xff") + jpeg_file.END
        notices = (_NO_END,)
    if header.bits > 8:
        frame, assumed = _deep_colours(_imagecodecs("jpeg2k_decode", content), header.bits)
    else:
        with _opened(content, "JPEG2000") as image:
            frame, assumed = opaque_rgb(image)
    return Picture((frame,), notices=(*notices, *assumed))


def _webp(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    webp = webp_file.read_webp(content)
    check_pixels(webp.width, webp.height, 1, max_pixels)
    if webp.animation_frames > 1:
        content = webp_file.with_right_length(content)
        return decode_animation(content, "WEBP", webp.animation_frames, max_pixels=max_pixels, max_frames=max_frames)
    orientation, unread = read_orientation(webp.exif, webp.xmp)
    with _opened(webp_file.with_right_length(content), "WEBP") as image:
        frame, notices = opaque_rgb(image)
    return Picture((oriented(frame, orientation),), notices=(*unread, *notices))


def _bmp(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    with _opened(content, "BMP") as image:
        check_pixels(image.width, image.height, 1, max_pixels)
        if image.info.get("compression") in (1, 2) and len(content) > _MAX_BMP_RUN_BYTES:
            raise InvalidPictureError(
                f"is a BMP compressed by run lengths with more than {_MAX_BMP_RUN_BYTES} bytes; save it as PNG"
            )
        frame, notices = opaque_rgb(image)
    return Picture((frame,), notices=notices)


def _gif(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    frames, notices = count_gif_frames(content, max_pixels)
    picture = decode_animation(content, "GIF", frames, max_pixels=max_pixels, max_frames=max_frames, notices=notices)
    return replace(picture, is_partial=bool(notices))


def _deep_colours(values: _Array, bits: int, significant: int | None = None) -> tuple[FrameArray, tuple[str, ...]]:
    """RGB of an array of grey or colour values of any depth, the last channel of an even number being alpha."""
    if values.ndim == 2:
        values = values[..., None]
    colours = values.shape[2] - 1 + values.shape[2] % 2
    (shown,), assumed = to_eight_bits([values[..., :colours]], bits, significant)
    alpha = None
    if values.shape[2] > colours:
        (alpha,), _ = to_eight_bits([values[..., colours]], bits)
    frame, transparent = opaque_array(shown, alpha)
    return frame, (*assumed, *transparent)


def _imagecodecs(function: str, content: bytes) -> _Array:
    # Imported only when it is needed: most files do without.
    import imagecodecs

    values: _Array = getattr(imagecodecs, function)(content)
    return values


_DECODERS: dict[str, Callable[[bytes, int, int], Picture]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "JPEG 2000": _jpeg2000,
    "WebP": _webp,
    "TIFF": decode_tiff,
    "BMP": _bmp,
    "GIF": _gif,
}
