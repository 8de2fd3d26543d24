"""The body marker: a pictogram in a corner of the picture that shows which side of the body is looked at.

The body is drawn from the front, as on ultrasound machines: the patient's right is on the left of the pictogram. It is
symmetrical but for the mark of the probe, so that a mirrored picture shows the other side.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.phantom.schema import Organ

Corner = Literal["left", "right"]

WIDTH, HEIGHT = 42, 36
_LINE, _MARK = 150, 255
# Half ellipses of each pictogram on its right half: x and z of the centre, radii; in shares of the pictogram.
_OUTLINES: Mapping[Organ, tuple[tuple[float, float, float, float], ...]] = {
    "breast": ((0.27, 0.5, 0.21, 0.36),),
    "thyroid": ((0.13, 0.5, 0.10, 0.32), (0.0, 0.5, 0.40, 0.44)),
    "gynaecology": ((0.0, 0.6, 0.16, 0.28), (0.32, 0.45, 0.11, 0.2)),
    "kidney": ((0.26, 0.5, 0.13, 0.3), (0.0, 0.5, 0.46, 0.46)),
    "vessel": ((0.0, 0.3, 0.22, 0.26), (0.0, 0.95, 0.44, 0.36)),
}
# Where the probe's mark lies on the right half.
_PLACES: Mapping[Organ, tuple[float, float]] = {
    "breast": (0.27, 0.5),
    "thyroid": (0.22, 0.5),
    "gynaecology": (0.32, 0.45),
    "kidney": (0.3, 0.5),
    "vessel": (0.3, 0.5),
}


def draw_marker(image: npt.NDArray[np.uint8], organ: Organ, side: str, corner: Corner) -> None:
    """Draws a marker into the lower left or right corner of a picture."""
    marker = _pictogram(organ, side)
    rows = slice(image.shape[0] - HEIGHT - 2, image.shape[0] - 2)
    columns = slice(2, WIDTH + 2) if corner == "left" else slice(image.shape[1] - WIDTH - 2, image.shape[1] - 2)
    image[rows, columns] = marker


@cache
def _pictogram(organ: Organ, side: str) -> npt.NDArray[np.uint8]:
    z, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    x = (x - (WIDTH - 1) / 2) / WIDTH
    z = (z + 0.5) / HEIGHT
    picture = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for centre_x, centre_z, rx, rz in _OUTLINES[organ]:
        radius = np.hypot((np.abs(x) - centre_x) / rx, (z - centre_z) / rz)
        picture[np.abs(radius - 1) < 0.9 / (min(rx, rz) * HEIGHT)] = _LINE
    place_x, place_z = _PLACES[organ]
    # The patient's right is on the left.
    sign = -1.0 if side == "right" else 1.0
    picture[(np.abs(x - sign * place_x) < 0.125) & (np.abs(z - place_z) < 0.15)] = _MARK
    return picture
