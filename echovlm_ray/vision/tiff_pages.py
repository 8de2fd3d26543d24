"""The pages of a TIFF to RGB: one page is a still, several alike are a cine loop."""

import numpy as np
import numpy.typing as npt

from echovlm_ray.vision.depth import to_eight_bits
from echovlm_ray.vision.opaque import opaque_array
from echovlm_ray.vision.orientation import oriented
from echovlm_ray.vision.picture import FrameArray, Picture, check_pixels
from echovlm_ray.vision.sampling import sample_frames
from echovlm_ray.vision.tiff_file import TiffPage, check_cost, damaged, read_tiff

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = 0, 1, 2, 3
_MULTIPLIED_ALPHA, _ALPHA = 1, 2

_Array = npt.NDArray[np.generic]


def decode_tiff(content: bytes, max_pixels: int, max_frames: int) -> Picture:
    """Decodes the pages of a TIFF, evenly spread if they are many; smaller copies of a page are left out.

    Raises:
        InvalidPictureError: truncated, damaged, over a limit, or unsupported.
    """
    pages = read_tiff(content)
    whole = [page for page in pages if not page.reduced] or pages
    alike = [page for page in whole if page.shape == whole[0].shape]
    notices: tuple[str, ...] = ()
    if len(alike) < len(whole):
        alike = alike[:1]
        notices = (f"It has {len(whole)} pages that are not all alike; the first is shown.",)
    indices = sample_frames(len(alike), max_frames)
    wanted = sorted(set(indices))
    pixel_bytes = max(3, alike[0].samples * -(-alike[0].bits // 8))
    check_pixels(alike[0].width, alike[0].height, len(wanted), max_pixels, pixel_bytes)
    for index in wanted:
        check_cost(content, alike[index], max_pixels)
    frames, assumed = _frames(content, [alike[index] for index in wanted])
    taken = dict(zip(wanted, frames, strict=True))
    return Picture(tuple(taken[index] for index in indices), indices, len(alike), (*notices, *assumed))


def _frames(content: bytes, pages: list[TiffPage]) -> tuple[list[FrameArray], tuple[str, ...]]:
    """RGB of pages that are alike, all of them treated alike."""
    first = pages[0]
    arrays = [_values(content, page) for page in pages]
    if first.photometric == _PALETTE:
        frames = [_coloured(array, page) for array, page in zip(arrays, pages, strict=True)]
        return [oriented(frame, first.orientation) for frame in frames], ()
    if first.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        return [_upright(array[..., :3], first.orientation) for array in arrays], ()
    colours = 3 if first.photometric == _RGB else 1
    shown, notices = to_eight_bits([array[..., :colours] for array in arrays], first.bits)
    if first.photometric == _WHITE_IS_ZERO:
        shown = [255 - frame for frame in shown]
    kind = first.extra[0] if first.extra else 0
    frames = []
    for array, frame in zip(arrays, shown, strict=True):
        alpha = None
        if kind == _ALPHA and array.shape[2] > colours:
            (alpha,), _ = to_eight_bits([array[..., colours]], first.bits)
        rgb, transparent = opaque_array(frame, alpha, multiplied=kind == _MULTIPLIED_ALPHA)
        frames.append(oriented(rgb, first.orientation))
        notices = notices if set(transparent) <= set(notices) else (*notices, *transparent)
    return frames, notices


def _values(content: bytes, page: TiffPage) -> _Array:
    """What the page stores, height × width × samples; of kinds that libtiff converts itself, RGBA."""
    # Imported only when it is needed: most files do without.
    import imagecodecs

    stored = page.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE)
    array: _Array = imagecodecs.tiff_decode(content, index=page.number, asrgb=not stored)
    if array.ndim == 2:
        array = array[..., None]
    if page.planar and stored and page.samples > 1:
        array = np.moveaxis(array, 0, -1)
    if array.shape[:2] != (page.height, page.width) or array.ndim != 3:
        raise damaged()
    return array


def _coloured(array: _Array, page: TiffPage) -> FrameArray:
    """Looks up the colours of a palette. Writers put 8-bit colours into its 16 bits both ways."""
    if page.colours is None or page.bits > 16 or len(page.colours) != 3 << page.bits:
        raise damaged()
    colours = page.colours if page.colours.max() < 256 else page.colours >> 8
    table = colours.astype(np.uint8).reshape(3, -1).T
    return np.ascontiguousarray(table[array[..., 0].astype(np.intp)])


def _upright(frame: _Array, orientation: int) -> FrameArray:
    """libtiff mirrors what it converts itself but does not turn it, so the mirroring is undone first."""
    stored = oriented(frame.astype(np.uint8), (orientation - 1) % 4 + 1)
    return oriented(stored, orientation)
