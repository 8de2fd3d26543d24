"""Pictures of any of Pillow's eight-bit modes, or as arrays with alpha, to RGB on black."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from echovlm_ray.vision.picture import FrameArray

TRANSPARENT = "All of it is transparent by its alpha channel, which was left out."


def opaque_rgb(image: Image.Image) -> tuple[FrameArray, tuple[str, ...]]:
    """RGB of an image; what is transparent becomes black, the background of ultrasound.

    Returns:
        height × width × 3, and a notice if transparency was left out, since nothing would remain.
    """
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        # A palette with only transparent colours is intentional; an empty alpha channel is an error of the writer.
        if "A" in image.mode and rgba.getchannel("A").getextrema()[1] == 0:
            return np.array(rgba.convert("RGB")), (TRANSPARENT,)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB")), ()


def opaque_array(
    colours: FrameArray, alpha: FrameArray | None, multiplied: bool = False
) -> tuple[FrameArray, tuple[str, ...]]:
    """RGB of grey or colour values with alpha, as `opaque_rgb`.

    Args:
        colours: height × width × 1 or 3.
        alpha: height × width, or None.
        multiplied: whether the colours are multiplied by alpha already.
    """
    rgb: npt.NDArray[np.uint8] = np.broadcast_to(colours, (*colours.shape[:2], 3))
    if alpha is None or multiplied:
        return np.ascontiguousarray(rgb), ()
    if not alpha.any():
        return np.ascontiguousarray(rgb), (TRANSPARENT,)
    return ((rgb * alpha[..., None].astype(np.uint16) + 127) // 255).astype(np.uint8), ()
